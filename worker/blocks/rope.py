"""Rotary position embedding in the half-split form of the Llama family (RoFormer, arXiv 2104.09864)."""

import torch

from parallel.models.description import RopeSpec


def inverse_frequencies(rope: RopeSpec, *, head_dim: int, device: torch.device) -> torch.Tensor:
    """float32 [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    return 1.0 / rope.theta**exponents


def rotation(
    positions_T: torch.Tensor, frequencies: torch.Tensor, *, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, 1, head_dim / 2] of explicit positions, which zigzag rows need."""
    angles = positions_T.float()[:, None, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates each head of x: element i pairs with element i + head_dim / 2."""
    left, right = x_THD.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
