"""The heads of attention in one call in C++."""

import ctypes

import torch

from native.library import Heads, NativeLibrary
from worker.kernels.interface import HeadWeights
from worker.kernels.native_products import Packed, address, as_vector, checked_rows, scratch


class NativeHeads:
    """See Heads."""

    def __init__(self, weights: HeadWeights, *, packed: Packed, library: NativeLibrary) -> None:
        """`packed` is the product with q, k and v."""
        self._packed = packed
        self._sizes = (weights.num_heads, weights.num_kv_heads, weights.num_kv_heads)
        self._shape = (sum(self._sizes), weights.head_dim)
        norms, eps = weights.norm_of_heads
        self._norms = as_vector(norms)
        rotated = weights.num_heads + weights.num_kv_heads
        self._heads = Heads(packed.product, address(self._norms), self._shape[0], rotated, weights.head_dim, eps)
        self._address = ctypes.addressof(self._heads)
        self._run = library.heads
        self._num_threads = library.num_threads

    def __call__(
        self, x_TH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See Heads; float32, cos and sin contiguous."""
        x = checked_rows(x_TH, self._packed.size)
        num_rows, half = x.shape[0], cos.shape[2]
        assert cos.shape == sin.shape == (num_rows, 1, half) and 2 * half <= self._shape[1], (x.shape, cos.shape)
        assert cos.is_contiguous() and sin.is_contiguous()
        out, normed = x.new_empty((num_rows, *self._shape)), scratch(x, self._packed)
        self._run(
            *(self._address, x.data_ptr(), x.stride(0), num_rows),
            *(cos.data_ptr(), sin.data_ptr(), half),
            *(address(normed), out.data_ptr(), self._num_threads),
        )
        q, k, v = out.split_with_sizes(self._sizes, dim=1)
        return q, k, v
