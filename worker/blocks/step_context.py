"""What the blocks of all layers share during one step."""

from dataclasses import dataclass

import torch

from attention.exchange import Exchange
from attention.interface import AttentionPlan, KvWrite


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """cos and sin are [T, 1, head_dim / 2] of the rows' positions; `padded_rows` is what expert blocks pad to."""

    cos: torch.Tensor
    sin: torch.Tensor
    write: KvWrite
    plan: AttentionPlan
    exchange: Exchange
    padded_rows: int
