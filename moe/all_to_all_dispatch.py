"""A row goes only to the ranks that hold one of its slots, and its partial sums come back the same way.

```
row t   slots 3 9     ep coordinates 0 and 2     each of their moe_tp ranks gets the row once, and sends one sum back
```
It reads the counts on the host, which waits for the device: no step with it can be captured in a graph.
"""

from collections.abc import Sequence

import torch

from moe.dispatch import DispatchedRows
from moe.packing import pack_rows, unpack_rows
from parallel.collectives.communicator import Communicator


class AllToAllDispatcher:
    """See Dispatcher: N is what the others send, in order of their index. One layer at a time."""

    def __init__(
        self, block: Communicator, *, ep_ranks: Sequence[int], slots_per_rank: int, device: torch.device
    ) -> None:
        """`ep_ranks` is the ep coordinate of each rank of the block."""
        self._block = block
        self._ep_ranks = torch.tensor(ep_ranks, dtype=torch.int64, device=device)
        self._slots_per_rank = slots_per_rank
        self._rows = torch.empty(0, dtype=torch.int64)
        self._sent: Sequence[int] = ()
        self._received: Sequence[int] = ()

    def dispatch(
        self, x_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor, *, padded_rows: int
    ) -> DispatchedRows:
        """Collective; synchronises."""
        del padded_rows
        is_wanted = self._wanted_by(slots_TK)
        # Row-major over the ranks: rows of one destination follow each other, in their own order.
        ranks, self._rows = is_wanted.T.nonzero(as_tuple=True)
        counts = torch.bincount(ranks, minlength=self._block.size)
        self._sent = counts.tolist()
        self._received = self._block.all_to_all(counts).tolist()
        rows = self._rows
        packed = pack_rows(x_TH[rows], slots_TK[rows], weights_TK[rows])
        received = self._block.all_to_all_uneven(packed, sent=self._sent, received=self._received)
        return unpack_rows(received, like=x_TH, top_k=slots_TK.shape[1])

    def combine(self, partial_NH: torch.Tensor, *, num_rows: int) -> torch.Tensor:
        """Collective: see Dispatcher."""
        sums = self._block.all_to_all_uneven(partial_NH, sent=self._received, received=self._sent)
        out = partial_NH.new_zeros((num_rows, partial_NH.shape[1]))
        # One rank after the other: within one a row comes once, so the order of addition is that of the index.
        for part, rows in zip(sums.split(list(self._sent)), self._rows.split(list(self._sent)), strict=True):
            out.index_add_(0, rows, part)
        return out

    def _wanted_by(self, slots_TK: torch.Tensor) -> torch.Tensor:
        """bool [T, B]: whether rank b of the block holds a slot of row t."""
        return (slots_TK.div(self._slots_per_rank, rounding_mode="floor").unsqueeze(2) == self._ep_ranks).any(1)
