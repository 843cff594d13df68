"""Every rank of the block sees every row, and a reduce-scatter sums what the experts made of it.

It needs no counts, so its sizes are known from the plan, and for small batches one large message beats many small ones.
"""

import torch
import torch.nn.functional as F

from moe.dispatch import NO_SLOT, DispatchedRows
from moe.packing import pack_rows, unpack_rows
from parallel.collectives.communicator import Communicator


class GatherDispatcher:
    """See Dispatcher: N = B·R, in order of the ranks' index."""

    def __init__(self, block: Communicator) -> None:
        self._block = block

    def dispatch(
        self, x_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor, *, padded_rows: int
    ) -> DispatchedRows:
        """Collective: all rows of the block."""
        pad = (0, 0, 0, padded_rows - len(x_TH))
        packed = pack_rows(F.pad(x_TH, pad), F.pad(slots_TK, pad, value=NO_SLOT), F.pad(weights_TK, pad))
        return unpack_rows(self._block.all_gather(packed).flatten(0, 1), like=x_TH, top_k=slots_TK.shape[1])

    def combine(self, partial_NH: torch.Tensor, *, num_rows: int) -> torch.Tensor:
        """Collective: see Dispatcher."""
        return self._block.reduce_scatter(partial_NH.unflatten(0, (self._block.size, -1)))[:num_rows]
