"""MXFP4 is widened bit for bit as transformers does, for every byte and every scale."""

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from worker.mxfp4 import widen_mxfp4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_byte_under_every_scale_has_transformers_bits(dtype: torch.dtype) -> None:
    # One row of 16 blocks, which hold all bytes, for each scale.
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(256, 16, 16)
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1).expand(256, 16)
    ours = widen_mxfp4(blocks, scales, dtype=dtype)
    theirs = convert_moe_packed_tensors(blocks.unsqueeze(0), scales.unsqueeze(0), dtype=dtype)[0].T
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert ours.dtype == dtype
    assert torch.equal(ours.view(bits), theirs.contiguous().view(bits))


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_a_slice_without_values_is_widened_to_none(shape: tuple[int, int]) -> None:
    blocks = torch.zeros((*shape, 16), dtype=torch.uint8)
    widened = widen_mxfp4(blocks, torch.zeros(shape, dtype=torch.uint8), dtype=torch.bfloat16)
    assert widened.shape == (shape[0], 32 * shape[1])
