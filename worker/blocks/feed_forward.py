"""A dense feed-forward block, its width split over attention's tp."""

import torch

from moe.linear import RowOperation
from worker.blocks.step_context import StepContext
from worker.blocks.tensor_parallel import EnteringRows, LeavingRows


class FeedForwardBlock:
    """down(activation(gate, up)), `gated` being all but the down product."""

    def __init__(self, *, enter: EnteringRows, gated: RowOperation, leave: LeavingRows) -> None:
        self._enter = enter
        self._gated = gated
        self._leave = leave

    def __call__(self, x_LH: torch.Tensor, residual: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Collective over tp: `residual` [L, H] and on top of it what the block makes of x [L, H]."""
        del context
        return self._leave(self._gated(self._enter(x_LH)), residual=residual)
