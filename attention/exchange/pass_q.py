"""Passed queries: every cp rank attends with all rows over its own pages, and the partial results go home.

For few new tokens over a long cache, decode above all: queries and results are small, the KV stays where it is
(pass-Q of arXiv 2411.01783; the same idea in decode as Helix parallelism, arXiv 2507.07120). New K and V of a page that
another rank owns go there in the message that carries the query.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from attention.exchange.member import CpMember
from attention.exchange.own_writes import plan_foreign_rows, plan_own_writes
from attention.exchange.row_packing import RowPacking
from attention.exchange.rows import ExchangeRows
from attention.interface import AttentionRows
from attention.layer_memory import LayerMemory


class PassQ:
    """See Exchange. Rows are padded to the rank that has most of them, R."""

    def __init__(self, rows: ExchangeRows, *, member: CpMember) -> None:
        self._group = member.group
        self._backend = member.backend
        self._writes = plan_own_writes(rows, cp_rank=member.group.index, device=member.device)
        self._foreign = plan_foreign_rows(rows, cp_rank=member.group.index, device=member.device)
        self._packing = RowPacking(member.backend.spec.page)
        counts = [rows.rows_of(cp_rank) for cp_rank in range(member.group.size)]
        self._padded = max(counts)
        self._plan = member.backend.plan(rows.tables, self._entries(rows, counts))

    def _entries(self, rows: ExchangeRows, counts: Sequence[int]) -> AttentionRows:
        """Everybody's rows, rank by rank, over this rank's pages; the padding of each rank is rows that see nothing."""
        padding = np.array([self._padded - count for count in counts], dtype=np.int64)
        nothing = np.zeros_like(padding)
        seen = rows.over_pages_of(self._group.index)
        by_rank = np.concatenate([rows.computed_by, np.arange(self._group.size)]).argsort(kind="stable")
        return AttentionRows(
            table_row=np.concatenate([seen.table_row, nothing])[by_rank],
            first_page=np.concatenate([seen.first_page, nothing])[by_rank],
            num_rows=np.concatenate([seen.num_rows, padding])[by_rank],
            kv_len=np.concatenate([seen.kv_len, nothing])[by_rank],
            causal=np.concatenate([seen.causal, nothing.astype(np.bool_)])[by_rank],
        )

    def attend(
        self, q: torch.Tensor, planes: Sequence[torch.Tensor], layer: LayerMemory, *, with_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See Exchange."""
        self._writes.write(planes, layer, backend=self._backend)
        everyone = self._gather(F.pad(q, (0, 0, 0, 0, 0, self._padded - len(q))), planes, layer)
        outputs, lses = self._plan.run_with_lse(everyone, layer)
        outputs, lses = self._send_home(outputs), self._send_home(lses)
        output, lse = self._backend.merge(outputs, lses)
        return output[: len(q)], lse[: len(q)] if with_lse else None

    def _gather(self, q: torch.Tensor, planes: Sequence[torch.Tensor], layer: LayerMemory) -> torch.Tensor:
        """Collective: every rank's q [R, Hq, D] as [cp · R, Hq, D], after the rows that came with them are written."""
        if not self._foreign.most:
            return self._group.all_gather(q).flatten(0, 1)
        packed = self._packing.pack(planes, self._foreign.sent, rows=self._foreign.most)
        message = torch.cat([q.contiguous().view(-1).view(torch.uint8), packed.view(-1)])
        everyone = self._group.all_gather(message)
        queries, rows = everyone.split([message.numel() - packed.numel(), packed.numel()], dim=1)
        received = rows.reshape(-1, self._packing.row_bytes).index_select(0, self._foreign.taken)
        self._backend.write(layer, self._packing.unpack(received), self._foreign.where)
        gathered: torch.Tensor = queries.contiguous().view(q.dtype).view(-1, *q.shape[1:])
        return gathered

    def _send_home(self, partial: torch.Tensor) -> torch.Tensor:
        """Collective: [cp · R, ...] of this rank's pages to [cp, R, ...] of this rank's rows."""
        return self._group.all_to_all(partial.unflatten(0, (self._group.size, self._padded)))
