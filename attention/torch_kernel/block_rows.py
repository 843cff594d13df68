"""Long runs of query rows of one sequence on the torch backend: a prompt's chunk.

    keys      0 .............. b ....... e .............. kv_len
    rows      [   all see     |  square  ]                         one query block, its own keys are [b, e)

The kernel masks from the top left, so a block is a full pass over the keys before it and a causal square over its own,
merged by log-sum-exp. With a window a block is one masked pass over the keys that any of its rows sees. The matrix of
scores is never whole in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from attention.interface import AttentionRows, AttentionSpec, PageTables
from attention.layer_memory import LayerMemory
from attention.merging import merge_pair
from attention.plane_rows import PlaneRows
from attention.torch_kernel.dense import State, attend, attend_plain
from attention.torch_kernel.scratch import Scratch
from parallel.storage import PlaneView

QUERY_BLOCK = 256
"""Rows of one square: the fused kernel works on a whole square although half is masked, and 256 of 512 rows took
8 to 20% less time than one square of 512; 128 lost that again on long contexts."""


@dataclass(frozen=True, kw_only=True)
class BlockRows:
    """One entry of a plan: rows [start, start + num_rows) of q over the pages that its planes' rows address."""

    start: int
    num_rows: int
    kv_len: int
    causal: bool
    spec: AttentionSpec
    planes: dict[str, tuple[PlaneRows, torch.Tensor]]
    """By name the key's plane and the value's, with their rows (int64, on the device)."""

    def run_into(
        self,
        q: torch.Tensor,
        layer: LayerMemory,
        *,
        output: torch.Tensor,
        lse: torch.Tensor | None,
        scratch: Scratch,
    ) -> None:
        """Writes its rows of output [T, Hq, Dv] and, where given, of lse [T, Hq]."""
        heads = self.spec.num_kv_heads
        k, v = self._gather(layer, scratch=scratch)
        q_heads, output_heads = _by_kv_head(q, heads), _by_kv_head(output, heads)
        for first in range(0, self.num_rows, QUERY_BLOCK):
            rows = slice(self.start + first, self.start + min(first + QUERY_BLOCK, self.num_rows))
            block = q_heads[rows].permute(1, 2, 0, 3)
            part, part_lse = self._attend_block(block, k, v, first=first, scale=layer.scale)
            output_heads[rows] = part.permute(2, 0, 1, 3)
            if lse is not None:
                lse[rows] = part_lse.permute(2, 0, 1).flatten(1)

    def _gather(self, layer: LayerMemory, *, scratch: Scratch) -> tuple[torch.Tensor, torch.Tensor]:
        """K [Hkv, kv_len, Dk] and V [Hkv, kv_len, Dv]."""
        sizes = [len(index) * rows.row_elements for rows, index in self.planes.values()]
        parts = scratch.take((sum(sizes),)).split(sizes)
        gathered = {}
        for (name, (rows, index)), part in zip(self.planes.items(), parts, strict=True):
            torch.index_select(layer.runs[name], 0, index, out=part.view(len(index), rows.row_elements))
            gathered[name] = part.view(rows.plane.num_heads, -1, rows.plane.elements)[:, : self.kv_len]

        def view(of: PlaneView) -> torch.Tensor:
            part: torch.Tensor = gathered[of.plane].narrow(2, of.offset, of.width)
            return part

        return view(self.spec.key), view(self.spec.value)

    def _attend_block(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, first: int, scale: float) -> State:
        if not self.causal:
            return attend(q, k, v, scale=scale, causal=False)
        begin = self.kv_len - self.num_rows + first
        if self.spec.window:
            return self._attend_window(q, k, v, begin=begin, scale=scale)
        own = slice(begin, begin + q.shape[2])
        square = attend(q, k[:, own], v[:, own], scale=scale, causal=True)
        if begin == 0:
            return square
        return merge_pair(square, attend(q, k[:, :begin], v[:, :begin], scale=scale, causal=False))

    def _attend_window(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, begin: int, scale: float) -> State:
        """Rows that stand at the keys from `begin` on, each over the last `window` keys up to its own."""
        first = max(begin + 1 - self.spec.window, 0)
        seen = slice(first, begin + q.shape[2])
        own = torch.arange(begin, begin + q.shape[2], device=q.device).unsqueeze(1)
        keys = torch.arange(seen.start, seen.stop, device=q.device)
        hidden = (keys > own) | (keys <= own - self.spec.window)
        return attend_plain(q, k[:, seen], v[:, seen], scale=scale, hidden=hidden)


def _by_kv_head(heads: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[T, Hq, D] as a view [T, Hkv, G, D]."""
    return heads.view(heads.shape[0], num_kv_heads, -1, heads.shape[2])


def plan_block_rows(
    tables: PageTables, rows: AttentionRows, *, starts: Sequence[int], spec: AttentionSpec
) -> list[BlockRows]:
    """Plans entries with at least one row and one key each; `starts` are their first rows in q."""
    return [_plan_entry(tables, rows, place, start=start, spec=spec) for place, start in enumerate(starts)]


def _plan_entry(tables: PageTables, rows: AttentionRows, place: int, *, start: int, spec: AttentionSpec) -> BlockRows:
    kv_len, first_page = int(rows.kv_len[place]), int(rows.first_page[place])
    pages = tables.host[rows.table_row[place], first_page : first_page - (-kv_len // spec.page_size)].astype(np.int64)
    planes = {}
    for name in dict.fromkeys((spec.key.plane, spec.value.plane)):
        plane = PlaneRows(spec.page.plane(name), spec.page)
        planes[name] = (plane, torch.from_numpy(plane.index(pages[None])).to(spec.device, non_blocking=True))
    return BlockRows(
        start=start,
        num_rows=int(rows.num_rows[place]),
        kv_len=kv_len,
        causal=bool(rows.causal[place]),
        spec=spec,
        planes=planes,
    )
