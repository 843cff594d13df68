"""Attention over paged KV in torch: the backend for ranks on a CPU, and a reference on any other device.

Entries of a few rows go through `short_rows` in padded batches, longer ones one by one through `block_rows`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attention.block_rows import BlockRows, plan_block_rows
from attention.broken_rows import mark_broken
from attention.interface import AttentionRows, AttentionSpec, KvWrite
from attention.merging import merge_partials
from attention.rows import check_rows, row_starts
from attention.scratch import Scratch
from attention.short_rows import MAX_SHORT_ROWS, ShortRows, plan_short_rows


@dataclass(frozen=True, kw_only=True)
class TorchAttentionPlan:
    """One step's attention. Plans of one backend share its scratch, so they run one at a time, on one thread."""

    num_rows: int
    every_row_sees: bool
    short_rows: ShortRows | None
    blocks: Sequence[BlockRows]
    scale: float
    scratch: Scratch

    def run(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """See `AttentionPlan.run`."""
        return self._run(q, kv, with_lse=False)[0]

    def run_with_lse(self, q: torch.Tensor, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttentionPlan.run_with_lse`."""
        output, lse = self._run(q, kv, with_lse=True)
        assert lse is not None
        return output, lse

    def _run(self, q: torch.Tensor, kv: torch.Tensor, *, with_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert q.shape[0] == self.num_rows, f"planned for {self.num_rows} query rows, given {q.shape[0]}"
        if self.short_rows is not None and self.short_rows.order is None:
            return self.short_rows.run(q, kv, scale=self.scale, with_lse=with_lse)
        output = q.new_empty(q.shape) if self.every_row_sees else q.new_zeros(q.shape)
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32) if with_lse else None
        if self.short_rows is not None:
            self.short_rows.run_into(q, kv, output=output, lse=lse, scale=self.scale)
        for block in self.blocks:
            block.run_into(q, kv, output=output, lse=lse, scale=self.scale, scratch=self.scratch)
        return output, lse


class TorchAttentionBackend:
    """See `AttentionBackend`. Computes in float32 (float64 for float64), whatever the dtype of the memory."""

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec
        self._scratch = Scratch(dtype=spec.dtype, device=spec.device)

    def plan(self, rows: Sequence[AttentionRows]) -> TorchAttentionPlan:
        """See `AttentionBackend.plan`. Raises ValueError where an entry contradicts itself."""
        check_rows(rows, page_size=self._spec.page_size)
        starts = row_starts(rows)
        seeing = [(start, entry) for start, entry in zip(starts, rows, strict=False) if entry.num_rows and entry.kv_len]
        short = [(start, entry) for start, entry in seeing if entry.num_rows <= MAX_SHORT_ROWS]
        return TorchAttentionPlan(
            num_rows=starts[-1],
            every_row_sees=sum(entry.num_rows for _, entry in seeing) == starts[-1],
            short_rows=self._plan_short(short, total_rows=starts[-1]),
            blocks=[
                plan_block_rows(entry, start=start, spec=self._spec)
                for start, entry in seeing
                if entry.num_rows > MAX_SHORT_ROWS
            ],
            scale=self._spec.scale,
            scratch=self._scratch,
        )

    def _plan_short(self, short: Sequence[tuple[int, AttentionRows]], *, total_rows: int) -> ShortRows | None:
        if not short:
            return None
        return plan_short_rows(short, total_rows=total_rows, spec=self._spec, scratch=self._scratch)

    def write(self, kv: torch.Tensor, k: torch.Tensor, v: torch.Tensor, where: KvWrite) -> None:
        """See `AttentionBackend.write`. Synchronises."""
        # One pass over each tells that all is well, as it nearly always is.
        if not math.isfinite(k.sum(dtype=torch.float32).item() + v.sum(dtype=torch.float32).item()):
            k, v = mark_broken(k, v)
        # K's heads and V's are neighbours in memory, so one indexed assignment takes both.
        kv.flatten(1, 2)[where.pages, :, where.offsets] = torch.cat((k, v), dim=1)

    def merge(self, outputs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttentionBackend.merge`."""
        return merge_partials(outputs, lses)
