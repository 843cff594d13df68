"""Operations in C++ for a rank on a CPU, in float32 over weights of any of STORED; what else there is, is torch's."""

from collections.abc import Sequence

import torch

from moe.activation import Linear
from moe.experts import Experts, ExpertWeights
from native.arena import Arena
from native.library import NativeLibrary
from parallel.models.gates import Activation
from worker.kernels.interface import stacked
from worker.kernels.native_experts import NativeExperts
from worker.kernels.native_products import STORED, NativeGated, NativeLinear, Packer
from worker.kernels.torch_kernels import TorchKernels


class NativeKernels:
    """See Kernels. Weights are held packed, once, in one arena."""

    def __init__(self, library: NativeLibrary) -> None:
        self._packer = Packer(library, arena=Arena())
        self._torch = TorchKernels()

    def linear(self, parts: Sequence[torch.Tensor], *, biases: Sequence[torch.Tensor] = ()) -> Linear:
        """See Kernels."""
        if parts[0].dtype not in STORED:
            return self._torch.linear(parts, biases=biases)
        return NativeLinear(stacked(parts), stacked(biases) if biases else None, packer=self._packer)

    def gated(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        *,
        biases: tuple[torch.Tensor, torch.Tensor] | None = None,
        activation: Activation,
    ) -> Linear:
        """See Kernels."""
        if gate.dtype not in STORED:
            return self._torch.gated(gate, up, biases=biases, activation=activation)
        return NativeGated(gate, up, biases, activation=activation, packer=self._packer)

    def experts(self, weights: Sequence[ExpertWeights], *, first: int, activation: Activation) -> Experts:
        """See Kernels."""
        if weights[0].gate.dtype not in STORED:
            return self._torch.experts(weights, first=first, activation=activation)
        return NativeExperts(weights, first=first, activation=activation, packer=self._packer)
