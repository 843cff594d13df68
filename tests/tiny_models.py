"""Checkpoints small enough to write by hand: a config.json and, where a test needs them, headers of weight files."""

import json
from pathlib import Path
from typing import Any

from parallel.models.description import ModelDescription
from parallel.models.registry import FAMILIES

TINY: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "max_position_embeddings": 512,
    "dtype": "bfloat16",
}


def llama(**changes: object) -> dict[str, Any]:
    """The config of a tiny dense model."""
    return {**TINY, "model_type": "llama", **changes}


def mixtral(**changes: object) -> dict[str, Any]:
    """The config of a tiny model with 8 experts, 2 of them chosen."""
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}
    return {**TINY, "model_type": "mixtral", **experts, **changes}


def qwen2(**changes: object) -> dict[str, Any]:
    """The config of a tiny dense model with biases, its windows named and off."""
    return {**TINY, "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 64, **changes}


def qwen3(**changes: object) -> dict[str, Any]:
    """The config of a tiny dense model with norms over heads."""
    return {**TINY, "model_type": "qwen3", "use_sliding_window": False, "sliding_window": None, **changes}


def qwen3_moe(**changes: object) -> dict[str, Any]:
    """The config of a tiny model with 8 experts in every layer, 2 of them chosen."""
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    return {**TINY, **experts, "model_type": "qwen3_moe", "use_sliding_window": False, **changes}


def describe(config: dict[str, Any]) -> ModelDescription:
    """The description that the family of `config` gives it."""
    return FAMILIES[config["model_type"]](config)


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """Writes config.json into `folder`, which is made; gives `folder` back."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_weights(file: Path, *, names: list[str]) -> None:
    """A safetensors file with an F32 tensor of one element for each name (all over the same four bytes)."""
    tensors = {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in names}
    header = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
