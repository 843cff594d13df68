"""Descriptions of models: what a config.json may say, and what is refused with the key and the value."""

from collections.abc import Callable
from pathlib import Path

import pytest

from parallel.models.gates import Activation, GateSpec, Scoring
from parallel.models.gpt_oss import layer_windows
from parallel.models.quantisation import require_readable
from parallel.models.registry import describe_checkpoint
from tests.tiny_models import (
    describe,
    glm4_moe,
    gpt_oss,
    llama,
    mixtral,
    mxfp4_gpt_oss,
    qwen2,
    qwen3,
    qwen3_moe,
    write_config,
)


def test_a_dense_model_has_a_width_and_no_experts() -> None:
    description = describe(llama())
    assert (description.intermediate_size, description.experts) == (20, None)
    assert len(description.tensors) == 3 + 4 * 9


def test_a_mixture_has_experts_and_no_width() -> None:
    description = describe(mixtral())
    assert description.intermediate_size is None
    assert description.experts is not None
    assert (description.experts.num_experts, description.experts.top_k) == (8, 2)
    assert len(description.tensors) == 3 + 4 * (6 + 1 + 8 * 3)


def test_a_tied_output_is_the_embedding_in_the_files() -> None:
    def in_files(*, tied: bool) -> list[str]:
        specs = {spec.name: spec for spec in describe(llama(tie_word_embeddings=tied)).tensors}
        return [place.name for place in specs["lm_head.weight"].in_files]

    assert in_files(tied=True) == ["model.embed_tokens.weight"]
    assert in_files(tied=False) == ["lm_head.weight"]


def test_tensor_names_are_distinct() -> None:
    for config in (llama(), mixtral(), qwen2(), qwen3(), qwen3_moe(mlp_only_layers=[0]), glm4_moe(), gpt_oss()):
        names = [spec.name for spec in describe(config).tensors]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vocab_size": 0}, "vocab_size = 0: it must be a positive integer"),
        ({"hidden_size": "32"}, "hidden_size = '32': it must be a positive integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True"),
        ({"num_hidden_layers": 2**63}, "num_hidden_layers = 9223372036854775808: it must be at most 10000"),
        ({"num_local_experts": 10**9}, "num_local_experts = 1000000000: it must be at most 10000"),
        ({"max_position_embeddings": 10**400}, "it must be at most 2147483647"),
        ({"num_nextn_predict_layers": 10**400}, "it must be at most 2147483647"),
        ({"rms_norm_eps": 10**400}, "it must be a number of 0 or more"),
        ({"rope_theta": float("inf")}, "rope_theta = inf"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': only 'silu' runs yet"),
        ({"attention_bias": True}, "attention_bias = True: only False runs yet"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9, more than num_local_experts = 8"),
        ({"sliding_window": 128}, "sliding_window = 128"),
    ],
)
def test_what_the_engine_does_not_compute_is_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        describe(mixtral(**changes))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"use_sliding_window": True}, "use_sliding_window = True: only False runs yet"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types[1] = 'sliding_attention'"),
        ({"layer_types": 4}, "layer_types = 4: it must be a list of kinds"),
    ],
)
@pytest.mark.parametrize("family", [qwen2, qwen3, qwen3_moe])
def test_windows_that_are_on_are_refused(
    family: Callable[..., dict[str, object]], changes: dict[str, object], sentence: str
) -> None:
    assert describe(family()).cache_groups == describe(llama()).cache_groups
    with pytest.raises(ValueError) as caught:
        describe(family(**changes))
    assert sentence in str(caught.value)


def test_a_norm_over_heads_has_the_size_of_one_and_is_not_cut() -> None:
    norms = [spec for spec in describe(qwen3()).tensors if spec.name.endswith(("q_norm.weight", "k_norm.weight"))]
    assert len(norms) == 2 * 4
    assert all(spec.shape == (4,) and not spec.splits for spec in norms)


@pytest.mark.parametrize(
    ("changes", "expert_layers"),
    [
        ({}, (0, 1, 2, 3)),
        ({"mlp_only_layers": [0, 3]}, (1, 2)),
        ({"decoder_sparse_step": 2}, (1, 3)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1,)),
        ({"mlp_only_layers": [0, 1, 2, 3]}, ()),
    ],
)
def test_layers_are_dense_or_have_experts_as_the_config_says(
    changes: dict[str, object], expert_layers: tuple[int, ...]
) -> None:
    description = describe(qwen3_moe(**changes))
    assert tuple(layer for layer in range(4) if description.has_experts(layer=layer)) == expert_layers
    assert (description.experts is None) == (not expert_layers)
    assert description.intermediate_size == (20 if len(expert_layers) < 4 else None)
    for layer in range(4):
        widths = {spec.shape[0] for spec in description.tensors if spec.layer == layer and "up_proj" in spec.name}
        assert widths == ({12} if layer in expert_layers else {20})


def test_weights_of_experts_are_renormalised_where_the_config_says_so() -> None:
    found = [describe(qwen3_moe(**changes)).experts for changes in ({"norm_topk_prob": True}, {})]
    assert [experts.gate.renormalise for experts in found if experts] == [True, False]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_experts": 0}, "num_experts = 0: it must be a positive integer"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9, more than num_experts = 8"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size = None"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob = 'yes': only True, False runs yet"),
        ({"mlp_only_layers": 3}, "mlp_only_layers = 3: it must be a list of layer numbers"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step = 0"),
        ({"attention_bias": True}, "attention_bias = True: only False runs yet"),
    ],
)
def test_experts_that_cannot_be_are_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        describe(qwen3_moe(**changes))
    assert sentence in str(caught.value)


def test_a_gate_of_glm_is_what_its_config_says() -> None:
    experts = describe(glm4_moe(routed_scaling_factor=2.5, n_shared_experts=2, norm_topk_prob=False)).experts
    assert experts is not None
    assert experts.gate == GateSpec(
        num_experts=8,
        top_k=3,
        scoring=Scoring.SIGMOID,
        renormalise=False,
        scale=2.5,
        has_correction=True,
        num_groups=4,
        kept_groups=2,
    )
    assert (experts.layers, experts.shared_width) == ((1, 2, 3), 24)


@pytest.mark.parametrize(
    ("changes", "names"),
    [({}, set()), ({"attention_bias": False}, {"k_proj.bias"}), ({"use_qk_norm": False}, {"k_norm.weight"})],
)
def test_biases_and_norms_of_glm_are_as_the_config_says(changes: dict[str, object], names: set[str]) -> None:
    found = {spec.name.removeprefix("model.layers.2.self_attn.") for spec in describe(glm4_moe(**changes)).tensors}
    assert {"k_proj.bias", "k_norm.weight"} - found == names


@pytest.mark.parametrize(("first", "num_dense"), [({}, 1), ({"first_k_dense_replace": 0}, 0)])
def test_glm_begins_with_its_dense_layers(first: dict[str, int], num_dense: int) -> None:
    description = describe(glm4_moe(**first))
    assert [layer for layer in range(4) if description.has_experts(layer=layer)] == list(range(num_dense, 4))
    assert description.intermediate_size == (20 if num_dense else None)
    all_dense = describe(glm4_moe(first_k_dense_replace=9))
    assert (all_dense.experts, all_dense.intermediate_size) == (None, 20)


def test_glm_rotates_half_of_a_head_unless_its_config_says_more() -> None:
    assert describe(glm4_moe()).attention[0].rope.rotary_dim == 2
    assert describe(glm4_moe(rope_parameters={"partial_rotary_factor": 1.0})).attention[0].rope.rotary_dim == 4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_group": 3}, "n_group = 3: 8 experts are no equal groups of two or more"),
        ({"n_group": 8}, "n_group = 8: 8 experts are no equal groups of two or more"),
        ({"topk_group": 5}, "topk_group = 5: it must be at most 4"),
        ({"topk_group": 1}, "num_experts_per_tok = 3, more than topk_group = 1 groups of 2 experts have"),
        ({"use_qk_norm": "yes"}, "use_qk_norm = 'yes': only True, False runs yet"),
        ({"routed_scaling_factor": -1}, "routed_scaling_factor = -1"),
        ({"n_shared_experts": 0}, "n_shared_experts = 0: it must be a positive integer"),
        ({"n_routed_experts": 2}, "num_experts_per_tok = 3, more than n_routed_experts = 2"),
    ],
)
def test_a_gate_of_glm_that_cannot_be_is_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        describe(glm4_moe(**changes))
    assert sentence in str(caught.value)


def test_experts_of_gpt_oss_are_clamped_and_their_gate_has_a_bias_in_its_logits() -> None:
    experts = describe(gpt_oss(swiglu_limit=3.0)).experts
    assert experts is not None
    assert experts.activation == Activation(alpha=1.702, up_offset=1.0, limit=3.0)
    assert (experts.gate.scoring, experts.gate.renormalise, experts.gate.has_bias) == (Scoring.SOFTMAX, True, True)


def test_windows_of_gpt_oss_are_in_every_other_layer_unless_its_config_says_where() -> None:
    assert layer_windows(gpt_oss(sliding_window=7)) == (7, None, 7, None)
    kinds = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    assert layer_windows(gpt_oss(sliding_window=7, layer_types=kinds)) == (None, None, 7, None)
    assert layer_windows(gpt_oss(sliding_window=None, layer_types=["full_attention"] * 4)) == (None,) * 4


@pytest.mark.parametrize("layer", range(4))
def test_every_layer_of_gpt_oss_has_a_sink_for_each_query_head(layer: int) -> None:
    (sinks,) = [spec for spec in describe(gpt_oss()).tensors if spec.name == f"model.layers.{layer}.self_attn.sinks"]
    assert (sinks.shape, sinks.in_float32) == ((8,), True)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (gpt_oss(layer_types=["full_attention"]), "layer_types = ['full_attention']: it must be a list of 4 kinds"),
        (gpt_oss(layer_types=["chunked_attention"] * 4), "layer_types[0] = 'chunked_attention': only 'sliding_"),
        (gpt_oss(sliding_window=0), "sliding_window = 0: it must be a positive integer"),
        (gpt_oss(attention_bias=False), "attention_bias = False: only True runs yet"),
        (gpt_oss(swiglu_limit=-1), "swiglu_limit = -1"),
        (mxfp4_gpt_oss(intermediate_size=20), "intermediate_size = 20: MXFP4 has blocks of 32 inputs"),
        (mxfp4_gpt_oss(hidden_size=40), "hidden_size = 40: MXFP4 has blocks of 32 inputs"),
    ],
)
def test_a_gpt_oss_that_cannot_be_is_refused(config: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        describe(config)
    assert sentence in str(caught.value)


def test_mxfp4_is_read_for_gpt_oss_alone() -> None:
    require_readable(mxfp4_gpt_oss(), family="gpt_oss")
    for config, family in (
        (mxfp4_gpt_oss(), "llama"),
        (gpt_oss(quantization_config={"quant_method": "fp8"}), "gpt_oss"),
    ):
        with pytest.raises(ValueError, match="of quantised weights only mxfp4 in gpt_oss runs yet; serve"):
            require_readable(config, family=family)


def test_a_head_size_that_is_left_out_is_the_familys_own() -> None:
    left_out = {key: value for key, value in qwen3().items() if key != "head_dim"}
    assert describe(left_out).cache_groups[0].key.width == 128
    assert describe({**left_out, "model_type": "llama"}).cache_groups[0].key.width == 32 // 8


def test_an_unknown_family_is_refused_with_those_that_run(tmp_path: Path) -> None:
    write_config(tmp_path, llama(model_type="gpt2"))
    with pytest.raises(ValueError, match="model_type 'gpt2': the families that run are glm4_moe, gpt_oss, llama, "):
        describe_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "7", "null", b"\xff\xfe{".decode("latin-1")])
def test_a_config_that_is_no_json_object_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json"):
        describe_checkpoint(tmp_path)


def test_a_missing_config_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        describe_checkpoint(tmp_path)
