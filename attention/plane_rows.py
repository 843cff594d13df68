"""Gathering a plane's positions out of pages in torch: as rows of contiguous elements, whatever the strides are.

```
head-major      one row is a head's P positions of a page          position-major      one row is one position
```
Row numbers count from the memory's begin in the largest unit that all strides share; rows may overlap in that count.
"""

from dataclasses import dataclass
from functools import cached_property
from math import gcd

import numpy as np
import torch

from attention.dtypes import TORCH_DTYPES
from parallel.arrays import Ints
from parallel.storage import PageLayout, PlaneLayout


@dataclass(frozen=True)
class PlaneRows:
    """How the plane `plane` of pages of `page` is gathered."""

    plane: PlaneLayout
    page: PageLayout

    @property
    def row_elements(self) -> int:
        """Contiguous elements of one row."""
        return self._row_positions * self.plane.elements

    def rows_of(self, num_pages: int) -> int:
        """Rows that `num_pages` pages take."""
        return num_pages * self.plane.num_heads * (self.page.page_size // self._row_positions)

    def index(self, tables: Ints) -> Ints:
        """The rows of the pages `tables` [B, n]: flat, in the order [B, heads, n, position]."""
        plane, unit = self.plane, self._unit_bytes
        heads = np.arange(plane.num_heads, dtype=np.int64) * (plane.head_stride // unit) + plane.offset // unit
        rows = tables[:, None, :] * (self.page.page_bytes // unit) + heads[:, None]
        if self._row_positions == 1:
            rows = rows[..., None] + np.arange(self.page.page_size) * (plane.position_stride // unit)
        return rows.ravel()

    def source(self, pages: torch.Tensor) -> torch.Tensor:
        """The memory `pages` uint8 [N, page_bytes], contiguous, as [rows, row_elements] that `index` counts; a view."""
        assert pages.is_contiguous()
        typed, unit = pages.view(TORCH_DTYPES[self.plane.dtype]), self._unit_bytes // self.plane.itemsize
        count = (typed.numel() - self.row_elements) // unit + 1
        return typed.as_strided((count, self.row_elements), (unit, 1), typed.storage_offset())

    @property
    def _row_positions(self) -> int:
        is_run = self.plane.position_stride == self.plane.run_bytes
        return self.page.page_size if is_run else 1

    @cached_property
    def _unit_bytes(self) -> int:
        steps = [self.page.page_bytes, self.plane.head_stride, self.plane.offset]
        return gcd(*steps, *([self.plane.position_stride] if self._row_positions == 1 else []))
