"""The experts of one rank, and in torch: rows sorted by expert, one pair of products for each expert that has rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from moe.linear import Linear, RowOperation
from moe.routed_rows import RoutedRows


@dataclass(frozen=True, kw_only=True)
class ExpertWeights:
    """One expert's: gate and up [I, H], down [H, I]; their biases [I], [I] and [H], or none."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gate_up_biases: tuple[torch.Tensor, torch.Tensor] | None = None
    down_bias: torch.Tensor | None = None


class Experts(Protocol):
    """The experts in consecutive slots of a layer: down(activation(gate, up)), weighted, summed."""

    def run(self, rows: RoutedRows, *, plus: torch.Tensor | None = None) -> torch.Tensor:
        """The weighted sum [N, H] over this rank's experts only, zeros for a row that chose none of their slots; on top
        of `plus` [N, H] where that is given.
        """
        ...


class TorchExperts:
    """The experts in slots first .. first + len(gated) - 1 of a layer.

    Synchronises: it reads the number of rows of each expert on the host.
    """

    def __init__(self, *, first: int, gated: Sequence[RowOperation], down: Sequence[Linear]) -> None:
        self._first = first
        self._gated = gated
        self._down = down

    def run(self, rows: RoutedRows, *, plus: torch.Tensor | None = None) -> torch.Tensor:
        """See Experts."""
        x_NH, weights_NK = rows.x, rows.weights
        out_NH = torch.zeros_like(x_NH, memory_format=torch.contiguous_format)
        local = rows.slots.flatten().long() - self._first
        order = torch.argsort(local, stable=True)
        num_local = len(self._gated)
        counts = torch.bincount(local.clamp(-1, num_local) + 1, minlength=num_local + 2).tolist()
        start = counts[0]
        for index, count in enumerate(counts[1:-1]):
            chosen = order[start : start + count]
            start += count
            if count:
                of_rows = chosen // weights_NK.shape[1]
                y = self._down[index](self._gated[index](x_NH[of_rows]))
                out_NH.index_add_(0, of_rows, y * weights_NK.flatten()[chosen].unsqueeze(1).to(y.dtype))
        return out_NH if plus is None else plus + out_NH
