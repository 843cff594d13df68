"""Widens MXFP4: a value is four bits, 32 along the input share a power of two (OCP Microscaling Formats 1.0)."""

import torch

#: By their four bits: sign, two of exponent, one of mantissa.
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BIAS = 127


def widen_mxfp4(blocks_RGB: torch.Tensor, scales_RG: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """uint8 blocks [R, G, 16], low half of a byte first, and scales [R, G] to values [R, 32 · G] in `dtype`.

    Bit for bit what transformers makes of them in that dtype.
    """
    values = torch.tensor(_VALUES, dtype=dtype, device=blocks_RGB.device)
    halves = torch.stack([blocks_RGB & 0x0F, blocks_RGB >> 4], dim=-1).flatten(-2)
    out = values[halves.int()]
    exponents = scales_RG.int().unsqueeze(-1) - _BIAS
    return torch.ldexp(out, exponents, out=out).flatten(-2)
