"""Reads a tensor's bytes at places spread over the whole of it, the same ones on every host.

Each of equal parts of the tensor gives one sample, at a place inside its part that moves from part to part: as far into
each, samples of a tensor whose rows divide its parts would all be of the same columns.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from parallel.checkpoint.safetensors_header import StoredEntry

SAMPLE_BYTES = 256
MAX_SAMPLES = 64
#: 2^64 over the golden ratio: its multiples, modulo 2^64, are spread evenly whatever their number.
_STEP = 0x9E3779B97F4A7C15


def sample_places(size: int, *, count: int) -> Iterator[tuple[int, int]]:
    """Start and length of `count` samples of a tensor of `size` bytes; of a small one, all of it."""
    if size <= count * SAMPLE_BYTES:
        yield 0, size
        return
    for index in range(count):
        begin, end = index * size // count, (index + 1) * size // count
        free = end - begin - SAMPLE_BYTES + 1
        yield begin + (index * _STEP % 2**64 * free >> 64), SAMPLE_BYTES


def read_samples(file: Path, entries: Iterable[StoredEntry], *, count: int = MAX_SAMPLES) -> Iterator[bytes]:
    """Blocking: `count` samples of each of `entries`, which lie in `file`, in the order given."""
    descriptor = os.open(file, os.O_RDONLY)
    places: dict[int, list[tuple[int, int]]] = {}  # of each size: most tensors share a few
    try:
        # Single places are read: what a disk would read ahead of them is for nothing.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        for entry in entries:
            num_bytes = entry.end - entry.start
            if num_bytes not in places:
                places[num_bytes] = list(sample_places(num_bytes, count=count))
            for start, size in places[num_bytes]:
                yield os.pread(descriptor, size, entry.start + start)
    finally:
        os.close(descriptor)
