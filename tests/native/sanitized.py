"""`LD_PRELOAD=libasan.so python -m tests.native.sanitized LIBRARY`: every verb over arrays of exactly its sizes."""

import sys
from pathlib import Path

import numpy as np

from native.library import NativeLibrary


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


if __name__ == "__main__":
    products(NativeLibrary(Path(sys.argv[1])))
    print("done")
