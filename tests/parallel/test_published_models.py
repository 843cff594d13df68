"""Descriptions of published models: how many weights they have, and what a rank of a real layout reads."""

from math import prod
from typing import Any

import pytest

from parallel.model_share import ModelShare, TensorSlice
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape
from parallel.sharding import Interval
from tests.published_configs import GLM_4_5, GPT_OSS_120B
from tests.tiny_models import describe


@pytest.mark.parametrize(
    ("config", "num_weights"),
    [(GLM_4_5, 352_797_829_024), (GPT_OSS_120B, 116_829_156_672)],
    ids=["GLM-4.5", "gpt-oss-120b"],
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
    assert down.num_bytes(dtype_bytes=2) == 2880 * 360 * 2
