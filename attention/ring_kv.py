"""KV in a ring: blocks of pages go round the coordinates, the next one under way while attention works on this one.

```
hop 1   coordinate c receives the pages of c - 1, block by block       own pages ── attend ──┐
hop 2   ...           of c - 2                                          block 1  ── attend ── merge ──┐
                                                                        block 2  (under way)  ...     merge
```
A block holds at most a third of the policy's `max_tokens`: one is worked on while one comes and one goes (ring
attention, arXiv 2310.01889; pass-KV of arXiv 2411.01783).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from attention.exchange_choice import ExchangePolicy
from attention.exchange_chunk import ExchangeChunk, rows_seeing
from attention.interface import AttentionBackend, AttentionPlan, AttentionRows
from parallel.collectives.communicator import Communicator
from parallel.exchange_memory import RING_BLOCKS


@dataclass(frozen=True, kw_only=True)
class _Block:
    """One shift: this rank's `pages` go `distance` on, `num_received` come in, on which `plan` then works."""

    distance: int
    pages: torch.Tensor
    num_received: int
    plan: AttentionPlan | None


class RingKv:
    """See Exchange."""

    def __init__(
        self,
        chunks: Sequence[ExchangeChunk],
        *,
        group: Communicator,
        backend: AttentionBackend,
        policy: ExchangePolicy,
        device: torch.device,
    ) -> None:
        self._group = group
        self._backend = backend
        self._chunks = chunks
        self._page_size = policy.page_size
        own = [
            rows_seeing(chunk, segment, coordinate=group.index, page_size=policy.page_size)
            for chunk in chunks
            for segment in chunk.segments_of(group.index)
        ]
        self._own = backend.plan(own)
        block_pages = max(policy.max_tokens // (RING_BLOCKS * policy.page_size), 1)
        self._blocks = list(self._plan_blocks(block_pages, device=device))

    def attend(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """See Exchange."""
        following = self._begin(0, kv)
        output, lse = self._own.run_with_lse(q, kv)
        for index, block in enumerate(self._blocks):
            received = following()
            following = self._begin(index + 1, kv)
            if block.plan is not None:
                part, part_lse = block.plan.run_with_lse(q, received)
                output, lse = self._backend.merge(torch.stack([output, part]), torch.stack([lse, part_lse]))
        return output

    def _begin(self, index: int, kv: torch.Tensor) -> Callable[[], torch.Tensor]:
        if index == len(self._blocks):
            return lambda: kv
        block = self._blocks[index]
        received = kv.new_empty((block.num_received, *kv.shape[1:]))
        return self._group.begin_shift(kv.index_select(0, block.pages), received, distance=block.distance)

    def _plan_blocks(self, block_pages: int, *, device: torch.device) -> Iterator[_Block]:
        cp, index = self._group.size, self._group.index
        pages = [
            [page for chunk in self._chunks for page in chunk.pages_of(coordinate, page_size=self._page_size)]
            for coordinate in range(cp)
        ]
        for distance in range(1, cp):
            source = (index - distance) % cp
            for first in range(0, max(map(len, pages)), block_pages):
                own = pages[index][first : first + block_pages]
                num_received = len(pages[source][first : first + block_pages])
                yield _Block(
                    distance=distance,
                    pages=torch.tensor(own, dtype=torch.int64, device=device),
                    num_received=num_received,
                    plan=self._plan_block(source, first=first, end=first + num_received),
                )

    def _plan_block(self, source: int, *, first: int, end: int) -> AttentionPlan | None:
        """Attention over the pages [first, end) of what `source` contributes; None where no row sees any of them."""
        rows, base = [], 0
        for chunk in self._chunks:
            for segment in chunk.segments_of(self._group.index):
                whole = rows_seeing(chunk, segment, coordinate=source, page_size=self._page_size)
                seen = range(max(base, first) - first, min(base + len(whole.page_table), end) - first)
                rows.append(
                    AttentionRows(
                        num_rows=whole.num_rows,
                        kv_len=len(seen) * self._page_size,
                        page_table=seen,
                        causal=False,
                    )
                )
            base += len(chunk.pages_of(source, page_size=self._page_size))
        return self._backend.plan(rows) if any(row.kv_len and row.num_rows for row in rows) else None
