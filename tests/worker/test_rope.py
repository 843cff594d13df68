"""Frequencies and the factor of cos and sin are transformers' own, to the last bit."""

from typing import Any

import pytest
import torch
from transformers import Glm4MoeConfig, GptOssConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from parallel.models.gpt_oss import describe as describe_gpt_oss
from parallel.models.llama import describe
from parallel.models.rope import read_rope
from worker.blocks.rope import RotaryEmbedding, inverse_frequencies
from worker.kernels.torch_heads import rotate

HEAD_DIM = 64
ORIGINAL = {"original_max_position_embeddings": 8192}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}
YARN = {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.01 * index for index in range(HEAD_DIM // 2)],
    "long_factor": [2.0 + 0.5 * index for index in range(HEAD_DIM // 2)],
    **ORIGINAL,
}
KINDS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 3.7},
    LLAMA3,
    {**LLAMA3, "factor": 32.0, "low_freq_factor": 0.5, "original_max_position_embeddings": 100},
    YARN,
    {**YARN, "factor": None},
    {**YARN, "truncate": False, "beta_fast": 20.5, "beta_slow": 1.5},
    {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
    {**YARN, "mscale": 1.2, "mscale_all_dim": 0.7},
    {**YARN, "attention_factor": 0.8, "original_max_position_embeddings": 40},
    LONGROPE,
    {**LONGROPE, "factor": 5.0},
    {**LONGROPE, "attention_factor": 1.3},
]


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["rope_type"])
def test_every_kind_computes_what_transformers_computes(kind: dict[str, Any], theta: float) -> None:
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": HEAD_DIM, "max_position_embeddings": 32768}
    config = LlamaConfig(**sizes, rope_parameters={**kind, "rope_theta": theta})
    compute = ROPE_INIT_FUNCTIONS.get(kind["rope_type"], LlamaRotaryEmbedding.compute_default_rope_parameters)
    frequencies, attention_factor = compute(config)
    spec = describe(config.to_dict()).attention[0].rope
    assert torch.equal(inverse_frequencies(spec), frequencies)
    assert spec.attention_factor == attention_factor


@pytest.mark.parametrize("original", [4096, 37])
def test_gpt_oss_has_transformers_frequencies_with_a_ramp_that_ends_between_two(original: int) -> None:
    config = GptOssConfig()
    assert config.rope_parameters["truncate"] is False
    config.rope_parameters["original_max_position_embeddings"] = original
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config)
    spec = describe_gpt_oss(config.to_dict()).attention[0].rope
    assert torch.equal(inverse_frequencies(spec), frequencies)
    assert (spec.attention_factor, spec.theta) == (attention_factor, 150000.0)


def partial_config(kind: dict[str, Any]) -> Glm4MoeConfig:
    """Heads of HEAD_DIM, of which half is rotated."""
    halved = {key: value[::2] if isinstance(value, list) else value for key, value in kind.items()}
    parameters = {**halved, "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    return Glm4MoeConfig(head_dim=HEAD_DIM, max_position_embeddings=32768, rope_parameters=parameters)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["rope_type"])
def test_part_of_a_head_has_the_frequencies_of_its_own_size(kind: dict[str, Any]) -> None:
    config = partial_config(kind)
    compute = ROPE_INIT_FUNCTIONS.get(kind["rope_type"], Glm4MoeRotaryEmbedding.compute_default_rope_parameters)
    frequencies, attention_factor = compute(config)
    spec = read_rope(config.to_dict(), head_dim=HEAD_DIM, may_be_partial=True)
    assert torch.equal(inverse_frequencies(spec), frequencies)
    assert (spec.rotary_dim, spec.attention_factor) == (HEAD_DIM // 2, attention_factor)


def test_part_of_a_head_is_rotated_as_transformers_does_and_the_rest_is_as_it_was() -> None:
    config = partial_config({"rope_type": "default"})
    spec = read_rope(config.to_dict(), head_dim=HEAD_DIM, may_be_partial=True)
    positions = torch.tensor([0, 1, 7, 3000])
    q, k = torch.randn(2, len(positions), 3, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    theirs = apply_rotary_pos_emb(q, k, *Glm4MoeRotaryEmbedding(config)(q, positions), unsqueeze_dim=1)
    angles = RotaryEmbedding(spec, device=torch.device("cpu"))(positions, dtype=torch.float32)
    for x, expected in zip((q, k), theirs, strict=True):
        assert torch.equal(rotate(x, *angles), expected)
        assert torch.equal(rotate(x, *angles)[..., HEAD_DIM // 2 :], x[..., HEAD_DIM // 2 :])


def test_cos_and_sin_carry_the_attention_factor() -> None:
    config = LlamaConfig(rope_parameters={**YARN, "rope_theta": 1e4, "attention_factor": 0.5})
    spec = describe(config.to_dict()).attention[0].rope
    cos, sin = RotaryEmbedding(spec, device=torch.device("cpu"))(torch.arange(9), dtype=torch.float32)
    assert torch.allclose(cos**2 + sin**2, torch.full((9, 1, 64), 0.25))
