"""Rows that see no other cp rank's pages: all of them where cp is 1, a short prompt's, a window that lies at home."""

from collections.abc import Sequence

import torch

from attention.exchange.member import CpMember
from attention.exchange.rows import ExchangeRows
from attention.layer_memory import LayerMemory


class LocalRows:
    """See Exchange. No collective: a cp rank without such rows does nothing."""

    def __init__(self, rows: ExchangeRows, *, member: CpMember) -> None:
        own = rows.take(rows.computed_by == member.group.index)
        self._backend = member.backend
        self._where = own.where_stored(device=member.device)
        self._plan = member.backend.plan(rows.tables, own.over_pages_of(member.group.index))

    def attend(
        self, q: torch.Tensor, planes: Sequence[torch.Tensor], layer: LayerMemory, *, with_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See Exchange."""
        self._backend.write(layer, planes, self._where)
        if with_lse:
            return self._plan.run_with_lse(q, layer)
        return self._plan.run(q, layer), None
