"""Passed queries: every coordinate attends with all rows over its own pages, and the partial results go home.

For few new tokens over a long cache, decode above all: queries and results are small, the KV stays where it is
(pass-Q of arXiv 2411.01783; the same idea in decode as Helix parallelism, arXiv 2507.07120).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from attention.exchange_choice import ExchangePolicy
from attention.exchange_chunk import ExchangeChunk, rows_seeing
from attention.interface import AttentionBackend, AttentionRows
from parallel.collectives.communicator import Communicator


class PassQ:
    """See Exchange. Rows are padded to the coordinate that has most of them, R."""

    def __init__(
        self,
        chunks: Sequence[ExchangeChunk],
        *,
        group: Communicator,
        backend: AttentionBackend,
        policy: ExchangePolicy,
        device: torch.device,
    ) -> None:
        del device
        self._group = group
        self._backend = backend
        counts = [sum(chunk.rows_of(coordinate) for chunk in chunks) for coordinate in range(group.size)]
        self._padded = max(counts)
        rows = []
        for coordinate, count in enumerate(counts):
            rows += [
                rows_seeing(chunk, segment, coordinate=group.index, page_size=policy.page_size)
                for chunk in chunks
                for segment in chunk.segments_of(coordinate)
            ]
            rows.append(AttentionRows(num_rows=self._padded - count, kv_len=0, page_table=(), causal=False))
        self._plan = backend.plan(rows)

    def attend(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """See Exchange."""
        padded = F.pad(q, (0, 0, 0, 0, 0, self._padded - len(q)))
        everyone = self._group.all_gather(padded).flatten(0, 1)
        outputs, lses = self._plan.run_with_lse(everyone, kv)
        outputs, lses = self._send_home(outputs), self._send_home(lses)
        return self._backend.merge(outputs, lses)[0][: len(q)]

    def _send_home(self, partial: torch.Tensor) -> torch.Tensor:
        """Collective: [cp · R, ...] of this rank's pages to [cp, R, ...] of this rank's rows."""
        return self._group.all_to_all(partial.unflatten(0, (self._group.size, self._padded)))
