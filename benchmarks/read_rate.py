"""What memory gives to those who only read it: the bound of a step that reads all weights for one row."""

import time

import torch

#: More than any cache holds.
_BYTES = 512 << 20


class ReadRate:
    """Reads one large block again and again, on as many threads as torch has."""

    def __init__(self) -> None:
        self._block = torch.ones(_BYTES // 4)

    def measure(self, *, passes: int = 3) -> float:
        """Bytes a second of the fastest of `passes` sums over the block."""
        best = float("inf")
        for _ in range(passes):
            started = time.perf_counter()
            self._block.sum()
            best = min(best, time.perf_counter() - started)
        return _BYTES / best
