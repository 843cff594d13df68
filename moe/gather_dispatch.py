"""Every rank of the block sees every row, and a reduce-scatter sums what the experts made of it.

It needs no counts, so its sizes are known from the plan, and for small batches one large message beats many small ones.
"""

import torch

from moe.experts import Experts
from moe.routed_rows import RoutedRows
from parallel.collectives.communicator import Communicator


class GatherDispatcher:
    """See Dispatcher: experts see B·R rows, in order of the ranks' index."""

    def __init__(self, block: Communicator) -> None:
        self._block = block

    def padded(self, num_rows: int, *, padded_rows: int) -> int:
        """Rows of all ranks travel in messages of one size."""
        del num_rows
        return padded_rows

    def run(self, rows: RoutedRows, experts: Experts, *, residual: torch.Tensor) -> torch.Tensor:
        """Collective: see Dispatcher."""
        gathered = rows.over(self._block.all_gather(rows.packed).flatten(0, 1))
        partial = experts.run(gathered)
        return residual + self._block.reduce_scatter(partial.unflatten(0, (self._block.size, -1)))[: residual.shape[0]]
