"""Operations in torch. On a CPU a fixed weight is packed once for oneDNN, which reads it two to three times as fast.

The packing operators are private to torch; where they are missing, or refuse a shape or type, `F.linear` does the same.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from moe.activation import Gated, Linear
from moe.experts import Experts, ExpertWeights, TorchExperts
from parallel.models.gates import Activation
from worker.kernels.interface import Draw, RowOperation, stacked
from worker.kernels.torch_sampler import are_finite, draw_tokens


class TorchKernels:
    """See Kernels."""

    widens = False

    def linear(self, parts: Sequence[torch.Tensor], *, biases: Sequence[torch.Tensor] = ()) -> Linear:
        """See Kernels."""
        weight, bias = stacked(parts), stacked(biases) if biases else None
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            return PackedLinear(weight, bias)
        return PlainLinear(weight, bias)

    def gated(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        *,
        biases: tuple[torch.Tensor, torch.Tensor] | None = None,
        activation: Activation,
    ) -> Linear:
        """See Kernels."""
        return Gated(self.linear([gate, up], biases=biases or ()), activation)

    def experts(self, weights: Sequence[ExpertWeights], *, first: int, activation: Activation) -> Experts:
        """See Kernels."""
        products = {id(each): self._expert(each, activation) for each in weights}
        of_slots = [products[id(each)] for each in weights]
        return TorchExperts(first=first, gated=[gated for gated, _ in of_slots], down=[down for _, down in of_slots])

    def norm(self, weight: torch.Tensor, *, eps: float) -> RowOperation:
        """See Kernels."""
        return TorchNorm(weight, eps=eps)

    def rotate(self, x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """See Kernels."""
        size = cos.shape[-1]
        left, right, rest = x_THD.tensor_split((size, 2 * size), dim=-1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], dim=-1)

    def draw(self, logits_SV: torch.Tensor, draws: Sequence[Draw]) -> tuple[torch.Tensor, torch.Tensor]:
        """See Kernels."""
        is_finite_S = are_finite(logits_SV)
        return draw_tokens(logits_SV, draws).masked_fill(~is_finite_S, 0), is_finite_S

    def _expert(self, weights: ExpertWeights, activation: Activation) -> tuple[Linear, Linear]:
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


class PlainLinear:
    """`F.linear`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, out]."""
        return F.linear(x, self._weight, self._bias)


class PackedLinear:
    """A float32 weight in oneDNN's own blocked layout; one packing serves every number of rows."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._bias = bias
        self._out_features = weight.shape[0]
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, out]."""
        num_rows = x.shape[0]
        if num_rows == 0:
            return x.new_empty((0, self._out_features))
        padding = padded_rows(num_rows) - num_rows
        if padding:
            x = F.pad(x, (0, 0, 0, padding))
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out[:num_rows]


class TorchNorm:
    """See Kernels.norm."""

    def __init__(self, weight: torch.Tensor, *, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, ..., D] to the same."""
        if self._weight.dim() == 1:
            return F.rms_norm(x, self._weight.shape, self._weight, self._eps)
        return F.rms_norm(x, x.shape[-1:], eps=self._eps) * self._weight
