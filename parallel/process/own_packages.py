"""Muster's packages have plain names, which a stranger's file may have too: here ours are taken, and theirs told apart.

Run as a script it starts a module of Muster from the folder that this package is in, as children are started:
`python -P parallel/process/own_packages.py worker.rank ...`. Neither the current folder nor another installation comes
first there, and neither sys.path nor the environment is changed for what runs then.
"""

import importlib
import importlib.util
import io
import os
import runpy
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

PACKAGES = ("native", "proto", "parallel", "attention", "moe", "worker", "router")

# Not resolved: a package's files may be links into a cache where its neighbours are not.
_FOLDER = Path(__file__).absolute().parents[2]


def module_command(module: str) -> list[str]:
    """The command that runs `module` of Muster with this code, whatever the current folder holds."""
    return [sys.executable, "-P", str(Path(__file__).absolute()), module]


def take_own_packages() -> None:
    """Imports Muster's packages, whatever else has their names; SystemExit with a sentence where that is impossible.

    Only the packages themselves, which are empty: their modules are found through them from then on.
    """
    sys.path.insert(0, str(_FOLDER))
    try:
        for name in PACKAGES:
            if not _is_own(name):
                raise SystemExit(_in_the_way(name))
    finally:
        sys.path.remove(str(_FOLDER))
    if not (_FOLDER / "proto" / "inference_pb2.py").exists():
        raise SystemExit(f"the generated messages are not in {_FOLDER / 'proto'}: run `make proto` in {_FOLDER}")


def run_command(module: str) -> None:
    """Runs `app` of `module`, a command's edge: Ctrl-C ends it quietly from its first import on."""
    # Nothing forks here but to start a program; gRPC would warn of it.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    try:
        take_own_packages()
        # A terminal or file that lacks a character shows a question mark in its place.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        importlib.import_module(module).app()
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _is_own(name: str) -> bool:
    """Its folder says so, and for proto a mark: two distributions may have written into one folder."""
    try:
        module = importlib.import_module(name)
    except ImportError:  # ours import nothing
        return False
    in_place = Path(str(module.__file__)).parent == _FOLDER / name
    return in_place and (name != "proto" or getattr(module, "OWNER", None) == "muster")


def _in_the_way(name: str) -> str:
    if not (_FOLDER / name / "__init__.py").exists():  # as another's removal leaves it
        return f"Muster's own package {name} is not whole in {_FOLDER}: install Muster anew"
    spec = importlib.util.find_spec(name)
    others = [owner for owner in packages_distributions().get(name, []) if owner != "muster"]
    of_whom = f", of {' and '.join(dict.fromkeys(others))}," if others else ""
    return (
        f"{spec.origin if spec else name}{of_whom} is in the way of Muster's own package {name}: install Muster into a "
        "virtual environment of its own, or uninstall the other and install Muster anew"
    )


def _run() -> None:
    sys.argv = sys.argv[1:]
    take_own_packages()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _run()
