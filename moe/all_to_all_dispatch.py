"""A row goes only to the ranks that hold one of its slots, and its partial sums come back the same way.

```
row t   slots 3 9     ep coordinates 0 and 2     each of their moe_tp ranks gets the row once, and sends one sum back
```
It reads the counts on the host, which waits for the device: no step with it can be captured in a graph.
"""

from collections.abc import Sequence

import torch

from moe.experts import Experts
from moe.routed_rows import RoutedRows
from parallel.collectives.communicator import Communicator


class AllToAllDispatcher:
    """See Dispatcher: experts see what the others send, in order of their index."""

    def __init__(
        self, block: Communicator, *, ep_ranks: Sequence[int], slots_per_rank: int, device: torch.device
    ) -> None:
        """`ep_ranks` is the ep coordinate of each rank of the block."""
        self._block = block
        self._ep_ranks = torch.tensor(ep_ranks, dtype=torch.int32, device=device)
        self._slots_per_rank = slots_per_rank

    def padded(self, num_rows: int, *, padded_rows: int) -> int:
        """The rows as they are: a rank sends what it has."""
        del padded_rows
        return num_rows

    def run(self, rows: RoutedRows, experts: Experts, *, residual: torch.Tensor) -> torch.Tensor:
        """Collective; synchronises. See Dispatcher."""
        # Row-major over the ranks: rows of one destination follow each other, in their own order.
        ranks, chosen = self._wanted_by(rows.slots).T.nonzero(as_tuple=True)
        counts = torch.bincount(ranks, minlength=self._block.size)
        sent: list[int] = counts.tolist()
        received: list[int] = self._block.all_to_all(counts).tolist()
        arrived = rows.over(self._block.all_to_all_uneven(rows.packed[chosen], sent=sent, received=received))
        sums = self._block.all_to_all_uneven(experts.run(arrived), sent=received, received=sent)
        out = torch.zeros_like(residual)
        # One rank after the other: within one a row comes once, so the order of addition is that of the index.
        for part, places in zip(sums.split(sent), chosen.split(sent), strict=True):
            out.index_add_(0, places, part)
        return residual + out

    def _wanted_by(self, slots_TK: torch.Tensor) -> torch.Tensor:
        """bool [T, B]: whether rank b of the block holds a slot of row t."""
        return (slots_TK.div(self._slots_per_rank, rounding_mode="floor").unsqueeze(2) == self._ep_ranks).any(1)
