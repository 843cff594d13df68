"""Takes a rank's rows to the experts they chose, inside one block of ep x moe_tp ranks, and brings the sums back.

Shapes: T rows of this rank, R rows a rank after padding (the same on all ranks of the block, known from the step),
B ranks of the block, H hidden size, k experts a row.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from parallel.communicator import Communicator


@dataclass(frozen=True, kw_only=True)
class DispatchedRows:
    """Rows for this rank's experts: x [N, H], ids [N, k] (int64, NO_EXPERT on padding), weights [N, k] float32."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


#: The expert of a row that only pads.
NO_EXPERT = -1


class Dispatcher(Protocol):
    """Collective over a block: every rank calls dispatch, then combine, once a layer, with the same padded size."""

    def dispatch(
        self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, *, padded_rows: int
    ) -> DispatchedRows:
        """Collective: the rows that may need this rank's experts; N is known from padded_rows and the block."""
        ...

    def combine(self, partial_NH: torch.Tensor, *, num_rows: int) -> torch.Tensor:
        """Collective: the sums [num_rows, H] of this rank's own rows, over the block's ranks in order of index."""
        ...


class LocalDispatcher:
    """The block of one rank: every expert is here."""

    def dispatch(
        self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, *, padded_rows: int
    ) -> DispatchedRows:
        """The rows as they are, without padding."""
        del padded_rows
        return DispatchedRows(x=x_TH, ids=ids_TK, weights=weights_TK)

    def combine(self, partial_NH: torch.Tensor, *, num_rows: int) -> torch.Tensor:
        """The sums as they are."""
        del num_rows
        return partial_NH


class GatherDispatcher:
    """Every rank of the block sees every row, and a reduce-scatter sums what the experts made of it.

    It needs no counts, and for small batches one large message beats many small ones.
    """

    def __init__(self, block: Communicator) -> None:
        self._block = block

    def dispatch(
        self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, *, padded_rows: int
    ) -> DispatchedRows:
        """Collective: all rows of the block, N = B·R, in order of the ranks' index."""
        rows, hidden = x_TH.shape
        pad = padded_rows - rows
        ids_TK = torch.nn.functional.pad(ids_TK.to(torch.int32), (0, 0, 0, pad), value=NO_EXPERT)
        weights_TK = torch.nn.functional.pad(weights_TK, (0, 0, 0, pad))
        x_RH = torch.nn.functional.pad(x_TH, (0, 0, 0, pad))
        # One message for all three: a collective costs its latency whatever it carries.
        packed = torch.cat([part.contiguous().view(torch.uint8) for part in (x_RH, ids_TK, weights_TK)], dim=1)
        gathered = self._block.all_gather(packed).flatten(0, 1)
        ends = [x_RH.element_size() * hidden, 4 * ids_TK.shape[1], 4 * ids_TK.shape[1]]
        x, ids, weights = (part.contiguous() for part in gathered.split(ends, dim=1))
        return DispatchedRows(
            x=x.view(x_TH.dtype), ids=ids.view(torch.int32).long(), weights=weights.view(torch.float32)
        )

    def combine(self, partial_NH: torch.Tensor, *, num_rows: int) -> torch.Tensor:
        """Collective: see Dispatcher."""
        return self._block.reduce_scatter(partial_NH.unflatten(0, (self._block.size, -1)))[:num_rows]


def create_dispatcher(block: Communicator) -> Dispatcher:
    """The dispatcher of a block."""
    return GatherDispatcher(block) if block.size > 1 else LocalDispatcher()
