"""An attention block: rows in, rows out; inside, this rank's own heads over the pages of all cp ranks."""

from dataclasses import dataclass

import torch

from attention.layer_memory import LayerMemory
from moe.activation import Linear
from parallel.collectives.communicator import Communicator
from parallel.collectives.rows import gather_rows, reduce_scatter_rows
from parallel.models.description import RopeSpec
from worker.blocks.step_context import StepContext
from worker.kernels.interface import Kernels, RowOperation


@dataclass(frozen=True, kw_only=True)
class LayerHeads:
    """One layer's attention on a rank: its heads, its rope, its cache group and its memory there.

    `sinks_H` [Hq], where there are any: a score of each head that takes its share of the weight and gives nothing.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec
    group: str
    memory: LayerMemory
    sinks_H: torch.Tensor | None = None


class AttentionBlock:
    """Grouped-query attention with rotary embedding."""

    def __init__(
        self,
        *,
        qkv: Linear,
        output: Linear,
        qk_norm: RowOperation | None,
        kernels: Kernels,
        heads: LayerHeads,
        tp: Communicator,
    ) -> None:
        """`qk_norm` is done to the heads of q and then of k, [T, Hq + Hkv, D], before they are rotated."""
        self._qkv = qkv
        self._output = output
        self._qk_norm = qk_norm
        self._rotate = kernels.rotate
        self._heads = heads
        self._tp = tp

    def __call__(self, x_LH: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Collective over tp and cp: this rank's x [L, H] to the block's contribution [L, H]; T = tp · L rows."""
        own = self._heads
        heads = self._qkv(gather_rows(self._tp, x_LH))
        heads = heads.view(-1, own.num_heads + 2 * own.num_kv_heads, own.head_dim)
        qk, v = heads[:, : -own.num_kv_heads], heads[:, -own.num_kv_heads :]
        if self._qk_norm is not None:
            qk = self._qk_norm(qk)
        qk = self._rotate(qk, *context.rotations[own.rope])
        attended, lse = context.exchanges[own.group].attend(
            qk[:, : own.num_heads],
            (qk[:, own.num_heads :], v),
            own.memory,
            with_lse=own.sinks_H is not None,
        )
        if own.sinks_H is not None and lse is not None:
            attended = with_sinks(attended, lse, own.sinks_H)
        return reduce_scatter_rows(self._tp, self._output(attended.flatten(1)))


def with_sinks(attended_THD: torch.Tensor, lse_TH: torch.Tensor, sinks_H: torch.Tensor) -> torch.Tensor:
    """Attention with one more score, `sinks_H`, in each head's softmax that has no value: once, after all is merged."""
    return attended_THD * torch.sigmoid(lse_TH - sinks_H).to(attended_THD.dtype).unsqueeze(-1)
