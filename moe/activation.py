"""What an expert does with the products of its gate and up projections."""

import torch
import torch.nn.functional as F

from moe.linear import RowOperation
from parallel.models.gates import Activation


def activate(gate_NI: torch.Tensor, up_NI: torch.Tensor, activation: Activation) -> torch.Tensor:
    """[N, I] and [N, I] to [N, I], see Activation. Zeros give zeros, whatever it is: a padded width stays one."""
    if activation.limit is not None:
        gate_NI = gate_NI.clamp(max=activation.limit)
        up_NI = up_NI.clamp(-activation.limit, activation.limit)
    alpha = activation.alpha
    glu_NI = F.silu(gate_NI) if alpha == 1.0 else gate_NI * (gate_NI * alpha).sigmoid()
    return glu_NI * (up_NI + activation.up_offset if activation.up_offset else up_NI)


class Gated:
    """A product with gate and up stacked in one weight, and the activation behind it: [N, in] to [N, I]."""

    def __init__(self, gate_up: RowOperation, activation: Activation) -> None:
        self._gate_up = gate_up
        self._activation = activation

    def __call__(self, x_NH: torch.Tensor) -> torch.Tensor:
        """x [N, in] to [N, I]."""
        gate, up = self._gate_up(x_NH).chunk(2, dim=-1)
        return activate(gate, up, self._activation)
