"""A block of experts: the gate on the rank's own rows, dispatch inside the block of ranks, the experts, and back."""

import torch

from moe.dispatchers import Dispatchers
from moe.experts import Experts
from moe.gate import Gate
from moe.slots import SlotMap
from worker.blocks.step_context import StepContext


class ExpertBlock:
    """Takes rows as they are, whatever the attention mesh; ranks without rows step with the same sizes."""

    def __init__(
        self,
        *,
        gate: Gate,
        slots: SlotMap,
        dispatchers: Dispatchers,
        experts: Experts,
    ) -> None:
        self._gate = gate
        self._slots = slots
        self._dispatchers = dispatchers
        self._experts = experts

    def __call__(self, x_TH: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Collective over the block: x [T, H] to this block's contribution [T, H]."""
        ids, weights = self._gate(x_TH)
        padded_rows = context.padded_rows
        slots = self._slots.choose(ids, first_row=self._dispatchers.index * padded_rows)
        dispatcher = self._dispatchers.choose(padded_rows=padded_rows)
        rows = dispatcher.dispatch(x_TH, slots, weights, padded_rows=padded_rows)
        partial = self._experts.run(rows.x, rows.slots, rows.weights)
        return dispatcher.combine(partial, num_rows=x_TH.shape[0])
