"""The weight files of a checkpoint, and a rank's slice of a tensor out of them, whatever form it is stored in."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from parallel.checkpoint.weight_files import weight_files
from parallel.model_share import TensorSlice
from parallel.models.file_tensors import MXFP4_BLOCK, FileTensor, StackForm
from parallel.sharding import Interval
from worker.mxfp4 import widen_mxfp4

#: Dtypes of weights, by their names in the files.
_HELD_AS_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class TensorFiles:
    """The files in `folder`, each opened when first needed, all closed when the `with` block ends."""

    def __init__(self, folder: Path) -> None:
        self._file_of: Mapping[str, Path] = weight_files(folder)
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def file_of(self, part: TensorSlice) -> Path:
        """The file that holds it, or of its parts the first; ValueError where none does."""
        return self._find(part.spec.in_files[0].name)

    def read(self, part: TensorSlice, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The elements of `part` that exist, in `dtype` on `device`.

        Blocking. ValueError with name and both shapes where the checkpoint differs from the description.
        """
        spec = part.spec
        first, *others = map(self._stored, spec.in_files)
        place = tuple(slice(interval.start, interval.end) for interval in part.intervals)
        tensor: torch.Tensor
        if spec.stack is None:
            tensor = first[place]
        elif spec.stack.form is StackForm.AS_IS:
            tensor = first[(spec.expert, *place)]
        elif spec.stack.form is StackForm.TRANSPOSED:
            tensor = first[(spec.expert, *reversed(place))].t().contiguous()
        else:
            rows, columns = part.intervals
            packed = _touched_blocks(first, *others, expert=spec.expert, rows=rows, columns=columns)
            whole = widen_mxfp4(*(part.to(device) for part in packed), dtype=dtype)
            begin = columns.start % MXFP4_BLOCK
            tensor = whole[:, begin : begin + columns.size].contiguous()
        return tensor.to(dtype=dtype, device=device)

    def dtype_of(self, part: TensorSlice) -> torch.dtype | None:
        """The dtype of its elements in the file; None where the file has them in another form."""
        if part.spec.stack is not None and part.spec.stack.form is StackForm.MXFP4:
            return None
        return _HELD_AS_STORED.get(self._stored(part.spec.in_files[0]).get_dtype())

    def _find(self, name: str) -> Path:
        if name not in self._file_of:
            raise ValueError(f"the checkpoint has no tensor {name}, which its config.json calls for")
        return self._file_of[name]

    def _stored(self, wanted: FileTensor) -> Any:
        """A safetensors slice of the tensor `wanted`."""
        file = self._find(wanted.name)
        if file not in self._open:
            self._open[file] = self._stack.enter_context(safe_open(file, "pt"))
        stored = self._open[file].get_slice(wanted.name)
        if tuple(stored.get_shape()) != wanted.shape:
            raise ValueError(
                f"{file.name} has {wanted.name} of shape {tuple(stored.get_shape())}, its config.json asks for "
                f"{wanted.shape}"
            )
        return stored


def _touched_blocks(
    blocks: Any, scales: Any, *, expert: int | None, rows: Interval, columns: Interval
) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks and scales of [rows, columns] of one expert, whole: a slice may begin and end inside a block."""
    touched = slice(columns.start // MXFP4_BLOCK, -(-columns.end // MXFP4_BLOCK))
    place = (expert, slice(rows.start, rows.end), touched)
    return blocks[place], scales[place]
