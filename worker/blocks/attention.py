"""An attention block: rows in, rows out; inside, this rank's own heads over the pages of all cp coordinates."""

import torch
import torch.nn.functional as F

from attention.interface import AttentionBackend, AttentionSpec
from moe.experts import Linear
from parallel.collectives.communicator import Communicator
from parallel.collectives.rows import gather_rows, reduce_scatter_rows
from worker.blocks.head_norm import QkNorm
from worker.blocks.rope import rotate
from worker.blocks.step_context import StepContext


class AttentionBlock:
    """Grouped-query attention with rotary embedding over one layer's memory kv `[N, 2, Hkv, P, D]`."""

    def __init__(
        self,
        *,
        qkv: Linear,
        output: Linear,
        qk_norm: QkNorm,
        spec: AttentionSpec,
        backend: AttentionBackend,
        kv: torch.Tensor,
        tp: Communicator,
    ) -> None:
        self._qkv = qkv
        self._output = output
        self._qk_norm = qk_norm
        self._spec = spec
        self._backend = backend
        self._kv = kv
        self._tp = tp

    def __call__(self, x_LH: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Collective over tp and cp: this rank's x [L, H] to the block's contribution [L, H]; T rows over all of tp."""
        spec, num_rows = self._spec, context.num_rows
        heads = self._qkv(gather_rows(self._tp, x_LH))[:num_rows]
        heads = heads.view(-1, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
        qk, v = heads[:, : -spec.num_kv_heads], heads[:, -spec.num_kv_heads :]
        qk = rotate(self._qk_norm(qk), context.cos, context.sin)
        self._backend.write(self._kv, qk[:, spec.num_heads :], v, context.write)
        attended = context.exchange.attend(qk[:, : spec.num_heads], self._kv).flatten(1)
        padding = self._tp.size * x_LH.shape[0] - num_rows
        return reduce_scatter_rows(self._tp, self._output(F.pad(attended, (0, 0, 0, padding))))
