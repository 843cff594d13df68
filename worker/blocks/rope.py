"""Rotary position embedding in the half-split form of the Llama family (RoFormer, arXiv 2104.09864)."""

import math
from collections.abc import Callable, Iterable

import torch

from parallel.models.description import FrequencyFactors, LinearScaling, Llama3Scaling, RopeSpec, YarnScaling


class RotaryEmbedding:
    """The frequencies of one model; its cos and sin of any positions."""

    def __init__(self, spec: RopeSpec, *, device: torch.device) -> None:
        self._frequencies = inverse_frequencies(spec).to(device)
        self._attention_factor = spec.attention_factor

    def __call__(self, positions_T: torch.Tensor, *, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, 1, rotary_dim / 2] of explicit positions, which zigzag rows need."""
        angles = positions_T.float()[:, None, None] * self._frequencies
        return (angles.cos() * self._attention_factor).to(dtype), (angles.sin() * self._attention_factor).to(dtype)


class RotaryTables:
    """The rotary embeddings of a stage's layers, each worked out once a step."""

    def __init__(self, ropes: Iterable[RopeSpec], *, device: torch.device) -> None:
        self._ropes = {spec: RotaryEmbedding(spec, device=device) for spec in ropes}

    def __call__(
        self, positions_T: torch.Tensor, *, dtype: torch.dtype
    ) -> dict[RopeSpec, tuple[torch.Tensor, torch.Tensor]]:
        """cos and sin of each."""
        return {spec: rope(positions_T, dtype=dtype) for spec, rope in self._ropes.items()}


def inverse_frequencies(rope: RopeSpec) -> torch.Tensor:
    """float32 [rotary_dim / 2], on the CPU: ranks on different devices rotate with the same bits.

    The order of operations is transformers': an angle is a position times a frequency, so that the rounding of a
    frequency shows after some thousand positions.
    """
    size = rope.rotary_dim
    powers = rope.theta ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size)
    if rope.scaling is None:
        return 1.0 / powers
    return _SCALED[type(rope.scaling)](powers, rope.scaling, theta=rope.theta)


def _linear(powers: torch.Tensor, scaling: LinearScaling, *, theta: float) -> torch.Tensor:
    return 1.0 / powers / scaling.factor


def _yarn(powers: torch.Tensor, scaling: YarnScaling, *, theta: float) -> torch.Tensor:
    rotary_dim = 2 * len(powers)

    def index_of(turns: float) -> float:
        """The frequency (a real number) that turns `turns` times within the original positions."""
        wavelength = scaling.original_positions / (turns * 2 * math.pi)
        return rotary_dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001  # as transformers does: a ramp of width 0 has no slope
    ramp = torch.clamp((torch.arange(len(powers), dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept


def _llama3(powers: torch.Tensor, scaling: Llama3Scaling, *, theta: float) -> torch.Tensor:
    original = scaling.original_positions
    frequencies = 1.0 / powers
    wavelengths = 2 * math.pi / frequencies
    long = wavelengths > original / scaling.low_freq_factor
    short = wavelengths < original / scaling.high_freq_factor
    share = (original / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    between = (1 - share) * frequencies / scaling.factor + share * frequencies
    return torch.where(short, frequencies, torch.where(long, frequencies / scaling.factor, between))


def _frequency_factors(powers: torch.Tensor, scaling: FrequencyFactors, *, theta: float) -> torch.Tensor:
    return 1.0 / (torch.tensor(scaling.factors, dtype=torch.float32) * powers)


_SCALED: dict[type, Callable[..., torch.Tensor]] = {
    LinearScaling: _linear,
    YarnScaling: _yarn,
    Llama3Scaling: _llama3,
    FrequencyFactors: _frequency_factors,
}
