"""Widens MXFP4: a value is four bits, 32 along the input share a power of two (OCP Microscaling Formats 1.0)."""

import torch

#: By their four bits: sign, two of exponent, one of mantissa.
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BIAS = 127


def widen_mxfp4(blocks_RGB: torch.Tensor, scales_RG: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """uint8 blocks [R, G, 16], low half of a byte first, and scales [R, G] to values [R, 32 · G] in `dtype`.

    On the device of both; bit for bit what transformers makes of them in that dtype.
    """
    # float16 has the range of most products, not of their scales.
    wide = torch.float32 if dtype == torch.float16 else dtype
    # Both values of a byte are looked up at once, as one number of twice the size: half the look-ups.
    byte = torch.arange(256, device=blocks_RGB.device)
    values = torch.tensor(_VALUES, dtype=wide, device=blocks_RGB.device)
    pairs = torch.stack([values[byte & 0x0F], values[byte >> 4]], dim=1)
    pairs = pairs.view(torch.int32 if wide.itemsize == 2 else torch.int64).squeeze(1)
    out = pairs.index_select(0, blocks_RGB.flatten().int()).view(wide).view(*scales_RG.shape, 2 * blocks_RGB.shape[-1])
    # In two steps: the largest power, 128, is beyond every float, half a one of it is not.
    exponents = scales_RG.int().unsqueeze(-1) - _BIAS
    half = exponents // 2
    for step in (half, exponents - half):
        out.mul_(torch.pow(2.0, step).to(wide))
    return out.flatten(-2).to(dtype)
