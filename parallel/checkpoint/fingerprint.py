"""A hash that tells checkpoints apart, values and all, without reading the whole of them.

Hosts with one fingerprint hand KV to each other, and it salts the prefix cache.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from parallel.checkpoint.model_files import read_bytes
from parallel.checkpoint.safetensors_header import Header, read_header
from parallel.checkpoint.sample_places import MAX_SAMPLES, read_samples
from parallel.checkpoint.weight_files import weight_paths

#: Samples of all tensors together, where that leaves each of them enough.
_ALL_SAMPLES = 1 << 16
_LEAST_SAMPLES = 2
#: Files read at once: each place is a read of its own, which on a cold disk is mostly waiting.
_NUM_THREADS = 8


def fingerprint(folder: Path) -> str:
    """Blocking: a hash of the config, of every weight file's name, size and header, and of bytes of every tensor.

    The bytes lie spread over the whole of each tensor, at places that follow from its size and the number of tensors.
    ValueError names a file that cannot be read.
    """
    digest = hashlib.sha256(read_bytes(folder / "config.json"))
    headers = {file: read_header(file) for file in weight_paths(folder)}
    num_tensors = sum(len(header.entries) for header in headers.values())
    count = min(max(_ALL_SAMPLES // max(num_tensors, 1), _LEAST_SAMPLES), MAX_SAMPLES)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for part in pool.map(lambda file: _file_digest(file, headers[file], count=count), headers):
            digest.update(part)
    return digest.hexdigest()[:16]


def _file_digest(file: Path, header: Header, *, count: int) -> bytes:
    digest = hashlib.sha256(f"{file.name}:{file.stat().st_size}".encode())
    digest.update(header.content)
    entries = sorted(header.entries.values(), key=lambda entry: entry.start)
    for sample in read_samples(file, entries, count=count):
        digest.update(sample)
    return digest.digest()
