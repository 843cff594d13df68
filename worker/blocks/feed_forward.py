"""A dense feed-forward block, its width split over attention's tp."""

import torch
import torch.nn.functional as F

from moe.experts import Linear
from parallel.collectives.communicator import Communicator
from parallel.collectives.rows import gather_rows, reduce_scatter_rows
from worker.blocks.step_context import StepContext


class FeedForwardBlock:
    """down(silu(gate) * up) with gate and up stacked in one product."""

    def __init__(self, *, gate_up: Linear, down: Linear, tp: Communicator) -> None:
        self._gate_up = gate_up
        self._down = down
        self._tp = tp

    def __call__(self, x_TH: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Collective over tp: x [T, H] to this block's contribution [T, H]."""
        del context
        gate, up = self._gate_up(gather_rows(self._tp, x_TH)).chunk(2, dim=-1)
        return reduce_scatter_rows(self._tp, self._down(F.silu(gate) * up))
