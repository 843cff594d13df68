"""Attention over paged KV in torch: the backend for ranks on a CPU, and a reference on any other device.

Entries of a few rows go through `short_rows` in padded batches, longer ones one by one through `block_rows`, those with
lists of positions through `listed_rows`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attention.broken_rows import mark_broken
from attention.interface import AttentionRows, AttentionSpec, KvWrite, PageTables
from attention.layer_memory import LayerMemory
from attention.merging import merge_partials
from attention.rows import check_rows
from attention.torch_kernel.block_rows import BlockRows, plan_block_rows
from attention.torch_kernel.listed_rows import ListedRows, plan_listed_rows
from attention.torch_kernel.row_parts import part_rows
from attention.torch_kernel.scratch import Scratch
from attention.torch_kernel.short_rows import ShortRows, plan_short_rows


@dataclass(frozen=True, kw_only=True)
class TorchAttentionPlan:
    """One step's attention. Plans of one backend share its scratch, so they run one at a time, on one thread."""

    num_rows: int
    value_width: int
    every_row_sees: bool
    short_rows: ShortRows | None
    blocks: Sequence[BlockRows]
    listed: ListedRows | None
    scratch: Scratch

    def run(self, q: torch.Tensor, layer: LayerMemory, *, lists: torch.Tensor | None = None) -> torch.Tensor:
        """See `AttentionPlan.run`."""
        return self._run(q, layer, lists=lists, with_lse=False)[0]

    def run_with_lse(
        self, q: torch.Tensor, layer: LayerMemory, *, lists: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttentionPlan.run_with_lse`."""
        output, lse = self._run(q, layer, lists=lists, with_lse=True)
        assert lse is not None
        return output, lse

    def _run(
        self, q: torch.Tensor, layer: LayerMemory, *, lists: torch.Tensor | None, with_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert q.shape[0] == self.num_rows, f"planned for {self.num_rows} query rows, given {q.shape[0]}"
        if self.listed is not None:
            assert lists is not None, "planned for lists of positions, given none"
            return self.listed.run(q, layer, lists)
        if self.short_rows is not None and self.short_rows.order is None:
            return self.short_rows.run(q, layer, with_lse=with_lse)
        shape = (*q.shape[:2], self.value_width)
        output = q.new_empty(shape) if self.every_row_sees else q.new_zeros(shape)
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32) if with_lse else None
        if self.short_rows is not None:
            self.short_rows.run_into(q, layer, output=output, lse=lse)
        for block in self.blocks:
            block.run_into(q, layer, output=output, lse=lse, scratch=self.scratch)
        return output, lse


class TorchAttentionBackend:
    """See `AttentionBackend`. Computes in float32 (float64 for float64), whatever the dtype of the memory."""

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec
        self._scratch = Scratch(dtype=spec.dtype, device=spec.device)

    @property
    def spec(self) -> AttentionSpec:
        """See `AttentionBackend.spec`."""
        return self._spec

    def plan(self, tables: PageTables, rows: AttentionRows) -> TorchAttentionPlan:
        """See `AttentionBackend.plan`. Raises ValueError where an entry contradicts itself."""
        check_rows(rows, tables=tables, page_size=self._spec.page_size)
        if self._spec.listed:
            return self._plan(rows, listed=plan_listed_rows(tables, rows, spec=self._spec))
        parts, short = part_rows(rows), None
        if len(parts.short):
            short = plan_short_rows(
                tables,
                parts.short,
                starts=parts.short_starts,
                total_rows=rows.total_rows,
                spec=self._spec,
                scratch=self._scratch,
            )
        blocks = plan_block_rows(tables, parts.long, starts=parts.long_starts.tolist(), spec=self._spec)
        return self._plan(rows, every_row_sees=parts.every_row_sees, short_rows=short, blocks=blocks)

    def _plan(
        self,
        rows: AttentionRows,
        *,
        every_row_sees: bool = False,
        short_rows: ShortRows | None = None,
        blocks: Sequence[BlockRows] = (),
        listed: ListedRows | None = None,
    ) -> TorchAttentionPlan:
        return TorchAttentionPlan(
            num_rows=rows.total_rows,
            value_width=self._spec.value.width,
            every_row_sees=every_row_sees,
            short_rows=short_rows,
            blocks=blocks,
            listed=listed,
            scratch=self._scratch,
        )

    def write(self, layer: LayerMemory, planes: Sequence[torch.Tensor], where: KvWrite) -> None:
        """See `AttentionBackend.write`. Synchronises."""
        # One pass over each tells that all is well, as it nearly always is.
        if not math.isfinite(sum(plane.sum(dtype=torch.float32).item() for plane in planes)):
            planes = mark_broken(planes, self._spec)
        pages, offsets = where.as_index
        for view, plane in zip(layer.planes, planes, strict=True):
            view[pages, :, offsets] = plane

    def merge(self, outputs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttentionBackend.merge`."""
        return merge_partials(outputs, lses)
