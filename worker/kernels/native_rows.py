"""What is done to each row by itself, in C++."""

import torch

from native.library import NativeLibrary
from worker.kernels.interface import Norm
from worker.kernels.native_products import checked_rows


class NativeNorm:
    """See Norm; float32."""

    def __init__(self, norm: Norm, *, library: NativeLibrary) -> None:
        self._norm = Norm(weight=norm.weight.contiguous(), eps=norm.eps)
        self._library = library

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, D] to the same."""
        weight = self._norm.weight
        x = checked_rows(x, weight.shape[0])
        out = x.new_empty(x.shape)
        self._library.norm(
            *(x.data_ptr(), x.stride(0), *x.shape),
            *(weight.data_ptr(), self._norm.eps, out.data_ptr(), self._library.num_threads),
        )
        return out
