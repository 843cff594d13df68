"""`python -m tests.soak --requests 20000`: many short requests, and whether the service holds more after them."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.soak.run import FIRST, soak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000, help=f"more than {FIRST}")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(options.requests, folder=Path(folder), concurrency=options.concurrency, seed=options.seed)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
