"""An expert's activation against transformers' own, where its limit cuts and where it does not."""

import pytest
import torch
import torch.nn.functional as F
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from moe.activation import activate
from parallel.models.gates import SWIGLU, Activation


def test_by_default_it_is_swiglu() -> None:
    gate, up = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(activate(gate, up, SWIGLU), F.silu(gate) * up)


@pytest.mark.parametrize("limit", [0.3, 7.0])
def test_with_a_limit_it_is_that_of_gpt_oss(limit: float) -> None:
    gate, up = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(1))
    theirs = GptOssExperts(GptOssConfig(hidden_size=4, intermediate_size=8, num_local_experts=2, swiglu_limit=limit))
    ours = activate(gate, up, Activation(alpha=1.702, up_offset=1.0, limit=limit))
    expected = theirs._apply_gate(torch.stack([gate, up], dim=-1).flatten(1))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


def test_a_padded_width_stays_zero() -> None:
    zeros = torch.zeros(3, 4)
    assert torch.equal(activate(zeros, zeros, Activation(alpha=1.702, up_offset=1.0, limit=0.1)), zeros)
