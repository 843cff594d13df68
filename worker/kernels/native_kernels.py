"""Operations in C++ for a rank on a CPU, in float32. What they do not cover is torch's, operation by operation."""

from collections.abc import Sequence

import torch

from moe.experts import Linear
from native.arena import Arena
from native.library import NativeLibrary
from worker.kernels.interface import stacked
from worker.kernels.torch_kernels import TorchKernels


class NativeKernels:
    """See Kernels. Weights are held packed, once, in one arena."""

    def __init__(self, library: NativeLibrary, *, num_threads: int) -> None:
        self._library = library
        self._num_threads = num_threads
        self._arena = Arena()
        self._torch = TorchKernels()

    def linear(self, parts: Sequence[torch.Tensor], *, biases: Sequence[torch.Tensor] = ()) -> Linear:
        """See Kernels."""
        if parts[0].dtype != torch.float32:
            return self._torch.linear(parts, biases=biases)
        return NativeLinear(
            stacked(parts),
            stacked(biases) if biases else None,
            library=self._library,
            arena=self._arena,
            num_threads=self._num_threads,
        )


class NativeLinear:
    """A float32 weight in panels of outputs. What a row gives depends on no other row."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        library: NativeLibrary,
        arena: Arena,
        num_threads: int,
    ) -> None:
        self._product = library.product
        self._num_threads = num_threads
        self._out_features, self._in_features = weight.shape
        self._bias = None if bias is None else bias.contiguous()
        num_floats = library.packed_floats(self._out_features, self._in_features)
        self._packed = torch.frombuffer(arena.take(num_floats * 4), dtype=torch.float32)
        rows = weight.contiguous()
        library.pack(rows.data_ptr(), rows.stride(0), *weight.shape, self._packed.data_ptr(), self._num_threads)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, out]."""
        num_rows, in_features = x.shape
        assert in_features == self._in_features and x.dtype == torch.float32, (x.shape, x.dtype, self._in_features)
        out = x.new_empty((num_rows, self._out_features))
        if num_rows == 0:
            return out
        if x.stride(1) != 1:
            x = x.contiguous()
        self._product(
            x.data_ptr(),
            x.stride(0),
            num_rows,
            self._packed.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            self._out_features,
            in_features,
            out.data_ptr(),
            self._out_features,
            self._num_threads,
        )
        return out
