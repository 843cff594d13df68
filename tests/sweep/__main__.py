"""`python -m tests.sweep "mixtral prefill=cp2 decode=dp2"`: runs the pairs given, each a line as failures print it."""

import sys
import tempfile
import time
from pathlib import Path

from tests.sweep.pairs import parse_pair
from tests.sweep.runs import running_sweep


def main() -> None:
    """Runs every pair and exits with 1 where one fails."""
    failed = False
    with tempfile.TemporaryDirectory() as folder, running_sweep(Path(folder)) as sweep:
        for text in sys.argv[1:]:
            started = time.monotonic()
            try:
                sweep.run(parse_pair(text))
                said = "agrees with transformers"
            except AssertionError as error:
                failed, said = True, f"FAILS: {error}"
            print(f"{text}: {said} ({time.monotonic() - started:.1f} s)", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
