"""Operations in C++ for a rank on a CPU, in float32 over weights of any of STORED; what else there is, is torch's."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from moe.activation import Linear
from moe.experts import Experts, ExpertWeights
from native.arena import Arena
from native.library import NativeLibrary
from parallel.models.gates import Activation
from worker.kernels.interface import Draw, RowOperation, stacked
from worker.kernels.native_experts import NativeExperts
from worker.kernels.native_products import STORED, NativeGated, NativeLinear, Packer
from worker.kernels.native_rows import NativeNorm, rotate_natively
from worker.kernels.native_sampler import draw_natively
from worker.kernels.torch_kernels import TorchKernels


class NativeKernels:
    """See Kernels. Weights are held packed, once, in one arena."""

    widens = True

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
        gate, up = _alike(gate, up)
        return NativeGated(gate, up, biases, activation=activation, packer=self._packer)

    def experts(self, weights: Sequence[ExpertWeights], *, first: int, activation: Activation) -> Experts:
        """See Kernels."""
        if weights[0].gate.dtype not in STORED:
            return self._torch.experts(weights, first=first, activation=activation)
        parts = [part for each in weights for part in (each.gate, each.up, each.down)]
        if len({part.dtype for part in parts}) > 1:
            widened = {id(each): _widened(each) for each in weights}
            weights = [widened[id(each)] for each in weights]
        return NativeExperts(weights, first=first, activation=activation, packer=self._packer)

    def norm(self, weight: torch.Tensor, *, eps: float) -> RowOperation:
        """See Kernels."""
        if weight.dtype != torch.float32:
            return self._torch.norm(weight, eps=eps)
        return NativeNorm(weight, eps=eps, library=self._packer.library)

    def rotate(self, x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """See Kernels."""
        if x_THD.dtype != torch.float32:
            return self._torch.rotate(x_THD, cos, sin)
        return rotate_natively(x_THD, cos, sin, library=self._packer.library)

    def draw(self, logits_SV: torch.Tensor, draws: Sequence[Draw]) -> tuple[torch.Tensor, torch.Tensor]:
        """See Kernels."""
        if logits_SV.dtype != torch.float32 or logits_SV.device.type != "cpu":
            return self._torch.draw(logits_SV, draws)
        return draw_natively(self._packer.library, logits_SV, draws)


def _alike(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in one dtype, in which neither loses a bit."""
    return (gate, up) if gate.dtype == up.dtype else (gate.float(), up.float())


def _widened(weights: ExpertWeights) -> ExpertWeights:
    return replace(weights, gate=weights.gate.float(), up=weights.up.float(), down=weights.down.float())
