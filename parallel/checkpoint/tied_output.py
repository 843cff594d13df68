"""A config that ties the output to the embedding, beside weight files that hold an output of their own.

transformers 5 then reads both, and ties them only where they are equal; so does Muster.
"""

from pathlib import Path
from typing import Any

from parallel.checkpoint.safetensors_header import StoredEntry
from parallel.checkpoint.sample_places import read_samples
from parallel.checkpoint.weight_files import stored_entries

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_BLOCK_BYTES = 16 << 20


def untie_where_stored(config: dict[str, Any], *, folder: Path) -> dict[str, Any]:
    """`config`, untied where the weight files in `folder` hold an output that differs from the embedding.

    Reads samples of the two tensors, and all of them only where those are equal. Where files are missing or broken
    the config stays as it is: whoever reads the weights tells that.
    """
    if not config.get("tie_word_embeddings"):
        return config
    try:
        entries = stored_entries(folder)
    except ValueError:
        return config
    embedding, output = entries.get(EMBEDDING), entries.get(OUTPUT)
    if embedding is None or output is None or _equal(embedding, output):
        return config
    return {**config, "tie_word_embeddings": False}


def _equal(one: StoredEntry, other: StoredEntry) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    samples = zip(read_samples(one.file, [one]), read_samples(other.file, [other]), strict=True)
    return all(first == second for first, second in samples) and _same_bytes(one, other)


def _same_bytes(one: StoredEntry, other: StoredEntry) -> bool:
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        for begin in range(0, one.end - one.start, _BLOCK_BYTES):
            size = min(_BLOCK_BYTES, one.end - one.start - begin)
            if first.read(size) != second.read(size):
                return False
    return True
