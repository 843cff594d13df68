"""Where the new K and V of an exchange's rows go: into this rank's own pages, and to those that store the others."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from attention.exchange.rows import ExchangeRows
from attention.interface import AttentionBackend, KvWrite
from attention.layer_memory import LayerMemory


@dataclass(frozen=True, kw_only=True)
class OwnWrites:
    """The rows that this rank computes and stores itself: their places among its rows, none where those are all."""

    places: torch.Tensor | None
    where: KvWrite

    def write(self, planes: Sequence[torch.Tensor], layer: LayerMemory, *, backend: AttentionBackend) -> None:
        """Writes them out of the planes [T, heads, elements] of all rows that this rank computes."""
        rows = planes if self.places is None else [plane.index_select(0, self.places) for plane in planes]
        backend.write(layer, rows, self.where)


def plan_own_writes(rows: ExchangeRows, *, cp_rank: int, device: torch.device) -> OwnWrites:
    """Those of `rows` at `cp_rank`."""
    is_own = ~rows.is_foreign
    places = rows.row_places(is_own, cp_rank=cp_rank)
    is_all = len(places) == rows.rows_of(cp_rank)
    return OwnWrites(
        places=None if is_all else torch.from_numpy(places).to(device, non_blocking=True),
        where=rows.take(is_own & (rows.computed_by == cp_rank)).where_stored(device=device),
    )


@dataclass(frozen=True, kw_only=True)
class ForeignRows:
    """Rows whose computer and storer differ: what this rank sends of them, and what it takes out of what came.

    `sent` are places among its own rows (int64, on the device). Every rank's part of the message has room for `most`
    rows; `taken` are places among all parts' rows, and go to `where`.
    """

    most: int
    sent: torch.Tensor
    taken: torch.Tensor
    where: KvWrite


def plan_foreign_rows(rows: ExchangeRows, *, cp_rank: int, device: torch.device) -> ForeignRows:
    """The foreign rows of `rows` in a message that every cp rank sends to all: each is one row long."""
    foreign = rows.take(rows.is_foreign)
    counts = np.bincount(foreign.computed_by, minlength=rows.cp)
    most = int(counts.max(initial=0))
    # The number of a row among those of its rank: rows of a rank keep their order.
    by_rank = np.argsort(foreign.computed_by, kind="stable")
    number = np.empty(len(by_rank), dtype=np.int64)
    number[by_rank] = np.arange(len(by_rank)) - np.repeat(np.cumsum(counts) - counts, counts)
    taken = foreign.stored_by == cp_rank
    return ForeignRows(
        most=most,
        sent=torch.from_numpy(rows.row_places(rows.is_foreign, cp_rank=cp_rank)).to(device, non_blocking=True),
        taken=torch.from_numpy((foreign.computed_by * most + number)[taken]).to(device, non_blocking=True),
        where=foreign.take(taken).where_stored(device=device),
    )
