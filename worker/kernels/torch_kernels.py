"""Operations in torch. On a CPU a fixed weight is packed once for oneDNN, which reads it two to three times as fast.

The packing operators are private to torch; where they are missing, or refuse a shape or type, `F.linear` does the same.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from moe.activation import Gated
from moe.experts import Experts, ExpertWeights, TorchExperts
from moe.gate import Gate, TorchGate
from moe.linear import Linear, RowOperation
from moe.slots import SlotMap
from parallel.models.gates import Activation, GateSpec
from worker.kernels.interface import Draw, Heads, HeadWeights, Norm, stacked
from worker.kernels.torch_heads import TorchHeads
from worker.kernels.torch_sampler import are_finite, draw_tokens


class TorchKernels:
    """See Kernels."""

    widens = False

    def linear(
        self, parts: Sequence[torch.Tensor], *, biases: Sequence[torch.Tensor] = (), norm: Norm | None = None
    ) -> Linear:
        """See Kernels."""
        linear = _product(stacked(parts), stacked(biases) if biases else None)
        return linear if norm is None else NormedLinear(self.norm(norm), linear)

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
        return Gated(self.linear([gate, up], biases=biases or (), norm=norm), activation)

    def heads(self, weights: HeadWeights, *, norm: Norm | None) -> Heads:
        """See Kernels."""
        return TorchHeads(weights, product=self.linear(weights.qkv, biases=weights.biases, norm=norm))

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
        logits = self.linear([weight], biases=[] if bias is None else [bias])
        return TorchGate(spec, norm=self.norm(norm), logits=logits, correction_E=correction, slots=slots)

    def experts(self, weights: Sequence[ExpertWeights], *, first: int, activation: Activation) -> Experts:
        """See Kernels."""
        products = {id(each): self._expert(each, activation) for each in weights}
        of_slots = [products[id(each)] for each in weights]
        return TorchExperts(first=first, gated=[gated for gated, _ in of_slots], down=[down for _, down in of_slots])

    def norm(self, norm: Norm) -> RowOperation:
        """See Kernels."""
        return TorchNorm(norm)

    def draw(self, logits_SV: torch.Tensor, draws: Sequence[Draw]) -> tuple[torch.Tensor, torch.Tensor]:
        """See Kernels."""
        is_finite_S = are_finite(logits_SV)
        return draw_tokens(logits_SV, draws).masked_fill(~is_finite_S, 0), is_finite_S

    def _expert(self, weights: ExpertWeights, activation: Activation) -> tuple[RowOperation, Linear]:
        biases = [] if weights.down_bias is None else [weights.down_bias]
        gated = self.gated(weights.gate, weights.up, biases=weights.gate_up_biases, activation=activation)
        return gated, self.linear([weights.down], biases=biases)


#: oneDNN reads a packed weight more slowly for one or two rows than for four: all products of a model of 135 million
#: weights took 39, 46 and 31 ms for 1, 2 and 4 rows on one thread.
_FEWEST_ROWS = 4
_SIZES_PER_OCTAVE = 16


def padded_rows(num_rows: int) -> int:
    """How many rows a product of `num_rows`, one or more, is made with: a multiple of four, at most a sixteenth more.

    oneDNN compiles code for each number of rows, of half a megabyte and in about a millisecond, and keeps it: with
    every number there is, a rank grew by hundreds of megabytes and stopped at each new length.
    """
    octave = 1 << (num_rows - 1).bit_length() >> 1
    step = max(octave // _SIZES_PER_OCTAVE, _FEWEST_ROWS)
    return -(-num_rows // step) * step


def _product(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return PackedLinear(weight, bias)
    return PlainLinear(weight, bias)


class PlainLinear:
    """See Linear: `F.linear`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor, *, plus: torch.Tensor | None = None) -> torch.Tensor:
        """See Linear."""
        out = F.linear(x, self._weight, self._bias)
        return out if plus is None else plus + out


class PackedLinear:
    """See Linear: a float32 weight in oneDNN's own blocked layout; one packing serves every number of rows."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._bias = bias
        self._out_features = weight.shape[0]
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)

    def __call__(self, x: torch.Tensor, *, plus: torch.Tensor | None = None) -> torch.Tensor:
        """See Linear."""
        out = self._multiply(x)
        return out if plus is None else plus + out

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        num_rows = x.shape[0]
        if num_rows == 0:
            return x.new_empty((0, self._out_features))
        padding = padded_rows(num_rows) - num_rows
        if padding:
            x = F.pad(x, (0, 0, 0, padding))
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out[:num_rows]


class NormedLinear:
    """See Linear: a norm, then a product."""

    def __init__(self, norm: RowOperation, linear: Linear) -> None:
        self._norm = norm
        self._linear = linear

    def __call__(self, x: torch.Tensor, *, plus: torch.Tensor | None = None) -> torch.Tensor:
        """See Linear."""
        return self._linear(self._norm(x), plus=plus)


class TorchNorm:
    """See Norm."""

    def __init__(self, norm: Norm) -> None:
        self._weight = norm.weight
        self._eps = norm.eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, D] to the same."""
        return F.rms_norm(x, self._weight.shape, self._weight, self._eps)
