"""Rows that hold no numbers, as they are stored: a NaN key tells of them, and no value is ever anything but a number.

A kernel selects which scores a row sees, but multiplies the values behind all of them, those that it does not see by
zero, and zero times NaN is NaN. So values are finite everywhere in memory, on both sides of a hand-off and in whatever
is gathered from it; and since a broken key makes every score with it NaN, whoever sees such a position still learns of
it. Where a value lies inside its key's plane, the elements that are the key's alone tell.
"""

from collections.abc import Sequence

import torch

from attention.interface import AttentionSpec


def mark_broken(planes: Sequence[torch.Tensor], spec: AttentionSpec) -> list[torch.Tensor]:
    """The rows of each plane [T, heads, elements] as they go to memory: where a row of a head has NaN or infinity in
    any plane, its key is NaN and everything else zero. Does not synchronise.
    """
    names = [plane.name for plane in spec.page.planes]
    broken = [~torch.isfinite(plane).all(-1, keepdim=True) for plane in planes]
    return [
        _marked(plane, _any_of(broken, heads=plane.shape[1]), name=name, spec=spec)
        for name, plane in zip(names, planes, strict=True)
    ]


def _any_of(broken: Sequence[torch.Tensor], *, heads: int) -> torch.Tensor:
    """bool [T, heads, 1]: head by head among planes of as many heads; one of another number breaks them all."""
    parts = [part if part.shape[1] == heads else part.any(1, keepdim=True) for part in broken]
    found = parts[0]
    for part in parts[1:]:
        found = found | part
    return found.expand(-1, heads, -1)


def _marked(rows: torch.Tensor, broken: torch.Tensor, *, name: str, spec: AttentionSpec) -> torch.Tensor:
    if name != spec.key.plane:
        return rows.masked_fill(broken, 0.0)
    if spec.value.plane != name and spec.key.width == rows.shape[-1]:
        return rows.masked_fill(broken, torch.nan)
    is_key = torch.zeros(rows.shape[-1], dtype=torch.bool, device=rows.device)
    is_key[spec.key.offset : spec.key.offset + spec.key.width] = True
    if spec.value.plane == name:
        is_key[spec.value.offset : spec.value.offset + spec.value.width] = False
    return rows.masked_fill(broken, 0.0).masked_fill(broken & is_key, torch.nan)
