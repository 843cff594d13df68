"""Reads a rank's own slices of a checkpoint from memory-mapped safetensors files. Nothing else is read."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open

from parallel.checkpoint.weight_files import weight_files
from parallel.model_share import TensorSlice


class Weights:
    """The tensors of one rank by their name in the checkpoint, each taken out once. `unread` are left to take."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.unread = set(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor `name`, which stays: tied tensors are read twice."""
        self.unread.discard(name)
        return self._tensors[name]

    def pop(self, name: str) -> torch.Tensor:
        """The tensor `name`, which leaves, so that a packed copy does not double its memory."""
        self.unread.discard(name)
        return self._tensors.pop(name)


def load_weights(
    folder: Path,
    slices: Iterable[TensorSlice],
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[float], None],
) -> Weights:
    """Blocking: reads `slices`, padded with zeros; calls `progress` with the fraction done.

    Raises ValueError with name and both shapes where the checkpoint differs from the description.
    """
    wanted = list(slices)
    files = weight_files(folder)
    by_file: dict[Path, list[TensorSlice]] = defaultdict(list)
    for part in wanted:
        by_file[_file_of(part, files)].append(part)
    tensors: dict[str, torch.Tensor] = {}
    for file, parts in by_file.items():
        with safe_open(file, "pt") as source:
            for part in parts:
                held = torch.float32 if part.spec.in_float32 else dtype
                tensors[part.spec.name] = _read(source, part, file=file).to(dtype=held, device=device)
                progress(len(tensors) / len(wanted))
    return Weights(tensors)


def _file_of(part: TensorSlice, files: Mapping[str, Path]) -> Path:
    try:
        return files[part.spec.name]
    except KeyError:
        raise ValueError(f"the checkpoint has no tensor {part.spec.name}, which its config.json calls for") from None


def _read(source: safe_open, part: TensorSlice, *, file: Path) -> torch.Tensor:
    stored = source.get_slice(part.spec.name)
    if tuple(stored.get_shape()) != part.spec.shape:
        raise ValueError(
            f"{file.name} has {part.spec.name} of shape {tuple(stored.get_shape())}, its config.json asks for "
            f"{part.spec.shape}"
        )
    tensor: torch.Tensor = stored[tuple(slice(interval.start, interval.end) for interval in part.intervals)]
    missing = [interval.padded - interval.size for interval in part.intervals]
    if any(missing):
        tensor = F.pad(tensor, [amount for size in reversed(missing) for amount in (0, size)])
    return tensor
