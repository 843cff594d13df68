"""The contract of a dispatcher: it takes a rank's rows to the experts of the slots they chose, inside one block of
ep x moe_tp ranks, and brings the sums back.

Shapes: T rows of this rank, R rows a rank after padding (the same on all ranks of the block, known from the step),
B ranks of the block, H hidden size, k slots a row.
"""

from typing import Protocol

import torch

from moe.experts import Experts
from moe.routed_rows import RoutedRows


class Dispatcher(Protocol):
    """Collective over a block: every rank calls it once a layer, with the same padded size."""

    def padded(self, num_rows: int, *, padded_rows: int) -> int:
        """How many rows `run` takes of a rank that has `num_rows`, where the ranks pad to `padded_rows`."""
        ...

    def run(self, rows: RoutedRows, experts: Experts, *, residual: torch.Tensor) -> torch.Tensor:
        """Collective: `residual` [T, H] and on top of it what the block's experts make of this rank's rows, the first T
        of `rows`: the sums of the block's ranks are added in order of their index.
        """
        ...


class LocalDispatcher:
    """The block of one rank: every expert is here."""

    def padded(self, num_rows: int, *, padded_rows: int) -> int:
        """The rows as they are, without padding."""
        del padded_rows
        return num_rows

    def run(self, rows: RoutedRows, experts: Experts, *, residual: torch.Tensor) -> torch.Tensor:
        """See Dispatcher."""
        return experts.run(rows, plus=residual)
