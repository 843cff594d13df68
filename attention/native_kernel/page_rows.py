"""Entries of a few query rows each, over their pages where they lie: decode, and whatever else is a few tokens long."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from attention.interface import AttentionRows, AttentionSpec, PageTables
from attention.layer_memory import LayerMemory
from native.library import ENTRY, AttentionShape, NativeLibrary, Plane
from parallel.arrays import Ints


@dataclass(frozen=True, kw_only=True)
class PageRows:
    """The entries as the library reads them, and the page numbers that they point to."""

    entries: npt.NDArray[np.void]
    pages: npt.NDArray[np.int32]
    spec: AttentionSpec
    attend: Callable[..., Any]
    num_threads: int

    def run_into(self, q: torch.Tensor, layer: LayerMemory, *, output: torch.Tensor, lse: torch.Tensor | None) -> None:
        """Writes the entries' rows of output [T, Hq, Dv] and, where given, of lse [T, Hq]."""
        assert q.dtype == torch.float32 and q.stride(2) == 1, (q.dtype, q.stride())
        self.attend(
            *(self.entries.ctypes.data, len(self.entries)),
            *(self._shape(layer.scale), _plane(layer.key), _plane(layer.value)),
            *(q.data_ptr(), q.stride(0), q.stride(1)),
            *(output.data_ptr(), None if lse is None else lse.data_ptr(), self.num_threads),
        )

    def _shape(self, scale: float) -> AttentionShape:
        spec = self.spec
        return AttentionShape(
            spec.num_heads, spec.num_kv_heads, spec.key.width, spec.value.width, spec.page_size, spec.window, scale
        )


def plan_page_rows(
    tables: PageTables,
    rows: AttentionRows,
    *,
    starts: Ints,
    spec: AttentionSpec,
    library: NativeLibrary,
) -> PageRows:
    """Plans entries with at least one row and one key each; `starts` [E] are their first rows in q."""
    counts = -(-rows.kv_len // spec.page_size)
    places = zip(rows.table_row.tolist(), rows.first_page.tolist(), counts.tolist(), strict=True)
    # A copy: the tables go on while the plan stands.
    pages = np.concatenate([tables.host[row, first : first + count] for row, first, count in places])
    entries = np.empty(len(rows), dtype=ENTRY)
    entries["first_row"], entries["num_rows"], entries["kv_len"] = starts, rows.num_rows, rows.kv_len
    entries["is_causal"] = rows.causal
    entries["pages"] = pages.ctypes.data + 4 * (np.cumsum(counts) - counts)
    return PageRows(entries=entries, pages=pages, spec=spec, attend=library.attend, num_threads=library.num_threads)


def _plane(view: torch.Tensor) -> Plane:
    """The view [N, Hkv, P, D] of a layer's keys or values."""
    page, head, position, element = view.stride()
    assert view.dtype == torch.float32 and element == 1, (view.dtype, view.stride())
    return Plane(view.data_ptr(), page, head, position)
