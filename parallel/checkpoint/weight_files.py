"""Which files of a checkpoint hold its tensors, in the order in which transformers looks for them. No torch."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from parallel.checkpoint.model_files import FETCH_ANEW, read_json_object
from parallel.checkpoint.safetensors_header import StoredEntry, read_header

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def weight_paths(folder: Path) -> tuple[Path, ...]:
    """Every weight file that is read, whether it is there or not; ValueError where the folder names none."""
    index = read_index(folder)
    if index is not None:
        return tuple(sorted(set(index.values())))
    files = [folder / _SINGLE] if (folder / _SINGLE).exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(_without_weights(folder))
    return tuple(files)


def weight_files(folder: Path) -> Mapping[str, Path]:
    """The file of each tensor by name; ValueError where a file cannot be read."""
    return {name: entry.file for name, entry in stored_entries(folder).items()}


def stored_entries(folder: Path) -> Mapping[str, StoredEntry]:
    """Every tensor that the weight files hold, by name; ValueError names a file that cannot be read.

    As in transformers, an index names the files that are read, and the files say which tensors they hold.
    """
    return merge_entries([read_header(file).entries for file in weight_paths(folder)])


def merge_entries(headers: Iterable[Mapping[str, StoredEntry]]) -> Mapping[str, StoredEntry]:
    """The tensors of all files in one mapping; ValueError where it is open which of two files' tensors counts."""
    merged: dict[str, StoredEntry] = {}
    for entries in headers:
        for name, entry in entries.items():
            if name in merged:
                files = f"{merged[name].file} and {entry.file.name}"
                raise ValueError(f"{files} both hold {name}; remove the file that is not the model's")
            merged[name] = entry
    return merged


def read_index(folder: Path) -> Mapping[str, Path] | None:
    """The file of each tensor as the index names it; None where the folder has none, or one file that goes first."""
    if not _has_index(folder):
        return None
    path = folder / _INDEX
    names = read_json_object(path).get("weight_map")
    if not isinstance(names, dict) or not names or not all(_is_file_name(file) for file in names.values()):
        raise ValueError(f"{path} has no weight_map of tensor names to file names; {FETCH_ANEW}")
    return {name: folder / file for name, file in names.items()}


def _has_index(folder: Path) -> bool:
    return (folder / _INDEX).exists() and not (folder / _SINGLE).exists()


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and Path(value).name == value


def _without_weights(folder: Path) -> str:
    """Why a folder without safetensors files cannot be served, by what it holds in their place."""
    if (folder / "adapter_config.json").exists():
        return (
            f"{folder} holds an adapter (adapter_config.json), no whole model; "
            "merge it into its base with peft's merge_and_unload, and save that"
        )
    for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf"):
        other = next(iter(sorted(folder.glob(pattern))), None)
        if other is not None:
            return (
                f"{folder} holds no *.safetensors file, only others such as {other.name}; "
                "load it with transformers and save it with save_pretrained"
            )
    return f"{folder} holds no *.safetensors file; {FETCH_ANEW}"
