"""Descriptions of published models: how many weights they have, and what a rank of a real layout reads."""

from math import prod
from typing import Any

import pytest

from parallel.model_share import ModelShare, TensorSlice
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape
from parallel.sharding import Interval
from tests.kv_bytes import PAGE, page, token_bytes
from tests.published_configs import GLM_4_5, GPT_OSS_120B, LLAMA_3_405B, PUBLISHED, QWEN3_235B_A22B
from tests.tiny_models import describe


@pytest.mark.parametrize(
    ("config", "num_weights"),
    [
        (GLM_4_5, 352_797_829_024),
        (GPT_OSS_120B, 116_829_156_672),
        (LLAMA_3_405B, 405_853_388_800),
        (QWEN3_235B_A22B, 235_093_634_560),
    ],
    ids=["GLM-4.5", "gpt-oss-120b", "Llama 3.1 405B", "Qwen3-235B-A22B"],
)
def test_a_published_model_has_as_many_weights_as_its_makers_say(config: dict[str, Any], num_weights: int) -> None:
    # 116.83 billion; 355 billion as GLM-4.5's paper counts, with the prediction layer, without embedding and output.
    assert sum(prod(spec.shape) for spec in describe(config).tensors) == num_weights


def test_a_slice_of_an_expert_in_blocks_may_begin_inside_one() -> None:
    shape = ReplicaShape(attention=AttentionSizes(dp=8), experts=ExpertSizes(moe_tp=8))
    share = ModelShare(description=describe(GPT_OSS_120B), shape=shape, coordinates=shape.coordinates(3))
    parts: dict[str, TensorSlice] = {part.spec.name: part for part in share.slices()}
    down = parts["model.layers.7.mlp.experts.5.down_proj"]
    # 11.25 blocks of 32 a rank.
    assert down.intervals[1] == Interval(start=1080, end=1440, padded=360)
    assert [tensor.shape for tensor in down.spec.in_files] == [(128, 2880, 90, 16), (128, 2880, 90)]
    gate_up = parts["model.layers.7.mlp.experts.5.gate_up_proj"]
    assert gate_up.intervals[0] == Interval(start=2160, end=2880, padded=720)
    # Widened: two bytes each, whatever the file holds.
    assert down.num_bytes(EngineSettings(dtype="bfloat16")) == 2880 * 360 * 2


@pytest.mark.parametrize(
    ("model", "tp", "expected"),
    [
        # K and V, heads, their size, bytes of a bfloat16, layers; of Qwen3's 4 heads two ranks of tp 8 hold one alike.
        ("Llama 3.1 405B", 1, {"full": 2 * 8 * 128 * 2 * 126}),
        ("Qwen3-235B-A22B", 8, {"full": 2 * 1 * 128 * 2 * 94}),
        ("GLM-4.5", 8, {"full": 2 * 1 * 128 * 2 * 92}),
        ("gpt-oss-120b", 1, {"window 128": 2 * 8 * 64 * 2 * 18, "full": 2 * 8 * 64 * 2 * 18}),
    ],
)
def test_a_token_of_a_published_model_takes_what_its_config_says(model: str, tp: int, expected: dict[str, int]) -> None:
    assert token_bytes(describe(PUBLISHED[model]), tp=tp) == expected


def test_the_page_of_kv_bytes_is_what_the_code_works_out() -> None:
    assert PAGE.read_text() == page(), "write it anew: python -m tests.kv_bytes"
