"""The experts of one rank in torch: rows sorted by expert, one pair of products for each expert that has rows."""

from collections.abc import Callable, Sequence

import torch

from moe.activation import activate
from parallel.models.gates import Activation

#: A product with a fixed weight: [N, in] to [N, out].
Linear = Callable[[torch.Tensor], torch.Tensor]


class TorchExperts:
    """The experts in slots first .. first + len(gate_up) - 1 of a layer: down(activation(gate, up)), weighted, summed.

    Synchronises: it reads the number of rows of each expert on the host.
    """

    def __init__(
        self, *, first: int, gate_up: Sequence[Linear], down: Sequence[Linear], activation: Activation
    ) -> None:
        self._first = first
        self._activation = activation
        self._gate_up = gate_up
        self._down = down

    def run(self, x_NH: torch.Tensor, slots_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        """The weighted sum [N, H] over this rank's experts only; zeros for a row that chose none of their slots."""
        out_NH = torch.zeros_like(x_NH)
        local = (slots_NK - self._first).flatten()
        order = torch.argsort(local, stable=True)
        num_local = len(self._gate_up)
        counts = torch.bincount(local.clamp(-1, num_local) + 1, minlength=num_local + 2).tolist()
        start = counts[0]
        for index, count in enumerate(counts[1:-1]):
            chosen = order[start : start + count]
            start += count
            if count:
                rows = chosen // slots_NK.shape[1]
                gate, up = self._gate_up[index](x_NH[rows]).chunk(2, dim=-1)
                y = self._down[index](activate(gate, up, self._activation))
                out_NH.index_add_(0, rows, y * weights_NK.flatten()[chosen].unsqueeze(1).to(y.dtype))
        return out_NH
