"""What the blocks of all layers share during one step."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from attention.exchange.plan import Exchange
from parallel.models.description import RopeSpec

#: cos and sin [T, 1, rotated elements / 2].
Rotation = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """The T rows of a cp rank, over its tp ranks: how their positions rotate, by rope, and how they attend, by cache
    group. `padded_rows` is what expert blocks pad to.
    """

    rotations: Mapping[RopeSpec, Rotation]
    exchanges: Mapping[str, Exchange]
    padded_rows: int
