"""Rows, their slots and their weights as one message: a collective costs its latency whatever it carries."""

import torch

from moe.dispatch import DispatchedRows


def pack_rows(x_NH: torch.Tensor, slots_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """uint8 [N, bytes of a row]; slots travel as int32, weights as float32."""
    parts = (x_NH, slots_NK.to(torch.int32), weights_NK)
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)


def unpack_rows(packed: torch.Tensor, *, like: torch.Tensor, top_k: int) -> DispatchedRows:
    """The inverse; `like` [*, H] gives the rows' size and dtype."""
    x, slots, weights = (
        part.contiguous() for part in packed.split([like.shape[1] * like.element_size(), 4 * top_k, 4 * top_k], dim=1)
    )
    return DispatchedRows(
        x=x.view(like.dtype), slots=slots.view(torch.int32).long(), weights=weights.view(torch.float32)
    )
