"""A checkpoint on disk: where a model's name leads, which files hold it, and a fingerprint to compare hosts by."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

DEMO_FOLDER = Path(".cache/models/smollm2-135m-mixtral")
_SMALL = ["*.json", "*.jinja", "tokenizer.model"]
_WEIGHTS = ["*.safetensors"]


def resolve_model(model: str, *, weights: bool = True) -> Path:
    """The local folder of `model`: `demo`, a folder, or a hub id, which is fetched to the hub's own cache.

    Without `weights` a hub's weight files are not fetched: a check needs the config alone. Raises ValueError where none
    of them leads to a checkpoint.
    """
    if model == "demo":
        if not (DEMO_FOLDER / "config.json").exists():
            raise ValueError(f"the demo model is not in {DEMO_FOLDER}: run `make demo-model` in the repository's root")
        return DEMO_FOLDER
    folder = Path(model)
    if (folder / "config.json").exists():
        return folder
    if folder.is_dir():
        raise ValueError(f"{folder} has no config.json: a model is a folder with config.json and *.safetensors")
    if model.count("/") != 1 or model.startswith(("/", ".", "~")):
        raise ValueError(f"model {model!r} is neither 'demo', nor a folder that exists, nor a hub id (owner/name)")
    return _from_hub(model, patterns=[*_SMALL, *_WEIGHTS] if weights else _SMALL)


def weight_files(folder: Path) -> Mapping[str, Path]:
    """The file of each tensor by name, from the index or the files themselves; ValueError where there is neither."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = json.loads(index.read_text()).get("weight_map")
        if not isinstance(names, dict):
            raise ValueError(f"{index} has no weight_map: fetch the checkpoint anew")
        return {name: folder / file for name, file in names.items()}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors file")
    return {name: file for file in files for name in json.loads(read_header(file)) if name != "__metadata__"}


def read_header(file: Path) -> bytes:
    """The JSON header of a safetensors file: 8 bytes of its length, then itself; ValueError names a file without."""
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            # Compared before it is read: eight bytes of anything else name a length that no memory has.
            header = stream.read(size) if 0 < size <= file.stat().st_size - 8 else b""
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: fetch the checkpoint anew") from None
    if not header.startswith(b"{"):
        raise ValueError(f"{file} is no safetensors file, or was cut short: fetch the checkpoint anew")
    return header


def fingerprint(folder: Path) -> str:
    """A hash of the config and of every weight file's name, size and header: cheap, and it differs between models.

    Not of the weights' bytes, which would take a read of the whole checkpoint.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(set(weight_files(folder).values())):
        header = read_header(file)
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
        digest.update(header)
    return digest.hexdigest()[:16]


def _from_hub(model: str, *, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ValueError(f"model {model!r} is no local folder, and the hub did not give it: {error}") from error
