"""Operations in C++ for a rank on a CPU, in float32 over weights of any of STORED; what else there is, is torch's."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from moe.experts import Experts, ExpertWeights
from moe.gate import Gate
from moe.linear import Linear, RowOperation
from moe.slots import SlotMap
from native.arena import Arena
from native.library import NativeLibrary
from parallel.models.gates import Activation, GateSpec
from worker.kernels.interface import Draw, Heads, HeadWeights, Norm, stacked
from worker.kernels.native_experts import NativeExperts
from worker.kernels.native_gate import NativeGate
from worker.kernels.native_heads import NativeHeads
from worker.kernels.native_products import STORED, NativeGated, NativeLinear, Packer
from worker.kernels.native_rows import NativeNorm
from worker.kernels.native_sampler import draw_natively
from worker.kernels.torch_kernels import TorchKernels


class NativeKernels:
    """See Kernels. Weights are held packed, once, in one arena."""

    widens = True

    def __init__(self, library: NativeLibrary) -> None:
        self._packer = Packer(library, arena=Arena())
        self._torch = TorchKernels()

    def linear(
        self, parts: Sequence[torch.Tensor], *, biases: Sequence[torch.Tensor] = (), norm: Norm | None = None
    ) -> Linear:
        """See Kernels."""
        if not _covers(parts[0], norm):
            return self._torch.linear(parts, biases=biases, norm=norm)
        packed = self._packer.pack(stacked(parts), stacked(biases) if biases else None, norm=norm)
        return NativeLinear(packed, library=self._packer.library)

    def gated(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        *,
        biases: tuple[torch.Tensor, torch.Tensor] | None = None,
        activation: Activation,
        norm: Norm | None = None,
    ) -> RowOperation:
        """See Kernels."""
        if not _covers(gate, norm):
            return self._torch.gated(gate, up, biases=biases, activation=activation, norm=norm)
        packed = self._packer.pack_pairs(*_alike(gate, up), biases, norm=norm)
        return NativeGated(packed, activation=activation, library=self._packer.library)

    def heads(self, weights: HeadWeights, *, norm: Norm | None) -> Heads:
        """See Kernels."""
        if not _covers(weights.qkv[0], norm):
            return self._torch.heads(weights, norm=norm)
        bias = stacked(weights.biases) if weights.biases else None
        packed = self._packer.pack(stacked(weights.qkv), bias, norm=norm)
        return NativeHeads(weights, packed=packed, library=self._packer.library)

    def gate(
        self,
        spec: GateSpec,
        *,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        correction: torch.Tensor | None,
        norm: Norm,
        slots: SlotMap,
    ) -> Gate:
        """See Kernels."""
        if not _covers(weight, norm):
            return self._torch.gate(spec, weight=weight, bias=bias, correction=correction, norm=norm, slots=slots)
        packed = self._packer.pack(weight, bias, norm=norm)
        return NativeGate(spec, logits=packed, correction=correction, slots=slots, library=self._packer.library)

    def experts(self, weights: Sequence[ExpertWeights], *, first: int, activation: Activation) -> Experts:
        """See Kernels."""
        if weights[0].gate.dtype not in STORED:
            return self._torch.experts(weights, first=first, activation=activation)
        parts = [part for each in weights for part in (each.gate, each.up, each.down)]
        if len({part.dtype for part in parts}) > 1:
            widened = {id(each): _widened(each) for each in weights}
            weights = [widened[id(each)] for each in weights]
        return NativeExperts(weights, first=first, activation=activation, packer=self._packer)

    def norm(self, norm: Norm) -> RowOperation:
        """See Kernels."""
        if norm.weight.dtype != torch.float32:
            return self._torch.norm(norm)
        return NativeNorm(norm, library=self._packer.library)

    def draw(self, logits_SV: torch.Tensor, draws: Sequence[Draw]) -> tuple[torch.Tensor, torch.Tensor]:
        """See Kernels."""
        if logits_SV.dtype != torch.float32 or logits_SV.device.type != "cpu":
            return self._torch.draw(logits_SV, draws)
        return draw_natively(self._packer.library, logits_SV, draws)


def _covers(weight: torch.Tensor, norm: Norm | None) -> bool:
    """Whether rows by `weight` are float32: its own dtype may be another, that of what is no matrix may not."""
    return weight.dtype in STORED and (norm is None or norm.weight.dtype == torch.float32)


def _alike(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in one dtype, in which neither loses a bit."""
    return (gate, up) if gate.dtype == up.dtype else (gate.float(), up.float())


def _widened(weights: ExpertWeights) -> ExpertWeights:
    return replace(weights, gate=weights.gate.float(), up=weights.up.float(), down=weights.down.float())
