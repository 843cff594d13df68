"""What is done to each row by itself, in C++."""

import torch

from native.library import NativeLibrary


class NativeNorm:
    """See Kernels.norm; float32."""

    def __init__(self, weight: torch.Tensor, *, eps: float, library: NativeLibrary) -> None:
        self._weight = weight.contiguous()
        self._heads = 1 if weight.dim() == 1 else weight.shape[0]
        self._eps = eps
        self._library = library

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, D] or [T, heads, D] to the same."""
        x = _whole_rows(x)
        assert x.shape[1:] == self._weight.shape, (x.shape, self._weight.shape)
        out = x.new_empty(x.shape)
        self._library.norm(
            *(x.data_ptr(), x.stride(0), x.shape[0], self._heads, x.shape[-1]),
            *(self._weight.data_ptr(), self._eps, out.data_ptr(), self._library.num_threads),
        )
        return out


def rotate_natively(
    x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, library: NativeLibrary
) -> torch.Tensor:
    """See Kernels.rotate; float32, cos and sin contiguous."""
    x = _whole_rows(x_THD)
    num_rows, heads, width = x.shape
    half = cos.shape[-1]
    assert cos.shape == sin.shape == (num_rows, 1, half) and 2 * half <= width, (x.shape, cos.shape, sin.shape)
    assert cos.is_contiguous() and sin.is_contiguous()
    out = x.new_empty(x.shape)
    library.rotate(
        *(x.data_ptr(), x.stride(0), num_rows, heads, width),
        *(cos.data_ptr(), sin.data_ptr(), half, out.data_ptr(), library.num_threads),
    )
    return out


def _whole_rows(x: torch.Tensor) -> torch.Tensor:
    """x in float32, the elements of each row side by side; rows may lie apart."""
    assert x.dtype == torch.float32, x.dtype
    return x if x.dim() < 2 or x[0:1].is_contiguous() else x.contiguous()
