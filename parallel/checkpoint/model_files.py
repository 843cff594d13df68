"""Reads a checkpoint's small text files; whatever is wrong with one is a sentence that names it and a remedy."""

import json
from pathlib import Path
from typing import Any

#: What git leaves in a file's place where its large content was not fetched.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
FETCH_ANEW = "fetch the checkpoint anew"
FETCH_POINTER = "run `git lfs pull` in its folder, or fetch the checkpoint anew"


def read_bytes(path: Path) -> bytes:
    """What is in `path`; ValueError where it cannot be read, or is a pointer to the file itself."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; {FETCH_ANEW}") from None
    if content.startswith(LFS_POINTER):
        raise ValueError(f"{path} is a git-lfs pointer, not the file itself; {FETCH_POINTER}")
    return content


def read_text(path: Path) -> str:
    """The text in `path`; ValueError where it cannot be read, or is no UTF-8."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}); {FETCH_ANEW}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ValueError where there is none."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # nested beyond Python's own depth, it is no config either
        raise ValueError(f"{path} is not JSON ({error}); {FETCH_ANEW}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object; {FETCH_ANEW}")
    return value
