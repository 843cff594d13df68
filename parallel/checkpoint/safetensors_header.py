"""Headers of safetensors files: which tensors a file holds and where, without torch and without the tensors' bytes.

    [8 bytes: size n of the header, little-endian][n bytes of JSON][the tensors' bytes, one after another]

Offsets in the JSON count from the end of the header.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from parallel.checkpoint.model_files import FETCH_ANEW, FETCH_POINTER, LFS_POINTER

#: The format's own limit.
_MAX_HEADER_BYTES = 100_000_000
#: Bytes of one element. Types of less than a byte have none here: nothing serves them.
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@dataclass(frozen=True, kw_only=True)
class StoredEntry:
    """One tensor as a file stores it; `start` and `end` are offsets in the file, in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header of one file: its bytes, and its tensors by name."""

    content: bytes
    entries: Mapping[str, StoredEntry]


def read_header(file: Path) -> Header:
    """The header of `file`; ValueError where it is another kind of file, a pointer to one, or was cut short."""
    content, size = _read_content(file)
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise _no_safetensors(file) from None
    begin = 8 + len(content)
    entries = {
        name: _entry(value, file=file, name=name, begin=begin)
        for name, value in values.items()
        if name != "__metadata__"
    }
    end = max((entry.end for entry in entries.values()), default=begin)
    if end != size:
        fault = "was cut short" if end > size else "is longer than it should be"
        raise ValueError(f"{file} {fault}: its header names {end} bytes, it has {size}; {FETCH_ANEW}")
    _require_contiguous(entries, begin=begin)
    return Header(content=content, entries=entries)


def _require_contiguous(entries: Mapping[str, StoredEntry], *, begin: int) -> None:
    """ValueError where tensors overlap or leave a gap: safetensors itself opens no such file."""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != begin:
            raise ValueError(f"{entry.file} has {name!r} at byte {entry.start} instead of {begin}; {FETCH_ANEW}")
        begin = entry.end


def _read_content(file: Path) -> tuple[bytes, int]:
    """The JSON of a header as bytes, and the size of its file."""
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            first = stream.read(8)
            length = int.from_bytes(first, "little")
            # Compared before it is read: eight bytes of anything else name a length that no memory has.
            content = stream.read(length) if 0 < length <= min(size - 8, _MAX_HEADER_BYTES) else b""
            stream.seek(0)
            is_pointer = stream.read(len(LFS_POINTER)) == LFS_POINTER
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; {FETCH_ANEW}") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}; {FETCH_ANEW}") from None
    if is_pointer:
        raise ValueError(f"{file} is a git-lfs pointer, not the file itself; {FETCH_POINTER}")
    if not content.startswith(b"{"):
        raise _no_safetensors(file)
    return content, size


def _entry(value: Any, *, file: Path, name: str, begin: int) -> StoredEntry:
    try:
        dtype, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        is_sound = isinstance(dtype, str) and all(map(_is_size, (*shape, start, end))) and start <= end
    except (TypeError, KeyError, ValueError):
        is_sound = False
    if not is_sound:
        raise ValueError(f"{file} has a header whose entry {name!r} cannot be read; {FETCH_ANEW}")
    expected = prod(shape) * _ITEM_BYTES.get(dtype, 0)
    if dtype in _ITEM_BYTES and end - start != expected:
        raise ValueError(
            f"{file} has {name!r} in {end - start} bytes, but {dtype} of shape {shape} takes {expected}; {FETCH_ANEW}"
        )
    return StoredEntry(file=file, dtype=dtype, shape=shape, start=begin + start, end=begin + end)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _no_safetensors(file: Path) -> ValueError:
    return ValueError(f"{file} is no safetensors file, or was cut short; {FETCH_ANEW}")
