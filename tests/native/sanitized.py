"""`LD_PRELOAD=libasan.so python -m tests.native.sanitized LIBRARY`: every verb over arrays of exactly its sizes.

`LD_PRELOAD=libtsan.so python -m tests.native.sanitized LIBRARY group`: only what has threads of its own.
"""

import ctypes
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np

from native.library import DRAW, ENTRY, AttentionShape, Gate, GroupShape, Heads, NativeLibrary, Plane, Product, Stored
from parallel.group_memory import GroupMemoryShape
from tests.native.test_experts import CLAMPED, Layer
from tests.native.test_products import Floats, as_stored, numbers


def panels(library: NativeLibrary) -> None:
    """All tails of rows, outputs and inputs."""
    for rows, out, size, stored in product((0, 1, 5, 7, 12, 13, 98), (1, 15, 16, 17, 31, 33, 64), (1, 2, 9), Stored):
        weight, bias = as_stored(np.ones((out, size), dtype=np.float32), stored), np.ones(out, dtype=np.float32)
        packed = np.empty(library.packed_size(out, size), dtype=weight.dtype)
        library.pack(stored, weight.ctypes.data, size, out, size, packed.ctypes.data, library.num_threads)
        x, y = np.ones((rows, size), dtype=np.float32), np.zeros((rows, out), dtype=np.float32)
        plus, norm, normed = np.ones_like(y), np.ones(size, dtype=np.float32), np.empty_like(x)
        given = (packed.ctypes.data, bias.ctypes.data, norm.ctypes.data, out, size, 0.0, stored)
        library.product(
            *(ctypes.byref(Product(*given)), x.ctypes.data, size, rows, plus.ctypes.data),
            *(normed.ctypes.data, y.ctypes.data, library.num_threads),
        )
        assert np.allclose(y, size + 2)


def heads(library: NativeLibrary) -> None:
    """Tails of heads, with and without norms, and parts of a head that are rotated."""
    for num_rows, width, half in product((0, 1, 3), (2, 15, 34), (0, 1, 7)):
        if 2 * half <= width:
            size, all_heads, rotated = 5, 4, 3
            weight, x = numbers(1, all_heads * width, size), numbers(2, num_rows, size)
            packed = np.empty(library.packed_size(*weight.shape), dtype=np.float32)
            library.pack(0, weight.ctypes.data, size, *weight.shape, packed.ctypes.data, library.num_threads)
            norms, cos = numbers(3, rotated, width), numbers(4, 2, num_rows, half)
            inner = Product(packed.ctypes.data, None, None, all_heads * width, size, 0.0, 0)
            y = np.empty((num_rows, all_heads, width), dtype=np.float32)
            library.heads(
                *(ctypes.byref(Heads(inner, norms.ctypes.data, all_heads, rotated, width, 1e-5)), x.ctypes.data, size),
                *(num_rows, cos[0].ctypes.data, cos[1].ctypes.data, half, None, y.ctypes.data, library.num_threads),
            )
            assert np.isfinite(y).all()


def gates(library: NativeLibrary) -> None:
    """Every kind of gate; experts with two slots, and rows that only pad."""
    for experts, sigmoid, groups, num_rows, padding in product((4, 36), (0, 1), (1, 2), (0, 1, 5), (0, 2)):
        size, k = 3, 2
        weight, x, norm = numbers(1, experts, size), numbers(2, num_rows, size), numbers(3, size)
        packed = np.empty(library.packed_size(experts, size), dtype=np.float32)
        library.pack(0, weight.ctypes.data, size, experts, size, packed.ctypes.data, library.num_threads)
        correction, slots = numbers(4, experts), np.arange(2 * experts, dtype=np.int32)
        copies = np.full(experts, 2, dtype=np.int32)
        logits = Product(packed.ctypes.data, None, norm.ctypes.data, experts, size, 1e-5, 0)
        gate = Gate(
            *(logits, correction.ctypes.data, slots.ctypes.data, copies.ctypes.data, 2),
            *(k, groups, 1, 2, sigmoid, 1, 1.5),
        )
        messages = np.empty((num_rows + padding, size + 2 * k), dtype=np.float32)
        given = (x.ctypes.data, size, num_rows, 1, num_rows + padding)
        library.gate(ctypes.byref(gate), *given, messages.ctypes.data, library.num_threads)
        chosen = messages[:, size : size + k].copy().view(np.int32)
        assert ((chosen[:num_rows] >= 0) & (chosen[:num_rows] < 2 * experts)).all() and (chosen[num_rows:] == -1).all()


def experts(library: NativeLibrary) -> None:
    """Tails of units and of the width, rows that chose nobody here, slots of others."""
    sizes = ((0, 2, 3, 3), (1, 1, 1, 1), (13, 2, 17, 15), (30, 3, 33, 33))
    for (rows, choices, width, units), stored in product(sizes, Stored):
        layer = Layer(first=1, count=3, width=width, units=units, with_biases=True, stored=stored)
        x, shares = numbers(1, rows, width), numbers(2, rows, choices)
        slots = np.random.default_rng(0).integers(-1, 6, (rows, choices))
        layer.run(library, x, slots, shares, by=CLAMPED, threads=library.num_threads)


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
            *(output.ctypes.data, lse.ctypes.data, library.num_threads),
        )
        assert np.isfinite(output).all()


def rows(library: NativeLibrary) -> None:
    """Tails of widths; rows and planes of exactly their sizes."""
    for num_rows, heads, width in product((0, 1, 3), (1, 2), (2, 15, 16, 34)):
        x, weight = numbers(1, num_rows, heads, width), numbers(2, heads * width)
        y = np.empty_like(x)
        given = (x.ctypes.data, heads * width, num_rows)
        library.norm(*given, heads * width, weight.ctypes.data, 1e-5, y.ctypes.data, library.num_threads)
        plane = np.zeros((2, heads, 4, width), dtype=np.float32)
        pages, offsets = np.full(num_rows, 1, dtype=np.int32), np.arange(num_rows, dtype=np.int32)
        strides = (heads * 4 * width, 4 * width, width)
        places = (pages.ctypes.data, offsets.ctypes.data)
        is_whole = library.write_rows(*given, heads, width, plane.ctypes.data, *strides, *places)
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
                *(asked.ctypes.data, tokens.ctypes.data, is_finite.ctypes.data, library.num_threads),
            )
            assert ((tokens >= 0) & (tokens < size)).all()
            assert is_finite.tolist() == [at != 5 for at in range(rows)]


class GroupRank:
    """A rank of a group as a thread: all see one memory, and what one gives another is a whole array."""

    def __init__(self, library: NativeLibrary, *, memory: int, shape: GroupMemoryShape, index: int) -> None:
        sizes = GroupShape(shape.size, shape.num_slots, shape.outbox_bytes, shape.slot_bytes)
        self._calls, self._size, self._index = library.group, shape.size, index
        self._group = library.group.join(memory, ctypes.byref(sizes), index, 30 * (index % 2), 60.0)
        self._sent: list[tuple[Floats, ctypes.c_int32]] = []
        assert self._calls.meet(self._group, 60.0) == 0

    def run(self, length: int) -> None:
        """Every verb once, in an order that all share; numbers are the sender's index, and a message's its place."""
        size, index = self._size, self._index
        everyone = np.repeat(np.arange(size, dtype=np.float32), length).reshape(size, length)
        mine, out = np.full((size, length), index, dtype=np.float32), np.empty((size, length), dtype=np.float32)
        for channel in range(3):
            for place in range(3):
                self._send(np.full(length, place, dtype=np.float32), to=(index + 1) % size, channel=channel)
        assert self._calls.all_gather(self._group, mine.ctypes.data, out.ctypes.data, 4 * length) == 0
        assert (out == everyone).all()
        assert self._calls.all_to_all(self._group, mine.ctypes.data, out.ctypes.data, 4 * length) == 0
        assert (out == everyone).all()
        total = np.empty(length, dtype=np.float32)
        assert self._calls.reduce_scatter(self._group, mine.ctypes.data, total.ctypes.data, length) == 0
        assert (total == size * (size - 1) / 2).all()
        # Rank r gives r times as many numbers to each.
        given, taken = (ctypes.c_int64 * size)(), (ctypes.c_int64 * size)()
        given[:], taken[:] = [4 * length * index] * size, [4 * length * rank for rank in range(size)]
        gifts = np.full(size * length * index, index, dtype=np.float32)
        found = np.empty(length * size * (size - 1) // 2, dtype=np.float32)
        assert self._calls.all_to_all_uneven(self._group, gifts.ctypes.data, found.ctypes.data, given, taken) == 0
        assert (found == np.repeat(np.arange(size), [length * rank for rank in range(size)])).all()
        for channel in range(3):
            for place in range(3):
                self._receive(length, source=(index - 1) % size, channel=channel, wanted=place)

    def leave(self) -> None:
        """When all have everything."""
        for _, is_moved in self._sent:
            assert self._calls.await_moved(self._group, is_moved, (self._index + 1) % self._size) == 0
        assert self._calls.all_to_all(self._group, 0, 0, 0) == 0
        self._calls.leave(self._group)
        self._calls.free(self._group)

    def _send(self, x: Floats, *, to: int, channel: int) -> None:
        is_moved = ctypes.c_int32()
        self._sent.append((x, is_moved))
        assert self._calls.send(self._group, x.ctypes.data, x.nbytes, to, channel, is_moved) == 0

    def _receive(self, length: int, *, source: int, channel: int, wanted: int) -> None:
        out = np.empty(length, dtype=np.float32)
        assert self._calls.receive(self._group, out.ctypes.data, out.nbytes, source, channel) == 0
        assert (out == wanted).all()


def group(library: NativeLibrary) -> None:
    """Pieces and tails of pieces, and more under way than there are slots; ranks are threads, and so is what moves."""
    for size in (2, 3):
        shape = GroupMemoryShape(size=size, outbox_bytes=1024, slot_bytes=256)
        memory = np.zeros(shape.num_bytes + 4096, dtype=np.uint8)
        first = -(-memory.ctypes.data // 4096) * 4096

        def work(index: int, shape: GroupMemoryShape = shape, first: int = first) -> None:
            rank = GroupRank(library, memory=first, shape=shape, index=index)
            for length in (1, 3, 64, 65, 257, 3000):
                rank.run(length)
            rank.leave()

        with ThreadPoolExecutor(size) as threads:
            list(threads.map(work, range(size)))


#: All that there are.
VERBS = (panels, heads, gates, experts, attention, rows, draws, group)

if __name__ == "__main__":
    loaded = NativeLibrary(Path(sys.argv[1]), num_threads=2)
    for verbs in (group,) if sys.argv[2:] == ["group"] else VERBS:
        verbs(loaded)
    print("done")
