"""How queries meet the KV that other cp ranks hold: planned once a step from what every cp rank knows.

Where nothing is to be seen elsewhere rows attend at home; else one of three strategies behind one contract: gathered
KV, KV in a ring, passed queries. A step's chunks run grouped by strategy in one order that all ranks share, and each
strategy works on its own chunks' rows: it writes their K and V, attends, and gives the result to who computes the row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from attention.exchange.choice import Strategy
from attention.exchange.gather_kv import GatherKv
from attention.exchange.local_rows import LocalRows
from attention.exchange.member import CpMember
from attention.exchange.pass_q import PassQ
from attention.exchange.ring_kv import RingKv
from attention.exchange.rows import ExchangeRows
from attention.layer_memory import LayerMemory
from parallel.arrays import Bools

State = tuple[torch.Tensor, torch.Tensor | None]
"""An output [T, Hq, Dv] and, where asked, the natural log-sum-exp [T, Hq]."""


class Exchange(Protocol):
    """Attention of one step over the KV of all cp ranks."""

    def attend(self, q: torch.Tensor, planes: Sequence[torch.Tensor], layer: LayerMemory, *, with_lse: bool) -> State:
        """Collective over cp: q [T, Hq, Dk] of the rows that this rank computes, over each rank's memory of a layer,
        into which what the step stores, of each plane [T, heads, elements], is written.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One strategy's rows of q: int64, on the device."""

    rows: torch.Tensor
    exchange: Exchange


class MixedExchange:
    """Several strategies, one after the other. Rows of none of them are padding: zeros, and -inf."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = parts

    def attend(self, q: torch.Tensor, planes: Sequence[torch.Tensor], layer: LayerMemory, *, with_lse: bool) -> State:
        """See Exchange."""
        output = q.new_zeros((*q.shape[:2], layer.value.shape[3]))
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32) if with_lse else None
        for part in self._parts:
            own_planes = [plane[part.rows] for plane in planes]
            state = part.exchange.attend(q[part.rows], own_planes, layer, with_lse=with_lse)
            output[part.rows] = state[0]
            if lse is not None and state[1] is not None:
                lse[part.rows] = state[1]
        return output, lse


@dataclass(frozen=True, kw_only=True)
class PaddedExchange:
    """One strategy for the first `num_rows` rows; those behind them are padding."""

    exchange: Exchange
    num_rows: int

    def attend(self, q: torch.Tensor, planes: Sequence[torch.Tensor], layer: LayerMemory, *, with_lse: bool) -> State:
        """See Exchange."""
        padding = len(q) - self.num_rows
        own_planes = [plane[: self.num_rows] for plane in planes]
        output, lse = self.exchange.attend(q[: self.num_rows], own_planes, layer, with_lse=with_lse)
        output = F.pad(output, (0, 0, 0, 0, 0, padding))
        return output, None if lse is None else F.pad(lse, (0, 0, 0, padding), value=-torch.inf)


class _Maker(Protocol):
    """The constructor of a strategy."""

    def __call__(self, rows: ExchangeRows, *, member: CpMember) -> Exchange: ...


_MAKERS: dict[Strategy, _Maker] = {
    Strategy.LOCAL: LocalRows,
    Strategy.GATHER: GatherKv,
    Strategy.RING: RingKv,
    Strategy.PASS_Q: PassQ,
}


def plan_exchange(rows: ExchangeRows, *, member: CpMember) -> Exchange:
    """The exchange of one step. Every cp rank gives the same segments, and after them its own padding: rows that see
    nothing but the rank's spare page.
    """
    parts = _without_padding(list(member.policy.parts(rows)), rows)
    made = [_MAKERS[strategy](rows.take(index), member=member) for strategy, index in parts]
    places = [rows.row_places(index, cp_rank=member.group.index) for _, index in parts]
    if len(made) > 1:
        on_device = [torch.from_numpy(place).to(member.device, non_blocking=True) for place in places]
        return MixedExchange([_Part(rows=place, exchange=part) for place, part in zip(on_device, made, strict=True)])
    if len(made) == 1 and len(places[0]) < rows.rows_of(member.group.index):
        return PaddedExchange(exchange=made[0], num_rows=len(places[0]))
    return made[0] if made else MixedExchange([])


def _without_padding(parts: list[tuple[Strategy, Bools]], rows: ExchangeRows) -> list[tuple[Strategy, Bools]]:
    """The parts but for one that is padding alone, where there are others: it would take a kernel of its own."""
    is_real = np.arange(len(rows.chunk)) < len(rows.chunk) - rows.padding
    return [part for part in parts if len(parts) == 1 or (part[1] & is_real).any()]
