"""A checkpoint holds what its description reads, and nothing else: what is not understood is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from parallel.checkpoint.contents import draft_layers, find_faults, require_sound
from parallel.models.registry import describe_checkpoint
from tests import tiny_models
from tests.harness.checkpoints import Oracle
from tests.tiny_models import shapes, write_checkpoint, write_config, write_tensors

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
FAMILIES = {
    "llama": tiny_models.llama(),
    "mixtral": tiny_models.mixtral(),
    "qwen2": tiny_models.qwen2(),
    "qwen3": tiny_models.qwen3(),
    "qwen3_moe": tiny_models.qwen3_moe(mlp_only_layers=[1]),
    "glm4_moe": tiny_models.glm4_moe(),
    "gpt_oss": tiny_models.gpt_oss(),
    "gpt_oss_mxfp4": tiny_models.mxfp4_gpt_oss(),
}


def faults(folder: Path, config: dict[str, Any] | None = None, /, **changes: Any) -> list[str]:
    config = config or tiny_models.llama()
    write_checkpoint(folder, config, **changes)
    return [str(fault) for fault in find_faults(folder, description=tiny_models.describe(config))]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_with_the_tensors_of_its_family_has_no_fault(tmp_path: Path, family: str) -> None:
    assert faults(tmp_path, FAMILIES[family]) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_as_transformers_saves_it_has_no_fault(family: str, request: pytest.FixtureRequest) -> None:
    oracle: Oracle = request.getfixturevalue(family)
    require_sound(oracle.folder)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_every_plain_float_is_read(tmp_path: Path, dtype: str) -> None:
    assert faults(tmp_path, **{Q_PROJ: (dtype, (32, 32))}) == []


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "U8", "F4"])
def test_a_tensor_that_is_no_plain_float_is_refused_with_its_dtype(tmp_path: Path, dtype: str) -> None:
    (found,) = faults(tmp_path, **{Q_PROJ: (dtype, (32, 32))})
    assert f"stores 1 tensor as {dtype}, which is no plain float: {Q_PROJ} in model.safetensors; serve the" in found


@pytest.mark.parametrize(
    "name",
    [
        Q_PROJ + "_scale_inv",
        Q_PROJ.replace("weight", "bias"),
        "lm_head.bias",
        "model.layers.4.input_layernorm.weight",
        "model.layers.04.input_layernorm.weight",
        "model.layers.x.input_layernorm.weight",
        "model.rotary_emb.inv_freq.scale",
        "vision.patch.weight",
        "",
    ],
)
def test_a_tensor_that_nobody_reads_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (found,) = faults(tmp_path, **{name: (3,)})
    assert f"holds 1 tensor that llama does not read: {name} in model.safetensors; " in found


@pytest.mark.parametrize("config", [tiny_models.llama(), tiny_models.qwen3_moe()], ids=["dense", "experts"])
def test_layers_that_draft_further_tokens_are_harmless_and_those_beyond_them_are_not(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    extra = {f"model.layers.{layer}.eh_proj.weight": (2,) for layer in range(4, 7)}
    (found,) = faults(tmp_path, {**config, "num_nextn_predict_layers": 2}, **extra)
    assert "holds 1 tensor" in found and "model.layers.6.eh_proj.weight" in found


def test_layers_that_draft_further_tokens_are_found_where_the_files_hold_them(tmp_path: Path) -> None:
    config = tiny_models.glm4_moe()
    write_checkpoint(tmp_path, config)
    assert draft_layers(tmp_path, description=describe_checkpoint(tmp_path)) == ()
    write_checkpoint(tmp_path, config, **{f"model.layers.4.{name}.weight": (2,) for name in ("eh_proj", "mlp.gate")})
    assert draft_layers(tmp_path, description=describe_checkpoint(tmp_path)) == (4,)


def test_inverse_frequencies_are_harmless_whatever_their_dtype(tmp_path: Path) -> None:
    names = ("model.rotary_emb.inv_freq", "model.layers.3.self_attn.rotary_emb.inv_freq")
    assert faults(tmp_path, **dict.fromkeys(names, ("BF16", (2,)))) == []


def test_missing_tensors_other_shapes_and_left_overs_are_all_told_at_once(tmp_path: Path) -> None:
    found = faults(
        tmp_path,
        **{Q_PROJ: (16, 32), "model.norm.weight": None, "a.weight_scale": ("U8", (1,)), "lm_head.weight": None},
    )
    assert [sentence.partition(" ")[2] for sentence in found] == [
        "lacks 2 tensors that its config.json calls for: model.norm.weight, lm_head.weight; fetch the checkpoint anew, "
        "or correct config.json",
        "holds 1 tensor that llama does not read: a.weight_scale in model.safetensors; where they are scales, serve "
        "the checkpoint that it was quantised from; else one whose config.json and weights belong together",
        f"holds 1 tensor of another shape: {Q_PROJ} in model.safetensors is (16, 32), config.json asks for (32, 32); "
        "serve a checkpoint whose config.json and weights belong together",
    ]


STACK = "model.layers.2.mlp.experts.down_proj"
PLAIN, BLOCKS = tiny_models.gpt_oss(), tiny_models.mxfp4_gpt_oss()


@pytest.mark.parametrize("config", [PLAIN, BLOCKS], ids=["plain", "mxfp4"])
def test_stacks_of_experts_have_no_fault(tmp_path: Path, config: dict[str, Any]) -> None:
    assert faults(tmp_path, config) == []


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (PLAIN, {STACK: None}, f"lacks 1 tensor that its config.json calls for: {STACK}; "),
        (PLAIN, {STACK: (8, 32, 20)}, f"{STACK} in model.safetensors is (8, 32, 20), config.json asks for (8, 20, 32)"),
        (PLAIN, {STACK: ("U8", (8, 20, 32))}, f"1 tensor as U8, which is no plain float: {STACK} in model.safetensors"),
        (PLAIN, {f"{STACK}_bias": (32,)}, f"{STACK}_bias in model.safetensors is (32,), config.json asks for (8, 32)"),
        (PLAIN, {f"{STACK}_scales": ("U8", (8, 32, 1))}, f"gpt_oss does not read: {STACK}_scales in model.safetensors"),
        (BLOCKS, {f"{STACK}_scales": None}, f"lacks 1 tensor that its config.json calls for: {STACK}_scales; "),
        (BLOCKS, {STACK: (8, 96, 64)}, f"gpt_oss does not read: {STACK} in model.safetensors"),
        (BLOCKS, {f"{STACK}_blocks": ("U8", (8, 64, 2, 16))}, "is (8, 64, 2, 16), config.json asks for (8, 64, 3, 16)"),
        (BLOCKS, {f"{STACK}_scales": (8, 64, 3)}, f"as F32, which is not U8: {STACK}_scales in model.safetensors"),
    ],
)
def test_of_stacked_experts_too_what_is_missing_left_over_or_of_another_shape_is_told(
    tmp_path: Path, config: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    (found,) = faults(tmp_path, config, **changes)
    assert words in found


def test_of_many_tensors_the_first_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    scales = {f"{name}_scale": (1,) for name in shapes(tiny_models.mixtral()) if ".experts." in name}
    (found,) = faults(tmp_path, tiny_models.mixtral(), **scales)
    assert "holds 96 tensors" in found and " and 93 more; " in found
    assert len(found) < 600


def sharded(folder: Path, *, num_files: int) -> list[Path]:
    """A sound checkpoint in `num_files` files with an index."""
    write_config(folder, tiny_models.llama())
    tensors = shapes(tiny_models.llama())
    names = [f"model-{index:05d}-of-{num_files:05d}.safetensors" for index in range(num_files)]
    where = {name: names[index % num_files] for index, name in enumerate(tensors)}
    for file in names:
        write_tensors(folder / file, {name: shape for name, shape in tensors.items() if where[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return [folder / name for name in names]


def test_shards_that_are_missing_cut_or_pointers_are_each_told_and_many_are_counted(tmp_path: Path) -> None:
    files = sharded(tmp_path, num_files=9)
    assert require_sound(tmp_path).family == "llama"
    files[1].unlink()
    files[3].write_bytes(files[3].read_bytes()[:-1])
    files[4].write_text("version https://git-lfs.github.com/spec/v1\n")
    for file in files[6:]:
        file.write_bytes(b"")
    found = [str(fault) for fault in find_faults(tmp_path, description=None)]
    assert f"{files[1]} is missing; fetch the checkpoint anew" in found[0]
    assert f"{files[3]} was cut short" in found[1]
    assert f"{files[4]} is a git-lfs pointer" in found[2]
    assert found[3:] == ["3 more of its weight files cannot be read; fetch the checkpoint anew"]


def test_an_index_that_names_tensors_in_the_wrong_file_is_told(tmp_path: Path) -> None:
    sharded(tmp_path, num_files=2)
    path = tmp_path / "model.safetensors.index.json"
    where = json.loads(path.read_text())["weight_map"]
    where["model.norm.weight"] = next(file for file in where.values() if file != where["model.norm.weight"])
    path.write_text(json.dumps({"weight_map": where}))
    (found,) = find_faults(tmp_path, description=describe_checkpoint(tmp_path))
    assert "names 1 tensor that the file does not hold: model.norm.weight in model-0" in found.what


def test_what_a_shard_holds_and_the_index_does_not_name_is_left_over(tmp_path: Path) -> None:
    files = sharded(tmp_path, num_files=2)
    header = shapes(tiny_models.llama())
    where = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    kept = {name: shape for name, shape in header.items() if where[name] == files[0].name}
    write_tensors(files[0], {**kept, "a.weight_scale": (1,)})
    with pytest.raises(ValueError, match=r"does not read: a\.weight_scale"):
        require_sound(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config (quant_method 'fp8')"),
        ("quantization_config", {"quant_algo": "NVFP4"}, "'NVFP4'"),
        ("quantization_config", {"load_in_4bit": True}, "quant_method None"),
        ("quantization_config", "awq", "'awq'"),
        ("quantization_config", {}, "only mxfp4 in gpt_oss runs yet"),
        ("compression_config", {"quant_method": "compressed-tensors"}, "compression_config"),
    ],
)
def test_a_config_that_says_it_is_quantised_is_refused_with_its_kind(
    tmp_path: Path, key: str, value: object, words: str
) -> None:
    write_checkpoint(tmp_path, tiny_models.llama())
    write_config(tmp_path, tiny_models.llama(**{key: value}))
    with pytest.raises(ValueError) as caught:
        require_sound(tmp_path)
    assert words in str(caught.value)
    write_config(tmp_path, tiny_models.llama(**{key: None}))
    require_sound(tmp_path)
