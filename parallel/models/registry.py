"""Finds a model's description by the `model_type` of its config.json. A new family is one line here."""

import json
from pathlib import Path

from parallel.models import llama, mixtral, qwen2, qwen3, qwen3_moe
from parallel.models.description import Describe, ModelDescription

FAMILIES: dict[str, Describe] = {
    "llama": llama.describe,
    "mixtral": mixtral.describe,
    "qwen2": qwen2.describe,
    "qwen3": qwen3.describe,
    "qwen3_moe": qwen3_moe.describe,
}


def describe_checkpoint(folder: Path) -> ModelDescription:
    """The description of the checkpoint in `folder`; ValueError where its config cannot be read or served."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: a model is a folder with config.json and *.safetensors") from None
    except ValueError as error:  # of the JSON, or of the bytes that should be its text
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object: a model's config does")
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"{path} has model_type {family!r}: the families that run are {', '.join(FAMILIES)}")
    try:
        return FAMILIES[family](config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
