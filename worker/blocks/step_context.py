"""What the blocks of all layers share during one step."""

from dataclasses import dataclass

import torch

from attention.exchange import Exchange
from attention.interface import KvWrite


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """The T rows of a coordinate: cos and sin [T, 1, rotary_dim / 2] of their positions, where their KV goes, and how
    they attend. `padded_rows` is what expert blocks pad to.
    """

    num_rows: int

    cos: torch.Tensor
    sin: torch.Tensor
    write: KvWrite
    exchange: Exchange
    padded_rows: int
