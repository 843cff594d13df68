"""Rows for experts, made without a gate."""

import torch

from moe.routed_rows import RoutedRows, RowFormat


def routed(x_NH: torch.Tensor, slots_NK: torch.Tensor, weights_NK: torch.Tensor) -> RoutedRows:
    """Messages that hold x [N, H], slots [N, k] and weights [N, k]."""
    form = RowFormat(hidden_size=x_NH.shape[1], dtype=x_NH.dtype, top_k=slots_NK.shape[1])
    rows = form.empty(x_NH.shape[0], device=x_NH.device)
    rows.x[:], rows.slots[:], rows.weights[:] = x_NH, slots_NK, weights_NK
    return rows
