"""What the cores of this machine read and compute at best, in the same minute as what is measured beside it.

Both are those of a native product whose weight no cache holds: with one row it only reads, with many it only computes.
Where native kernels are not built, torch's sum and product stand in for it.
"""

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from native.arena import Arena
from native.build import Build
from native.library import NativeLibrary, Product, Stored

_OUT, _SIZE = 65536, 1536
_MANY_ROWS = 96
#: The first passes wake threads and bring them to cores of their own.
_PASSES = 12


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Bytes and operations a second, of all threads together."""

    read_bytes: float
    flops: float


class MachineRates:
    """Measures again and again over one weight of 400 MB."""

    def __init__(self) -> None:
        path = Build().find()
        self._library = None if path is None else NativeLibrary(path)
        if self._library is None:
            self._weight = torch.ones((_OUT, _SIZE))
        else:
            memory = Arena().take(4 * self._library.packed_size(_OUT, _SIZE))
            self._weight = torch.frombuffer(memory, dtype=torch.float32).fill_(1.0)

    def measure(self, *, threads: int) -> Rates:
        """The best of some passes on so many threads."""
        return Rates(
            read_bytes=self._weight.nbytes / _best_s(self._pass(rows=1, threads=threads)),
            flops=2 * _MANY_ROWS * _OUT * _SIZE / _best_s(self._pass(rows=_MANY_ROWS, threads=threads)),
        )

    def _pass(self, *, rows: int, threads: int) -> Callable[[], object]:
        x, y = torch.ones((rows, _SIZE)), torch.empty((rows, _OUT))
        if self._library is None:
            torch.set_num_threads(threads)
            return self._weight.sum if rows == 1 else partial(F.linear, x, self._weight)
        product = Product(self._weight.data_ptr(), None, None, _OUT, _SIZE, 0.0, Stored.FLOAT32)
        rows_of_x = (x.data_ptr(), _SIZE, rows)
        call = partial(self._library.product, ctypes.addressof(product), *rows_of_x, None, None, y.data_ptr(), threads)
        return lambda: (call(), product, x, y)


def _best_s(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(_PASSES):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best
