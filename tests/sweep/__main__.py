"""Runs pairs of the sweep by hand, each a line as failures print it.

python -m tests.sweep "mixtral prefill=cp2 decode=dp2"     these pairs, all of them
python -m tests.sweep --spread                             those of `make test`, until one fails
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.sweep.pairs import parse_pair, spread
from tests.sweep.runs import Sweep, running_sweep
from tests.sweep.test_sweep import FAST


def main() -> None:
    """Exits with 1 where a pair fails."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pairs", nargs="*")
    parser.add_argument("--spread", action="store_true")
    parser.add_argument("--layers", type=int, help="of the model; by default two, or eight where pp asks for them")
    options = parser.parse_args()
    lines = [str(pair) for pair in spread(count=FAST)] if options.spread else options.pairs
    failed = False
    with tempfile.TemporaryDirectory() as folder, running_sweep(Path(folder)) as sweep:
        for line in lines:
            failed |= not _agrees(sweep, line, num_layers=options.layers)
            if failed and options.spread:
                break
    sys.exit(failed)


def _agrees(sweep: Sweep, line: str, *, num_layers: int | None) -> bool:
    started, said = time.monotonic(), "agrees with transformers"
    try:
        sweep.run(parse_pair(line), num_layers=num_layers)
    except Exception as error:  # the command's edge: whatever it is, the pair is told and the next one runs
        said = f"FAILS: {type(error).__name__}: {str(error).splitlines()[0]}"
    print(f"{line}: {said} ({time.monotonic() - started:.1f} s)", flush=True)
    return "FAILS" not in said


if __name__ == "__main__":
    main()
