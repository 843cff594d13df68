"""Rows that hold no numbers, as they are stored: a NaN key tells of them, and no value is ever anything but a number.

A kernel selects which scores a row sees, but multiplies the values behind all of them, those that it does not see by
zero, and zero times NaN is NaN. So V is finite everywhere in memory, on both sides of a hand-off and in whatever is
gathered from it; and since a broken key makes every score with it NaN, whoever sees such a position still learns of it.
"""

import torch


def mark_broken(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v [T, Hkv, D] as they go to memory: where a row of a head has NaN or infinity in either, its k is NaN and
    its v zero. Does not synchronise.
    """
    broken = ~(torch.isfinite(k).all(-1, keepdim=True) & torch.isfinite(v).all(-1, keepdim=True))
    return k.masked_fill(broken, torch.nan), v.masked_fill(broken, 0.0)
