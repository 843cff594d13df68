"""Draws tokens from logits in torch. The noise of a draw is a function of (seed, position, token id) and nothing else.

So the same request draws the same tokens alone, in a batch, after a restart and in any layout, up to the float
tolerance of its logits. A draw is an argmax of filtered logits plus Gumbel noise, which is a draw from their softmax.
"""

from collections.abc import Sequence

import torch

from proto import control_pb2
from worker.kernels.interface import Draw

_MASK_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def are_finite(logits_SV: torch.Tensor) -> torch.Tensor:
    """bool [S]: whether a row of logits [S, V] holds neither NaN nor infinity."""
    # One pass, a tenth of what a search for the least and the largest takes. Infinities of both signs add up to NaN; in
    # float64 no sum of numbers is infinite.
    return torch.isfinite(logits_SV.sum(dim=-1, dtype=torch.float64))


def draw_tokens(logits_SV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Token ids [S] (int64) for float32 logits [S, V], one draw a row."""
    tokens = logits_SV.argmax(dim=-1)
    rows = [index for index, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if rows:
        chosen = [draws[index] for index in rows]
        filtered = filter_logits(logits_SV[rows], [draw.sampling for draw in chosen])
        tokens[rows] = (filtered + gumbel_noise(chosen, vocab_size=logits_SV.shape[1], device=tokens.device)).argmax(-1)
    return tokens


def filter_logits(logits_SV: torch.Tensor, samplings: Sequence[control_pb2.Sampling]) -> torch.Tensor:
    """Logits over temperature, -inf where top-k, then top-p, then min-p leave a token out; the best always stays."""

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits_SV.device).unsqueeze(1)

    scaled = logits_SV / column([sampling.temperature for sampling in samplings])
    if any(sampling.top_k > 0 for sampling in samplings):
        scaled = _keep_top_k(scaled, [sampling.top_k for sampling in samplings])
    if any(sampling.top_p < 1 for sampling in samplings):
        scaled = _keep_top_p(scaled, column([sampling.top_p for sampling in samplings]))
    if any(sampling.min_p > 0 for sampling in samplings):
        floor = column([sampling.min_p for sampling in samplings])
        probabilities = scaled.softmax(-1)
        scaled = scaled.masked_fill(probabilities < floor * probabilities.amax(-1, keepdim=True), -torch.inf)
    return scaled


def gumbel_noise(draws: Sequence[Draw], *, vocab_size: int, device: torch.device) -> torch.Tensor:
    """float32 [S, V]: -log(-log(u)) of u in (0, 1) hashed from seed, position and token id (splitmix64)."""
    keys = [_signed(_mix(_mix(draw.sampling.seed) ^ (draw.position * _GOLDEN & _MASK_64))) for draw in draws]
    x = torch.tensor(keys, dtype=torch.int64, device=device).unsqueeze(1)
    x = x + torch.arange(vocab_size, dtype=torch.int64, device=device) * _signed(_GOLDEN)
    for shift, factor in _MIX:
        x = (x ^ _shift_right(x, shift)) * _signed(factor)
    u = (_shift_right(x ^ _shift_right(x, 31), 12).double() + 0.5) / 2.0**52
    return -torch.log(-torch.log(u)).float()


def _keep_top_k(scaled: torch.Tensor, top_ks: list[int]) -> torch.Tensor:
    vocab_size = scaled.shape[1]
    sizes = [min(top_k, vocab_size) if top_k > 0 else vocab_size for top_k in top_ks]
    largest = max((size for size in sizes if size < vocab_size), default=1)
    values = scaled.topk(largest, dim=-1).values
    index = torch.tensor([min(size, largest) - 1 for size in sizes], device=scaled.device).unsqueeze(1)
    limited = torch.tensor([size < vocab_size for size in sizes], device=scaled.device).unsqueeze(1)
    return scaled.masked_fill(limited & (scaled < values.gather(1, index)), -torch.inf)


def _keep_top_p(scaled: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keeps the fewest tokens, best first and of equal ones the first, whose probabilities reach top_p."""
    values, order = scaled.sort(dim=-1, descending=True, stable=True)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    dropped = (before >= top_p) & (top_p < 1)
    dropped[:, 0] = False
    return scaled.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), -torch.inf)


def _mix(x: int) -> int:
    """splitmix64's output function on a Python integer."""
    x = (x + _GOLDEN) & _MASK_64
    for shift, factor in _MIX:
        x = ((x ^ (x >> shift)) * factor) & _MASK_64
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    """The int64 with the bits of a 64-bit unsigned integer."""
    return x - (1 << 64) if x >> 63 else x


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift of int64: torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
