"""Attention over paged KV in torch: the backend for ranks on a CPU, and a reference on any other device.

Entries of a few rows go through `short_rows` in padded batches, longer ones one by one through `block_rows`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attention.block_rows import BlockRows, plan_block_rows
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
        output = self._new_output(q)
        self._run(q, kv, output=output, lse=None)
        return output

    def run_with_lse(self, q: torch.Tensor, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttentionPlan.run_with_lse`."""
        output, lse = self._new_output(q), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        self._run(q, kv, output=output, lse=lse)
        return output, lse

    def _new_output(self, q: torch.Tensor) -> torch.Tensor:
        assert q.shape[0] == self.num_rows, f"planned for {self.num_rows} query rows, given {q.shape[0]}"
        return q.new_empty(q.shape) if self.every_row_sees else q.new_zeros(q.shape)

    def _run(self, q: torch.Tensor, kv: torch.Tensor, *, output: torch.Tensor, lse: torch.Tensor | None) -> None:
        if self.short_rows is not None:
            self.short_rows.run(q, kv, scale=self.scale, scratch=self.scratch, output=output, lse=lse)
        for block in self.blocks:
            part = block.run(q, kv, output, scale=self.scale, scratch=self.scratch)
            if lse is not None:
                lse[block.start : block.start + block.num_rows] = part


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
            short_rows=plan_short_rows(short, total_rows=starts[-1], spec=self._spec) if short else None,
            blocks=[
                plan_block_rows(entry, start=start, spec=self._spec)
                for start, entry in seeing
                if entry.num_rows > MAX_SHORT_ROWS
            ],
            scale=self._spec.scale,
            scratch=self._scratch,
        )

    def write(self, kv: torch.Tensor, k: torch.Tensor, v: torch.Tensor, where: KvWrite) -> None:
        """See `AttentionBackend.write`."""
        # K's heads and V's are neighbours in memory, so one indexed assignment takes both.
        kv.flatten(1, 2)[where.pages, :, where.offsets] = torch.cat((k, v), dim=1)

    def merge(self, outputs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttentionBackend.merge`."""
        return merge_partials(outputs, lses)
