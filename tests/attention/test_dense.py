"""The fused CPU kernel and the plain one are the same function, in every dtype and head size that is served."""

import pytest
import torch

from attention.torch_kernel.dense import attend, attend_plain


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", [8, 16, 20, 32, 64, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_fused_and_plain_attention_agree(causal: bool, head_dim: int, dtype: torch.dtype, tolerance: float) -> None:
    q = torch.randn(2, 3, 11, head_dim).to(dtype)
    k, v = torch.randn(2, 2, 11 if causal else 29, head_dim).to(dtype)
    fused, fused_lse = attend(q, k, v, scale=0.3, causal=causal)
    hidden = torch.ones(11, 11, dtype=torch.bool).triu(1) if causal else None
    plain, plain_lse = attend_plain(q, k, v, scale=0.3, hidden=hidden)
    assert fused.dtype == plain.dtype == dtype and fused_lse.dtype == plain_lse.dtype == torch.float32
    torch.testing.assert_close(fused, plain, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(fused_lse, plain_lse, atol=1e-5, rtol=1e-5)
