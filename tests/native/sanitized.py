"""`LD_PRELOAD=libasan.so python -m tests.native.sanitized LIBRARY`: every verb over arrays of exactly its sizes."""

import sys
from pathlib import Path

import numpy as np

from native.library import NativeLibrary
from tests.native.test_experts import CLAMPED, Layer
from tests.native.test_products import numbers


def products(library: NativeLibrary) -> None:
    """All tails of rows, outputs and inputs."""
    for rows in (0, 1, 5, 7, 12, 13, 98):
        for out in (1, 15, 16, 17, 31, 33, 64):
            for size in (1, 2, 9):
                weight, bias = np.ones((out, size), dtype=np.float32), np.ones(out, dtype=np.float32)
                packed = np.empty(library.packed_floats(out, size), dtype=np.float32)
                library.pack(weight.ctypes.data, size, out, size, packed.ctypes.data, 2)
                x, y = np.ones((rows, size), dtype=np.float32), np.zeros((rows, out), dtype=np.float32)
                library.product(
                    *(x.ctypes.data, size, rows),
                    *(packed.ctypes.data, bias.ctypes.data, out, size),
                    *(y.ctypes.data, out, 2),
                )
                assert (y == size + 1).all()


def experts(library: NativeLibrary) -> None:
    """Tails of units and of the width, rows that chose nobody here, slots of others."""
    for rows, choices, width, units in ((0, 2, 3, 3), (1, 1, 1, 1), (13, 2, 17, 15), (30, 3, 33, 33)):
        layer = Layer(first=1, count=3, width=width, units=units, with_biases=True)
        x, shares = numbers(1, rows, width), numbers(2, rows, choices)
        slots = np.random.default_rng(0).integers(-1, 6, (rows, choices))
        layer.run(library, x, slots, shares, by=CLAMPED, threads=2)


if __name__ == "__main__":
    loaded = NativeLibrary(Path(sys.argv[1]))
    products(loaded)
    experts(loaded)
    print("done")
