"""New K and V of rows that another cp rank stores, as bytes in a message that goes there anyway."""

from collections.abc import Sequence

import torch

from attention.dtypes import TORCH_DTYPES
from parallel.storage import PageLayout


class RowPacking:
    """The planes of a group, row by row: `row_bytes` each."""

    def __init__(self, page: PageLayout) -> None:
        self._planes = page.planes
        self.row_bytes = sum(plane.num_heads * plane.run_bytes for plane in page.planes)

    def pack(self, planes: Sequence[torch.Tensor], index: torch.Tensor, *, rows: int) -> torch.Tensor:
        """The rows at `index` of each plane [T, heads, elements] as uint8 [rows, row_bytes]; those beyond are zeros."""
        parts = [plane.index_select(0, index).flatten(1).contiguous().view(torch.uint8) for plane in planes]
        out = parts[0].new_zeros((rows, self.row_bytes))
        torch.cat(parts, dim=1, out=out[: len(index)])
        return out

    def unpack(self, packed: torch.Tensor) -> list[torch.Tensor]:
        """uint8 [n, row_bytes] to each plane [n, heads, elements]."""
        sizes = [plane.num_heads * plane.run_bytes for plane in self._planes]
        return [
            # Copied: of a single row a slice counts as contiguous wherever it begins.
            part.clone(memory_format=torch.contiguous_format)
            .view(TORCH_DTYPES[plane.dtype])
            .view(len(packed), plane.num_heads, plane.elements)
            for plane, part in zip(self._planes, packed.split(sizes, dim=1), strict=True)
        ]
