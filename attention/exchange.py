"""How queries meet the KV that other cp coordinates hold: planned once a step from what every cp rank knows.

Three strategies behind one contract: gathered KV, KV in a ring, passed queries. A step's chunks run grouped by strategy
in one order that all ranks share, and each strategy works on its own chunks' rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from attention.exchange_choice import ExchangePolicy, Strategy
from attention.exchange_chunk import ExchangeChunk, rows_seeing
from attention.gather_kv import GatherKv
from attention.interface import AttentionBackend
from attention.pass_q import PassQ
from attention.ring_kv import RingKv
from parallel.collectives.communicator import Communicator


class Exchange(Protocol):
    """Attention of one step over the KV of all cp coordinates."""

    def attend(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """Collective over cp: q [T, Hq, D] of this coordinate's rows over each rank's layer memory kv
        `[N, 2, Hkv, P, D]`, into which the step's K and V were written; returns [T, Hq, D].
        """
        ...


class LocalExchange:
    """The group of one coordinate: it holds every page."""

    def __init__(self, chunks: Sequence[ExchangeChunk], *, backend: AttentionBackend, page_size: int) -> None:
        self._plan = backend.plan(
            [
                rows_seeing(chunk, segment, coordinate=0, page_size=page_size)
                for chunk in chunks
                for segment in chunk.segments
            ]
        )

    def attend(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """See Exchange."""
        return self._plan.run(q, kv)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One strategy's rows of q, all of them where `rows` is None."""

    rows: torch.Tensor | None
    exchange: Exchange


class MixedExchange:
    """Several strategies, one after the other."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = parts

    def attend(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """See Exchange."""
        output = torch.empty_like(q)
        for part in self._parts:
            if part.rows is None:
                return part.exchange.attend(q, kv)
            output[part.rows] = part.exchange.attend(q[part.rows], kv)
        return output


_MAKERS: dict[Strategy, Callable[..., Exchange]] = {
    Strategy.GATHER: GatherKv,
    Strategy.RING: RingKv,
    Strategy.PASS_Q: PassQ,
}


def plan_exchange(
    chunks: Sequence[ExchangeChunk],
    *,
    group: Communicator,
    backend: AttentionBackend,
    policy: ExchangePolicy,
    device: torch.device,
) -> Exchange:
    """The exchange of one step whose rows follow each other by chunk, then by segment; every cp rank plans the same."""
    if group.size == 1:
        return LocalExchange(chunks, backend=backend, page_size=policy.page_size)
    chosen = policy.choose(chunks, cp=group.size)
    parts = []
    for strategy, maker in _MAKERS.items():
        own = [chunk for chunk, choice in zip(chunks, chosen, strict=True) if choice is strategy]
        if own:
            rows = None if len(own) == len(chunks) else _rows(chunks, chosen, strategy, group=group, device=device)
            exchange = maker(own, group=group, backend=backend, policy=policy, device=device)
            parts.append(_Part(rows=rows, exchange=exchange))
    return MixedExchange(parts)


def _rows(
    chunks: Sequence[ExchangeChunk],
    chosen: Sequence[Strategy],
    strategy: Strategy,
    *,
    group: Communicator,
    device: torch.device,
) -> torch.Tensor:
    """Where in this coordinate's q the rows of the chunks with `strategy` stand: int64."""
    found, first = [], 0
    for chunk, choice in zip(chunks, chosen, strict=True):
        count = chunk.rows_of(group.index)
        if choice is strategy:
            found.append(torch.arange(first, first + count))
        first += count
    return torch.cat(found).to(device)
