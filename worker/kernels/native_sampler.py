"""Draws tokens in C++: no row is sorted, and noise is made only for tokens that can still win."""

from collections.abc import Sequence

import numpy as np
import torch

from native.library import DRAW, NativeLibrary
from worker.kernels.interface import Draw


def draw_natively(
    library: NativeLibrary, logits_SV: torch.Tensor, draws: Sequence[Draw]
) -> tuple[torch.Tensor, torch.Tensor]:
    """See Kernels.draw, of float32 logits on a CPU. What a row gives depends on no other, nor on threads."""
    num_rows, vocab_size = logits_SV.shape
    assert logits_SV.dtype == torch.float32 and len(draws) == num_rows, (logits_SV.dtype, len(draws), num_rows)
    logits = logits_SV if logits_SV.stride(1) == 1 else logits_SV.contiguous()
    asked = np.array([_fields(draw) for draw in draws], dtype=DRAW)
    tokens, is_finite = torch.empty(num_rows, dtype=torch.int64), torch.empty(num_rows, dtype=torch.bool)
    library.draw(
        *(logits.data_ptr(), logits.stride(0), num_rows, vocab_size),
        *(asked.ctypes.data, tokens.data_ptr(), is_finite.data_ptr(), library.num_threads),
    )
    return tokens, is_finite


def _fields(draw: Draw) -> tuple[float, float, float, int, int, int]:
    sampling = draw.sampling
    return (
        *(sampling.temperature, sampling.top_p, sampling.min_p),
        *(sampling.top_k, sampling.seed, draw.position),
    )
