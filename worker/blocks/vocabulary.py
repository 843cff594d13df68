"""Embedding and output, whole on each rank while tp is 1."""

import torch
import torch.nn.functional as F

from moe.experts import Linear


class Embedding:
    """Token ids to rows."""

    def __init__(self, weight_VH: torch.Tensor) -> None:
        self._weight = weight_VH

    def __call__(self, ids_T: torch.Tensor) -> torch.Tensor:
        """ids [T] to rows [T, H]."""
        return F.embedding(ids_T, self._weight)


class Norm:
    """Root mean square norm (arXiv 1910.07467)."""

    def __init__(self, weight_H: torch.Tensor, *, eps: float) -> None:
        self._weight = weight_H
        self._eps = eps

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        """x [T, H] to [T, H]."""
        return F.rms_norm(x_TH, self._weight.shape, self._weight, self._eps)


class Output:
    """Rows to logits: the last norm and the product with the vocabulary."""

    def __init__(self, *, norm: Norm, head: Linear) -> None:
        self._norm = norm
        self._head = head

    def __call__(self, x_SH: torch.Tensor) -> torch.Tensor:
        """x [S, H] to float32 logits [S, V]."""
        return self._head(self._norm(x_SH)).float()
