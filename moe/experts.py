"""The experts of one rank, and in torch: rows sorted by expert, one pair of products for each expert that has rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from moe.activation import Linear


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

    def run(self, x_NH: torch.Tensor, slots_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        """The weighted sum [N, H] over this rank's experts only; zeros for a row that chose none of their slots."""
        ...


class TorchExperts:
    """The experts in slots first .. first + len(gated) - 1 of a layer.

    Synchronises: it reads the number of rows of each expert on the host.
    """

    def __init__(self, *, first: int, gated: Sequence[Linear], down: Sequence[Linear]) -> None:
        self._first = first
        self._gated = gated
        self._down = down

    def run(self, x_NH: torch.Tensor, slots_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        """See Experts."""
        out_NH = torch.zeros_like(x_NH)
        local = (slots_NK - self._first).flatten()
        order = torch.argsort(local, stable=True)
        num_local = len(self._gated)
        counts = torch.bincount(local.clamp(-1, num_local) + 1, minlength=num_local + 2).tolist()
        start = counts[0]
        for index, count in enumerate(counts[1:-1]):
            chosen = order[start : start + count]
            start += count
            if count:
                rows = chosen // slots_NK.shape[1]
                y = self._down[index](self._gated[index](x_NH[rows]))
                out_NH.index_add_(0, rows, y * weights_NK.flatten()[chosen].unsqueeze(1).to(y.dtype))
        return out_NH
