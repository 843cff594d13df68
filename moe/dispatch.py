"""The contract of a dispatcher: it takes a rank's rows to the slots they chose, inside one block of ep x moe_tp ranks,
and brings the sums back.

Shapes: T rows of this rank, R rows a rank after padding (the same on all ranks of the block, known from the step),
B ranks of the block, H hidden size, k slots a row.
"""

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, kw_only=True)
class DispatchedRows:
    """Rows for this rank's experts: x [N, H], slots [N, k] (int64, NO_SLOT on padding), weights [N, k] float32."""

    x: torch.Tensor
    slots: torch.Tensor
    weights: torch.Tensor


#: The slot of a row that only pads.
NO_SLOT = -1


class Dispatcher(Protocol):
    """Collective over a block: every rank calls dispatch, then combine, once a layer, with the same padded size."""

    def dispatch(
        self, x_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor, *, padded_rows: int
    ) -> DispatchedRows:
        """Collective: the rows that may need this rank's experts."""
        ...

    def combine(self, partial_NH: torch.Tensor, *, num_rows: int) -> torch.Tensor:
        """Collective: the sums [num_rows, H] of this rank's own rows, over the block's ranks in order of index."""
        ...


class LocalDispatcher:
    """The block of one rank: every expert is here."""

    def dispatch(
        self, x_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor, *, padded_rows: int
    ) -> DispatchedRows:
        """The rows as they are, without padding."""
        del padded_rows
        return DispatchedRows(x=x_TH, slots=slots_TK, weights=weights_TK)

    def combine(self, partial_NH: torch.Tensor, *, num_rows: int) -> torch.Tensor:
        """The sums as they are."""
        del num_rows
        return partial_NH
