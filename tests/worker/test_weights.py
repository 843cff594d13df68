"""A rank reads its own slices of a checkpoint and nothing of an expert that it does not own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from parallel.model_share import ModelShare
from parallel.models.registry import describe_checkpoint
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape
from tests.harness.checkpoints import Oracle
from worker.weights import Weights, load_weights


def load(folder: Path, shape: ReplicaShape, rank: int, *, dtype: torch.dtype = torch.float32) -> Weights:
    slices = ModelShare(
        description=describe_checkpoint(folder), shape=shape, coordinates=shape.coordinates(rank)
    ).slices()
    return load_weights(folder, slices, dtype=dtype, device=torch.device("cpu"), progress=lambda fraction: None)


def test_each_expert_is_read_by_its_owner_alone(mixtral: Oracle) -> None:
    shape = ReplicaShape(attention=AttentionSizes(dp=4), experts=ExpertSizes(ep=4))
    whole = load_file(mixtral.folder / "model.safetensors")
    for rank in range(4):
        weights = load(mixtral.folder, shape, rank)
        for name, tensor in whole.items():
            if ".experts." in name:
                expert = int(name.split(".experts.")[1].split(".")[0])
                assert (name in weights) == (expert // 2 == rank)
            if name in weights:
                assert torch.equal(weights[name], tensor)


@pytest.mark.parametrize("tp", [2, 3, 6])
def test_slices_of_all_ranks_put_together_are_the_tensor_padded_with_zeros(mixtral: Oracle, tp: int) -> None:
    shape = ReplicaShape(attention=AttentionSizes(tp=tp), experts=ExpertSizes(moe_tp=tp))
    whole = load_file(mixtral.folder / "model.safetensors")
    parts = [load(mixtral.folder, shape, rank) for rank in range(tp)]
    for name, dim in (
        ("model.embed_tokens.weight", 0),
        ("model.layers.1.self_attn.q_proj.weight", 0),
        ("model.layers.1.self_attn.o_proj.weight", 1),
        ("model.layers.2.block_sparse_moe.experts.3.w1.weight", 0),
        ("model.layers.2.block_sparse_moe.experts.3.w2.weight", 1),
    ):
        joined = torch.cat([part[name] for part in parts], dim=dim)
        size = whole[name].shape[dim]
        assert torch.equal(joined.narrow(dim, 0, size), whole[name])
        assert joined.narrow(dim, size, joined.shape[dim] - size).abs().sum() == 0


def test_gates_are_held_in_float32_whatever_the_dtype(mixtral: Oracle) -> None:
    shape = ReplicaShape(attention=AttentionSizes(), experts=ExpertSizes())
    weights = load(mixtral.folder, shape, 0, dtype=torch.bfloat16)
    gate = "model.layers.1.block_sparse_moe.gate.weight"
    assert torch.equal(weights[gate], load_file(mixtral.folder / "model.safetensors")[gate])
    assert weights["model.layers.1.block_sparse_moe.experts.3.w1.weight"].dtype == torch.bfloat16


def test_a_shape_that_differs_from_the_config_is_told_with_both(llama: Oracle, tmp_path: Path) -> None:
    config = (llama.folder / "config.json").read_text().replace('"intermediate_size": 80', '"intermediate_size": 96')
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").symlink_to(llama.folder / "model.safetensors")
    shape = ReplicaShape(attention=AttentionSizes(), experts=None)
    with pytest.raises(ValueError, match=r"of shape \(80, 48\), its config.json asks for \(96, 48\)"):
        load(tmp_path, shape, 0)


def test_a_tied_output_is_the_embedding_once_where_a_rank_has_the_same_part_of_both(
    mixtral: Oracle, tmp_path: Path
) -> None:
    config = json.loads((mixtral.folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(mixtral.folder / "model.safetensors")
    save_file({name: tensors[name] for name in tensors if name != "lm_head.weight"}, tmp_path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    for shares_output in (False, True):
        experts = ExpertSizes(ep=2)
        shape = ReplicaShape(attention=AttentionSizes(dp=2), experts=experts, shares_output=shares_output)
        weights = load(tmp_path, shape, 1)
        output = weights["lm_head.weight"]
        is_same = output.data_ptr() == weights["model.embed_tokens.weight"].data_ptr()
        assert is_same is not shares_output
        half = -(-len(embedding) // 2)
        wanted = embedding[half:] if shares_output else embedding
        assert torch.equal(output[: len(wanted)], wanted)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_matrices_may_stay_as_the_file_has_them_and_all_else_is_in_the_dtype_asked_for(
    mixtral: Oracle, stored: torch.dtype, tmp_path: Path
) -> None:
    whole = {
        # One tensor of the checkpoint has more bits than the others.
        name: tensor if name.endswith("layers.0.self_attn.q_proj.weight") else tensor.to(stored)
        for name, tensor in load_file(mixtral.folder / "model.safetensors").items()
    }
    save_file(whole, tmp_path / "model.safetensors")
    shutil.copy(mixtral.folder / "config.json", tmp_path)
    shape = ReplicaShape(attention=AttentionSizes(tp=3), experts=ExpertSizes(moe_tp=3))
    slices = list(
        ModelShare(description=describe_checkpoint(tmp_path), shape=shape, coordinates=shape.coordinates(1)).slices()
    )
    weights = load_weights(
        tmp_path, slices, dtype=torch.float32, matrices=stored, device=torch.device("cpu"), progress=lambda _: None
    )
    for part in slices:
        name = part.spec.name
        kept = part.is_matrix and whole[name].dtype == stored
        assert weights[name].dtype == (stored if kept else torch.float32), name
    settings = EngineSettings(weights=str(stored).removeprefix("torch."))
    extra = sum(part.num_elements * 2 for part in slices if part.spec.name.endswith("layers.0.self_attn.q_proj.weight"))
    held = sum(weights[part.spec.name].nbytes for part in slices)
    assert held == sum(part.num_bytes(settings) for part in slices) + extra
