"""The command `router`, also as `python -m router`: makes sure of Muster's own packages before any of them is used."""

import sys
from pathlib import Path


def main() -> None:
    """The console script's entry."""
    # For this one import our folder comes first: anybody may have a `parallel.py`.
    sys.path.insert(0, str(Path(__file__).absolute().parents[1]))
    from parallel.process.own_packages import run_command

    sys.path.pop(0)
    run_command("router.cli")


if __name__ == "__main__":
    main()
