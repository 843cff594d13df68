"""Experts that lie in one tensor: each rank reads its own of them, plain as transformers saves them, or MXFP4."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from parallel.model_share import ModelShare
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape
from tests import tiny_models
from tests.harness.checkpoints import tiny_gpt_oss
from worker.weights import Weights, load_weights

LAYER = "model.layers.1.mlp.experts"
#: Experts of 96 values: moe_tp 5 begins inside a block of 32, and leaves the last rank less than the others.
LAYOUTS = [(1, 1), (4, 1), (2, 2), (1, 5), (1, 7), (8, 3)]


def load(folder: Path, config: dict[str, Any], shape: ReplicaShape, rank: int, *, dtype: torch.dtype) -> Weights:
    share = ModelShare(description=tiny_models.describe(config), shape=shape, coordinates=shape.coordinates(rank))
    slices = list(share.slices())
    weights = load_weights(folder, slices, dtype=dtype, device=torch.device("cpu"), progress=lambda fraction: None)
    held = sum(weights[part.spec.name].nbytes for part in slices)
    settings = EngineSettings(dtype=str(dtype).removeprefix("torch."))
    assert held == sum(part.num_bytes(settings) for part in slices), "bytes are counted as held"
    return weights


def check_experts(
    folder: Path, config: dict[str, Any], layout: tuple[int, int], whole: dict[str, torch.Tensor]
) -> None:
    """Every rank's experts of LAYER are its parts of `whole`, [E, out, in] and biases [E, out], and no others."""
    ep, moe_tp = layout
    shape = ReplicaShape(attention=AttentionSizes(dp=ep * moe_tp), experts=ExpertSizes(ep=ep, moe_tp=moe_tp))
    dtype, width = whole["down_proj"].dtype, whole["down_proj"].shape[2]
    part = -(-width // moe_tp)
    for rank in range(ep * moe_tp):
        weights = load(folder, config, shape, rank, dtype=dtype)
        coordinates = shape.coordinates(rank)
        index = coordinates.moe_tp_rank or 0
        begin, end = min(index * part, width), min((index + 1) * part, width)
        for expert in range(8):
            is_own = expert // (8 // ep) == coordinates.moe_ep_rank
            assert (f"{LAYER}.{expert}.down_proj" in weights) == is_own
            if not is_own:
                continue
            own = {name: weights[f"{LAYER}.{expert}.{name}"] for name in ("gate_up_proj", "down_proj")}
            size = end - begin
            pairs = whole["gate_up_proj"][expert, 2 * begin : 2 * end]
            assert own["gate_up_proj"].shape == (2 * part, whole["gate_up_proj"].shape[2])
            assert torch.equal(own["gate_up_proj"][: 2 * size], pairs)
            assert torch.equal(own["down_proj"][:, :size], whole["down_proj"][expert, :, begin:end])
            bias = weights[f"{LAYER}.{expert}.gate_up_proj_bias"]
            assert torch.equal(bias[: 2 * size], whole["gate_up_proj_bias"][expert, 2 * begin : 2 * end])
            for padded in (own["gate_up_proj"][2 * size :], own["down_proj"][:, size:], bias[2 * size :]):
                assert not padded.any()
            name = f"{LAYER}.{expert}.down_proj_bias"
            assert (name in weights) == (index == 0), "added once, not by each moe_tp rank"
            if index == 0:
                assert torch.equal(weights[name], whole["down_proj_bias"][expert])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_stacks_as_transformers_saves_them_are_read_by_their_owners(layout: tuple[int, int], tmp_path: Path) -> None:
    tiny_gpt_oss(tmp_path, intermediate_size=96)
    config = json.loads((tmp_path / "config.json").read_text())
    stored = load_file(tmp_path / "model.safetensors")
    whole = {name: stored[f"{LAYER}.{name}"] for name in ("gate_up_proj_bias", "down_proj_bias")}
    whole |= {name: stored[f"{LAYER}.{name}"].transpose(1, 2) for name in ("gate_up_proj", "down_proj")}
    check_experts(tmp_path, config, layout, whole)


def write_blocks(folder: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A checkpoint with random blocks, scales apart from them in a file of their own; all its tensors."""
    torch.manual_seed(5)
    tensors = {}
    for name, value in tiny_models.shapes(config).items():
        is_bytes = value[0] == "U8"
        shape = value[1] if is_bytes else value
        # Scales near one, as in published files.
        low, high = (110, 130) if name.endswith("_scales") else (0, 256)
        tensors[name] = torch.randint(low, high, shape, dtype=torch.uint8) if is_bytes else torch.randn(shape)
    scales = {name: value for name, value in tensors.items() if name.endswith("_scales")}
    save_file({name: value for name, value in tensors.items() if name not in scales}, folder / "a.safetensors")
    save_file(scales, folder / "b.safetensors")
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_blocks_are_widened_to_transformers_bits_wherever_a_slice_begins(
    layout: tuple[int, int], dtype: torch.dtype, tmp_path: Path
) -> None:
    config = tiny_models.mxfp4_gpt_oss()
    tensors = write_blocks(tmp_path, config)
    whole = {name: tensors[f"{LAYER}.{name}"].to(dtype) for name in ("gate_up_proj_bias", "down_proj_bias")}
    for name in ("gate_up_proj", "down_proj"):
        packed = [tensors[f"{LAYER}.{name}_{part}"] for part in ("blocks", "scales")]
        whole[name] = convert_moe_packed_tensors(*packed, dtype=dtype).transpose(1, 2)
    check_experts(tmp_path, config, layout, whole)


@pytest.mark.parametrize("part", ["blocks", "scales"])
def test_blocks_or_scales_that_are_not_there_are_told_by_name(part: str, tmp_path: Path) -> None:
    config = tiny_models.mxfp4_gpt_oss()
    tensors = write_blocks(tmp_path, config)
    lacking = f"{LAYER}.down_proj_{part}"
    (tmp_path / "b.safetensors").unlink()
    save_file({name: value for name, value in tensors.items() if name != lacking}, tmp_path / "a.safetensors")
    shape = ReplicaShape(attention=AttentionSizes(), experts=ExpertSizes())
    with pytest.raises(ValueError, match=f"the checkpoint has no tensor {lacking}, which its config.json calls for"):
        load(tmp_path, config, shape, 0, dtype=torch.float32)
