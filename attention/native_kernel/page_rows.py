"""Entries of a few query rows each, over their pages where they lie: decode, and whatever else is a few tokens long."""

from dataclasses import dataclass

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
    shape: AttentionShape
    library: NativeLibrary

    def run_into(self, q: torch.Tensor, layer: LayerMemory, *, output: torch.Tensor, lse: torch.Tensor | None) -> None:
        """Writes the entries' rows of output [T, Hq, Dv] and, where given, of lse [T, Hq]."""
        row_stride, head_stride, element_stride = q.stride()
        assert q.dtype == layer.key.dtype == layer.value.dtype == torch.float32, (q.dtype, layer.key.dtype)
        assert element_stride == 1, q.stride()
        key, value = layer.key_value_places
        self.shape.scale = layer.scale
        self.library.attend(
            *(self.entries.ctypes.data, len(self.entries), self.shape, Plane(*key), Plane(*value)),
            *(q.data_ptr(), row_stride, head_stride),
            *(output.data_ptr(), None if lse is None else lse.data_ptr(), self.library.num_threads),
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
    shape = AttentionShape(
        *(spec.num_heads, spec.num_kv_heads, spec.key.width, spec.value.width, spec.page_size, spec.window, 1.0)
    )
    return PageRows(entries=entries, pages=pages, shape=shape, library=library)
