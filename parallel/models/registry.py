"""Finds a model's description by the `model_type` of its config.json. A new family is one line here."""

from pathlib import Path

from parallel.checkpoint.model_files import read_json_object
from parallel.checkpoint.tied_output import untie_where_stored
from parallel.models import glm4_moe, gpt_oss, llama, mixtral, qwen2, qwen3, qwen3_moe
from parallel.models.description import Describe, ModelDescription
from parallel.models.quantisation import require_readable

FAMILIES: dict[str, Describe] = {
    "glm4_moe": glm4_moe.describe,
    "gpt_oss": gpt_oss.describe,
    "llama": llama.describe,
    "mixtral": mixtral.describe,
    "qwen2": qwen2.describe,
    "qwen3": qwen3.describe,
    "qwen3_moe": qwen3_moe.describe,
}


def describe_checkpoint(folder: Path) -> ModelDescription:
    """The description of the checkpoint in `folder`; ValueError where its config cannot be read or served.

    A config that ties the output to the embedding counts as untied where the weight files hold an output of their own.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{path} does not exist: a model is a folder with config.json and *.safetensors")
    config = read_json_object(path)
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"{path} has model_type {family!r}: the families that run are {', '.join(FAMILIES)}")
    try:
        require_readable(config, family=family)
        return FAMILIES[family](untie_where_stored(config, folder=folder))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
