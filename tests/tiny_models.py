"""Checkpoints small enough to write by hand: a config.json and, where a test needs them, headers of weight files."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from parallel.models.description import ModelDescription
from parallel.models.file_tensors import PLAIN_FLOATS
from parallel.models.registry import FAMILIES

ITEM_BYTES: dict[str, float] = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "F8_E4M3": 1, "I8": 1, "U8": 1, "F4": 0.5}
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


def glm4_moe(**changes: object) -> dict[str, Any]:
    """The config of a tiny model whose first layer is dense; 3 of 8 experts in the others, and a shared one."""
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "n_group": 4}
    attention = {"attention_bias": True, "use_qk_norm": True, "num_nextn_predict_layers": 1}
    return {**TINY, **experts, **attention, "model_type": "glm4_moe", "topk_group": 2, **changes}


def gpt_oss(**changes: object) -> dict[str, Any]:
    """The config of a tiny model with windows in every other layer and 2 of 8 experts."""
    return {**TINY, "num_local_experts": 8, "num_experts_per_tok": 2, "model_type": "gpt_oss", **changes}


def mxfp4_gpt_oss(**changes: object) -> dict[str, Any]:
    """The same as it is published, its experts' weights in blocks."""
    quantised = {"quantization_config": {"quant_method": "mxfp4"}, "hidden_size": 64, "intermediate_size": 96}
    return gpt_oss(**{**quantised, **changes})


def describe(config: dict[str, Any]) -> ModelDescription:
    """The description that the family of `config` gives it."""
    return FAMILIES[config["model_type"]](config)


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """Writes config.json into `folder`, which is made; gives `folder` back."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_checkpoint(folder: Path, config: dict[str, Any], /, **changes: Any) -> Path:
    """All that `router check` reads of a model: `config`, a tokenizer, and weights of zeros that take no room on disk.

    `changes` are what differs in the weight file, as in `write_tensors`.
    """
    write_config(folder, config)
    tokenizer = Tokenizer(WordLevel({f"w{index}": index for index in range(TINY["vocab_size"])}, unk_token="w0"))
    tokenizer.save(str(folder / "tokenizer.json"))
    write_tensors(folder / "model.safetensors", {**shapes(config), **changes})
    return folder


def shapes(config: dict[str, Any]) -> dict[str, Any]:
    """What `write_tensors` takes to write each tensor that the model of `config` reads."""
    tensors = [tensor for spec in describe(config).tensors for tensor in spec.in_files]
    return {
        tensor.name: tensor.shape if tensor.dtypes == PLAIN_FLOATS else (tensor.dtypes[0], tensor.shape)
        for tensor in tensors
    }


def write_tensors(file: Path, tensors: Mapping[str, Any]) -> None:
    """A safetensors file of zeros: for each name a shape (F32), a dtype and a shape, or None for one left out."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, value in tensors.items():
        if value is not None:
            dtype, shape = value if len(value) == 2 and isinstance(value[0], str) else ("F32", value)
            begin, end = end, end + int(prod(shape) * ITEM_BYTES[dtype])
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    content = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(content).to_bytes(8, "little") + content)
        stream.truncate(8 + len(content) + end)


def write_weights(file: Path, *, names: list[str]) -> None:
    """A safetensors file with an F32 tensor of one element for each name."""
    write_tensors(file, dict.fromkeys(names, (1,)))
