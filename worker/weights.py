"""Reads a rank's own slices of a checkpoint from memory-mapped safetensors files. Nothing else is read."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F

from parallel.model_share import TensorSlice
from worker.tensor_files import TensorFiles


class Weights:
    """The tensors of one rank by their name in the checkpoint, each taken out once. `unread` are left to take."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.unread = set(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor `name`, which stays."""
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
    matrices: torch.dtype | None = None,
    device: torch.device,
    progress: Callable[[float], None],
) -> Weights:
    """Blocking: reads `slices`, padded with zeros; calls `progress` with the fraction done.

    All in `dtype`, but where `matrices` is given, those of two dimensions and more as the files have them: what files
    pack is in `matrices` then.

    Raises ValueError with name and both shapes where the checkpoint differs from the description.
    """
    tensors: dict[str, torch.Tensor] = {}
    loaded: dict[str, TensorSlice] = {}
    with TensorFiles(folder) as files:
        # File by file; within one, in the order of the description: a tensor that another is tied to comes before it.
        wanted = sorted(slices, key=files.file_of)
        for part in wanted:
            origin = loaded.get(part.spec.tied_to)
            if origin is not None and origin.intervals == part.intervals:
                tensors[part.spec.name] = tensors[origin.spec.name]
            else:
                tensors[part.spec.name] = _read(files, part, dtype=dtype, matrices=matrices, device=device)
            loaded[part.spec.name] = part
            progress(len(tensors) / len(wanted))
    return Weights(tensors)


def _read(
    files: TensorFiles, part: TensorSlice, *, dtype: torch.dtype, matrices: torch.dtype | None, device: torch.device
) -> torch.Tensor:
    held = torch.float32 if part.spec.in_float32 else dtype
    if matrices is not None and part.is_matrix:
        held = files.dtype_of(part) or matrices
    return _padded(files.read(part, dtype=held, device=device), part)


def _padded(tensor: torch.Tensor, part: TensorSlice) -> torch.Tensor:
    """The tensor with zeros at the end of each dimension that is cut unevenly."""
    missing = [interval.padded - interval.size for interval in part.intervals]
    return F.pad(tensor, [amount for size in reversed(missing) for amount in (0, size)]) if any(missing) else tensor
