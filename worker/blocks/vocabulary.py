"""Embedding and output: the vocabulary of one is split over attention's tp, that of the other over the output's axis.

Shapes: T rows of all tp ranks, L rows of this rank, S draws of this rank, D of the rank that has most of them, V tokens
of the vocabulary, Vp tokens of this rank's part.
"""

import torch
import torch.nn.functional as F

from moe.linear import Linear, RowOperation
from parallel.collectives.communicator import Communicator
from parallel.collectives.rows import gather_rows, reduce_scatter_rows


class Embedding:
    """Token ids to rows: each rank looks up the ids of its part, a reduce-scatter brings each row to its rank."""

    def __init__(self, weight_VpH: torch.Tensor, *, dtype: torch.dtype, tp: Communicator) -> None:
        self._weight = weight_VpH
        self._dtype = dtype
        self._tp = tp

    def __call__(self, ids_T: torch.Tensor, *, local_rows: int) -> torch.Tensor:
        """Collective over tp: ids [T] of all tp ranks to this rank's rows [L, H]."""
        if self._tp.size == 1:
            return F.embedding(ids_T, self._weight).to(self._dtype)
        size = self._weight.shape[0]
        ids = F.pad(ids_T, (0, self._tp.size * local_rows - len(ids_T))) - self._tp.index * size
        is_here = (ids >= 0) & (ids < size)
        # Selected, not multiplied: the row that stands in for another rank's may be NaN.
        rows = F.embedding(ids.clamp(0, size - 1), self._weight).masked_fill(~is_here.unsqueeze(1), 0.0)
        return reduce_scatter_rows(self._tp, rows.to(self._dtype))


class Output:
    """Rows to logits: the last norm and the product with the vocabulary."""

    def __init__(self, *, norm: RowOperation, head: Linear, group: Communicator, vocab_size: int) -> None:
        """`group` are the ranks along the output's axis."""
        self._norm = norm
        self._head = head
        self._group = group
        self._vocab_size = vocab_size

    def __call__(self, x_SH: torch.Tensor, *, padded_draws: int) -> torch.Tensor:
        """Collective over the group: x [S, H] of this rank to float32 logits [S, V]; none has more than padded_draws.

        Every part of the vocabulary is multiplied with the rows of all ranks, and goes to the rows' ranks.
        """
        assert len(x_SH) <= padded_draws, (
            f"{len(x_SH)} draws, but the plan says that no rank has more than {padded_draws}"
        )
        rows = F.pad(self._norm(x_SH), (0, 0, 0, padded_draws - len(x_SH)))
        parts = self._head(gather_rows(self._group, rows)).float()
        by_part = self._group.all_to_all(parts.unflatten(0, (self._group.size, padded_draws)))
        return by_part.transpose(0, 1).flatten(1)[: len(x_SH), : self._vocab_size]
