"""A dense feed-forward block, its width split over attention's tp."""

import torch

from moe.activation import Linear
from parallel.collectives.communicator import Communicator
from parallel.collectives.rows import gather_rows, reduce_scatter_rows
from worker.blocks.step_context import StepContext


class FeedForwardBlock:
    """down(activation(gate, up)), `gated` being all but the down product."""

    def __init__(self, *, gated: Linear, down: Linear, tp: Communicator) -> None:
        self._gated = gated
        self._down = down
        self._tp = tp

    def __call__(self, x_TH: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Collective over tp: x [T, H] to this block's contribution [T, H]."""
        del context
        return reduce_scatter_rows(self._tp, self._down(self._gated(gather_rows(self._tp, x_TH))))
