"""A norm over each head of q and k before they are rotated, as Qwen3 has it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

#: The heads of q and then of k, [T, Hq + Hkv, D], to the same.
QkNorm = Callable[[torch.Tensor], torch.Tensor]


def no_norm(qk_THD: torch.Tensor) -> torch.Tensor:
    """The norm of a family that has none here."""
    return qk_THD


class HeadNorm:
    """Root mean square norm over the head size; every head of q has one weight, every head of k another."""

    def __init__(
        self, *, query_D: torch.Tensor, key_D: torch.Tensor, num_heads: int, num_kv_heads: int, eps: float
    ) -> None:
        heads = [query_D.expand(num_heads, -1), key_D.expand(num_kv_heads, -1)]
        self._weight_HD = torch.cat(heads)
        self._eps = eps

    def __call__(self, qk_THD: torch.Tensor) -> torch.Tensor:
        """qk [T, Hq + Hkv, D] to the same."""
        return F.rms_norm(qk_THD, qk_THD.shape[-1:], eps=self._eps) * self._weight_HD
