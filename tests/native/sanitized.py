"""`LD_PRELOAD=libasan.so python -m tests.native.sanitized LIBRARY`: every verb over arrays of exactly its sizes."""

import sys
from itertools import product
from pathlib import Path

import numpy as np

from native.library import DRAW, ENTRY, AttentionShape, NativeLibrary, Plane, Stored
from tests.native.test_experts import CLAMPED, Layer
from tests.native.test_products import as_stored, numbers


def panels(library: NativeLibrary) -> None:
    """All tails of rows, outputs and inputs."""
    for rows, out, size, stored in product((0, 1, 5, 7, 12, 13, 98), (1, 15, 16, 17, 31, 33, 64), (1, 2, 9), Stored):
        weight, bias = as_stored(np.ones((out, size), dtype=np.float32), stored), np.ones(out, dtype=np.float32)
        packed = np.empty(library.packed_size(out, size), dtype=weight.dtype)
        library.pack(stored, weight.ctypes.data, size, out, size, packed.ctypes.data, 2)
        x, y = np.ones((rows, size), dtype=np.float32), np.zeros((rows, out), dtype=np.float32)
        library.product(
            *(x.ctypes.data, size, rows),
            *(stored, packed.ctypes.data, bias.ctypes.data, out, size),
            *(y.ctypes.data, out, 2),
        )
        assert (y == size + 1).all()


def experts(library: NativeLibrary) -> None:
    """Tails of units and of the width, rows that chose nobody here, slots of others."""
    sizes = ((0, 2, 3, 3), (1, 1, 1, 1), (13, 2, 17, 15), (30, 3, 33, 33))
    for (rows, choices, width, units), stored in product(sizes, Stored):
        layer = Layer(first=1, count=3, width=width, units=units, with_biases=True, stored=stored)
        x, shares = numbers(1, rows, width), numbers(2, rows, choices)
        slots = np.random.default_rng(0).integers(-1, 6, (rows, choices))
        layer.run(library, x, slots, shares, by=CLAMPED, threads=2)


def attention(library: NativeLibrary) -> None:
    """Tails of widths, pages that end inside a block, windows, rows that see nothing; memory of exactly the pages."""
    cases = product((1, 5, 16), (1, 17, 64, 130), (1, 7, 16, 40), (1, 3), (0, 9))
    for page_size, kv_len, width, num_rows, window in cases:
        kv_heads, group, num_pages = 2, 3, -(-kv_len // page_size)
        memory = numbers(1, 2, num_pages, kv_heads, page_size, width)
        pages = np.arange(num_pages, dtype=np.int32)[::-1].copy()
        strides = (kv_heads * page_size * width, page_size * width, width)
        planes = [Plane(plane.ctypes.data, *strides) for plane in memory]
        entries = np.array([(0, num_rows, kv_len, 1, pages.ctypes.data)], dtype=ENTRY)
        q = numbers(2, num_rows, kv_heads * group, width)
        output, lse = np.empty_like(q), np.empty(q.shape[:2], dtype=np.float32)
        library.attend(
            *(entries.ctypes.data, 1),
            *(AttentionShape(kv_heads * group, kv_heads, width, width, page_size, window, 0.3), *planes),
            *(q.ctypes.data, kv_heads * group * width, width),
            *(output.ctypes.data, lse.ctypes.data, 2),
        )
        assert np.isfinite(output).all()


def rows(library: NativeLibrary) -> None:
    """Tails of widths; rows and planes of exactly their sizes."""
    for num_rows, heads, width in product((0, 1, 3), (1, 2), (2, 15, 16, 34)):
        x, weight = numbers(1, num_rows, heads, width), numbers(2, heads, width)
        y, half = np.empty_like(x), width // 2
        cos, sin = numbers(3, 2, num_rows, half)
        given = (x.ctypes.data, heads * width, num_rows, heads, width)
        library.norm(*given, weight.ctypes.data, 1e-5, y.ctypes.data, 2)
        library.rotate(*given, cos.ctypes.data, sin.ctypes.data, half, y.ctypes.data, 2)
        plane = np.zeros((2, heads, 4, width), dtype=np.float32)
        pages, offsets = np.full(num_rows, 1, dtype=np.int32), np.arange(num_rows, dtype=np.int32)
        strides = (heads * 4 * width, 4 * width, width)
        is_whole = library.write_rows(*given, plane.ctypes.data, *strides, pages.ctypes.data, offsets.ctypes.data)
        assert is_whole == 1 and (plane[1, :, :num_rows] == x.swapaxes(0, 1)).all()


def draws(library: NativeLibrary) -> None:
    """Tails of a vector and of a block, every filter, rows that are no numbers, a stride."""
    samplings = [(t, p, m, k) for t, p, m, k in product((0.0, 0.8), (1.0, 0.9, 0.0), (0.0, 0.1), (0, 1, 5, 200))]
    asked = np.array([(*sampling, 2**64 - 1, 2**62 + at) for at, sampling in enumerate(samplings)], dtype=DRAW)
    for size in (1, 7, 16, 31, 127, 128, 129, 1000):
        for stride in (size, size + 3):
            rows = len(asked)
            logits = numbers(size, (rows - 1) * stride + size)
            logits[stride * 5] = np.nan
            tokens, is_finite = np.full(rows, -1, dtype=np.int64), np.full(rows, 2, dtype=np.uint8)
            library.draw(
                *(logits.ctypes.data, stride, rows, size),
                *(asked.ctypes.data, tokens.ctypes.data, is_finite.ctypes.data, 2),
            )
            assert ((tokens >= 0) & (tokens < size)).all()
            assert is_finite.tolist() == [at != 5 for at in range(rows)]


if __name__ == "__main__":
    loaded = NativeLibrary(Path(sys.argv[1]))
    panels(loaded)
    experts(loaded)
    attention(loaded)
    rows(loaded)
    draws(loaded)
    print("done")
