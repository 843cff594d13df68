"""An attention block: rows in, rows out; inside, this rank's own heads over the pages of all cp ranks."""

from dataclasses import dataclass

import torch

from attention.layer_memory import LayerMemory
from parallel.models.description import RopeSpec
from worker.blocks.step_context import StepContext
from worker.blocks.tensor_parallel import EnteringRows, LeavingRows
from worker.kernels.interface import Heads


@dataclass(frozen=True, kw_only=True)
class AttentionLayer:
    """One layer's attention on a rank: its rope, its cache group and its memory there.

    `sinks_H` [Hq], where there are any: a score of each head that takes its share of the weight and gives nothing.
    """

    rope: RopeSpec
    group: str
    memory: LayerMemory
    sinks_H: torch.Tensor | None = None


class AttentionBlock:
    """Grouped-query attention with rotary embedding."""

    def __init__(self, *, enter: EnteringRows, heads: Heads, layer: AttentionLayer, leave: LeavingRows) -> None:
        self._enter = enter
        self._heads = heads
        self._layer = layer
        self._leave = leave

    def __call__(self, x_LH: torch.Tensor, residual: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Collective over tp and cp: `residual` [L, H] and on top of it what the block makes of x [L, H]."""
        layer = self._layer
        q, k, v = self._heads(self._enter(x_LH), *context.rotations[layer.rope])
        attended, lse = context.exchanges[layer.group].attend(
            q, (k, v), layer.memory, with_lse=layer.sinks_H is not None
        )
        if layer.sinks_H is not None and lse is not None:
            attended = with_sinks(attended, lse, layer.sinks_H)
        return self._leave(attended.flatten(1), residual=residual)


def with_sinks(attended_THD: torch.Tensor, lse_TH: torch.Tensor, sinks_H: torch.Tensor) -> torch.Tensor:
    """Attention with one more score, `sinks_H`, in each head's softmax that has no value: once, after all is merged."""
    return attended_THD * torch.sigmoid(lse_TH - sinks_H).to(attended_THD.dtype).unsqueeze(-1)
