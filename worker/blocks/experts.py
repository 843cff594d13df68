"""A block of experts: the gate on the rank's own rows, then to the experts inside the block of ranks, and back."""

import torch

from moe.dispatchers import Dispatchers
from moe.experts import Experts
from moe.gate import Gate
from worker.blocks.step_context import StepContext


class ExpertBlock:
    """Takes rows as they are, whatever the attention mesh; ranks without rows step with the same sizes."""

    def __init__(self, *, gate: Gate, dispatchers: Dispatchers, experts: Experts) -> None:
        self._gate = gate
        self._dispatchers = dispatchers
        self._experts = experts

    def __call__(self, x_TH: torch.Tensor, residual: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Collective over the block: `residual` [T, H] and on top of it what the block makes of x [T, H]."""
        dispatcher = self._dispatchers.choose(padded_rows=context.padded_rows)
        rows = self._gate(
            x_TH,
            first_row=self._dispatchers.index * context.padded_rows,
            padded_rows=dispatcher.padded(x_TH.shape[0], padded_rows=context.padded_rows),
        )
        return dispatcher.run(rows, self._experts, residual=residual)
