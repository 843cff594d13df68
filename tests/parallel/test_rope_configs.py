"""What a config may say of its rotary embedding: defaults as transformers takes them, and the sentences that refuse."""

from typing import Any

import pytest

from parallel.models.description import LinearScaling, RopeSpec, YarnScaling
from parallel.models.rope import read_rope
from tests.tiny_models import describe, llama, mixtral

YARN = {"rope_type": "yarn", "factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def rope(**changes: Any) -> RopeSpec:
    """The rope of a tiny model with head_dim 4 and 512 positions."""
    return describe(llama(**changes)).attention[0].rope


def test_theta_is_the_parameters_own_before_the_configs_before_the_familys() -> None:
    assert rope(rope_parameters={"rope_theta": 5.0}, rope_theta=7.0).theta == 5.0
    assert rope(rope_parameters={}, rope_theta=7.0).theta == 7.0
    assert (rope().theta, describe(mixtral()).attention[0].rope.theta) == (10000.0, 1e6)


def test_the_older_spelling_says_the_same_and_comes_first() -> None:
    older = {"type": "linear", "factor": 2.0}
    assert rope(rope_scaling=older) == rope(rope_parameters={"rope_type": "linear", "factor": 2.0})
    assert rope(rope_scaling=older, rope_parameters={"rope_type": "default"}).scaling == LinearScaling(factor=2.0)


def test_the_original_length_is_beside_the_parameters_or_in_them_or_the_models() -> None:
    def original(**changes: Any) -> int:
        scaling = rope(**changes).scaling
        assert isinstance(scaling, YarnScaling)
        return scaling.original_positions

    inside = {**YARN, "original_max_position_embeddings": 128}
    assert original(rope_parameters=YARN) == 512
    assert original(rope_parameters=inside) == 128
    assert original(rope_parameters=inside, original_max_position_embeddings=64) == 64
    assert original(rope_scaling={**inside, "factor": None}) == 128


def test_positions_go_as_far_as_the_scaling_stretches_them() -> None:
    assert rope().max_positions == 512
    assert rope(rope_parameters={"rope_type": "linear", "factor": 2.5}).max_positions == 1280
    assert rope(rope_parameters=YARN).max_positions == 2048
    assert rope(rope_parameters={**YARN, "original_max_position_embeddings": 64}).max_positions == 512
    assert rope(rope_parameters={**LLAMA3, "original_max_position_embeddings": 64}).max_positions == 512


def test_what_would_depend_on_chunks_ends_where_its_frequencies_do_and_says_so() -> None:
    dynamic = rope(rope_parameters={"rope_type": "dynamic", "factor": 4.0})
    assert (dynamic.max_positions, dynamic.scaling) == (512, None)
    assert "'dynamic' changes its frequencies beyond 512 positions" in str(dynamic.limit_reason)
    capped = rope(rope_parameters={**LONG, "original_max_position_embeddings": 128})
    assert capped.max_positions == 128
    assert "'longrope' changes its frequencies beyond 128 positions" in str(capped.limit_reason)
    assert rope(rope_parameters=LONG).limit_reason is None


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ("yarn", "rope parameters 'yarn': they must be a mapping"),
        ({"rope_type": "su"}, "rope type 'su': those that run are default, linear, dynamic, yarn, longrope, llama3"),
        ({"rope_type": ["yarn"]}, "rope type ['yarn']"),
        ({"full_attention": {"rope_type": "default"}}, "by kind of layer (full_attention)"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: this family rotates whole heads"),
        ({"rope_theta": "high"}, "rope_theta = 'high': it must be a number of 1 or more (rope type 'default')"),
        ({"rope_type": "linear"}, "factor = None: it must be a number of 1 or more (rope type 'linear')"),
        ({"rope_type": "linear", "factor": 0.5}, "factor = 0.5"),
        ({"rope_type": "dynamic", "factor": float("inf")}, "factor = inf"),
        ({"rope_type": "yarn"}, "factor = None: it must be a number of 1 or more (rope type 'yarn')"),
        ({**YARN, "beta_fast": 1, "beta_slow": 2}, "beta_fast = 1, less than beta_slow = 2"),
        ({**YARN, "attention_factor": -1.0}, "attention_factor = -1.0: it must be a number of 0 or more"),
        ({**YARN, "original_max_position_embeddings": 0.5}, "original_max_position_embeddings = 0.5"),
        (
            {"rope_type": "longrope", "short_factor": [1, 1]},
            "long_factor = None: it must be a list of 2 numbers",
        ),
        ({**LONG, "short_factor": [1.0]}, "short_factor = a list of 1: it must be a list of 2 numbers"),
        ({**LONG, "short_factor": [1.0, 0]}, "short_factor = [1.0, 0]: they must be numbers above 0"),
        ({**LONG, "short_factor": [1.0, float("inf")]}, "they must be numbers above 0"),
        ({**LONG, "long_factor": [1.0, 10**400]}, "they must be numbers above 0"),
        ({**LONG, "original_max_position_embeddings": 1}, "original_max_position_embeddings = 1: it must be 2 or more"),
        ({"rope_type": "linear", "factor": 1e9}, "asks for 512000000000 positions: they must be at most 2147483647"),
        ({"rope_type": "linear", "factor": 1e308}, "factor = 1e+308"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor = None"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor = 1: it must be above low_freq_factor = 1"),
    ],
)
def test_what_cannot_be_computed_is_refused_with_key_and_value(parameters: object, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        rope(rope_parameters=parameters)
    assert sentence in str(caught.value)


def test_an_odd_head_cannot_be_rotated() -> None:
    with pytest.raises(ValueError, match="head_dim = 5: rotary embedding pairs its elements, so it must be even"):
        rope(head_dim=5)


def test_the_rotated_part_is_the_parameters_own_before_the_configs_and_whole_without_either() -> None:
    def rotary_dim(config: dict[str, Any]) -> int:
        return read_rope({"max_position_embeddings": 512, **config}, head_dim=16, may_be_partial=True).rotary_dim

    inside = {"rope_type": "default", "partial_rotary_factor": 0.25}
    assert rotary_dim({"rope_parameters": inside, "partial_rotary_factor": 0.5}) == 4
    assert rotary_dim({"rope_scaling": None, "partial_rotary_factor": 0.5}) == 8
    assert rotary_dim({"partial_rotary_factor": None}) == rotary_dim({}) == 16


@pytest.mark.parametrize("factor", [0.05, 0.2, 1.5, "half", float("nan")])
def test_a_part_that_has_no_pairs_or_is_more_than_a_head_is_refused(factor: object) -> None:
    config = {"max_position_embeddings": 512, "partial_rotary_factor": factor}
    with pytest.raises(ValueError, match=r"config\.json has partial_rotary_factor = "):
        read_rope(config, head_dim=16, may_be_partial=True)
