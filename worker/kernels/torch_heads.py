"""The heads of attention in torch."""

import torch
import torch.nn.functional as F

from moe.linear import Linear
from worker.kernels.interface import HeadWeights


class TorchHeads:
    """See Heads: the product, then what is done to each head."""

    def __init__(self, weights: HeadWeights, *, product: Linear) -> None:
        self._product = product
        self._sizes = (weights.num_heads, weights.num_kv_heads, weights.num_kv_heads)
        self._head_dim = weights.head_dim
        self._norms, self._eps = weights.norm_of_heads

    def __call__(
        self, x_TH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See Heads."""
        num_heads, num_kv_heads, _ = self._sizes
        heads = self._product(x_TH).view(-1, sum(self._sizes), self._head_dim)
        qk, v = heads[:, :-num_kv_heads], heads[:, -num_kv_heads:]
        if self._norms is not None:
            qk = F.rms_norm(qk, qk.shape[-1:], eps=self._eps) * self._norms
        qk = rotate(qk, cos, sin)
        return qk[:, :num_heads], qk[:, num_heads:], v


def rotate(x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See Heads."""
    size = cos.shape[-1]
    left, right, rest = x_THD.tensor_split((size, 2 * size), dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], dim=-1)
