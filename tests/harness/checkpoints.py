"""Random tiny checkpoints, written as transformers writes them, and what transformers makes of prompts with them."""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from proto import control_pb2
from worker.kernels.interface import Draw
from worker.kernels.torch_sampler import draw_tokens

VOCAB_SIZE = 211
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.25,
}
_SWEEP_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}
#: Beyond this position a scaled rope differs from the default, or cannot be served; less than the longest prompt.
ORIGINAL_POSITIONS = 256
_ORIGINAL: dict[str, Any] = {"original_max_position_embeddings": ORIGINAL_POSITIONS}
_YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, **_ORIGINAL}
_UNTRUNCATED: dict[str, Any] = {"rope_theta": 150000.0, "truncate": False, **_YARN}
#: Llama's changes for each rope kind. The last two are served to their original length alone, so it is longer.
ROPES: dict[str, dict[str, Any]] = {
    "linear": {
        "max_position_embeddings": ORIGINAL_POSITIONS,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0},
    },
    "yarn": {"rope_parameters": _YARN},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "rope_theta": 5e5,
            **_ORIGINAL,
        },
    },
    "dynamic": {"max_position_embeddings": 640, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.0, 4.0],
            "long_factor": [1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0],
            "original_max_position_embeddings": 640,
        },
    },
}


#: Of the sweep's gpt-oss: shorter than a zigzag block may be, and longer than a chunk.
SWEEP_WINDOWS = {"gpt_oss": 13, "gpt_oss_wide": 45}
#: Where the usual one would bring a gate near a tie (tests/engine/test_gate_margins.py).
_SWEEP_SEEDS = {"glm4_moe": 17, "gpt_oss": 7, "gpt_oss_wide": 7}
#: What every GLM here has.
_GLM: dict[str, Any] = {
    "attention_bias": True,
    "use_qk_norm": True,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
    "num_nextn_predict_layers": 1,
}


@dataclass(frozen=True, kw_only=True)
class OracleAnswer:
    """The tokens that follow one prompt by transformers' logits, and these [n, V]."""

    token_ids: tuple[int, ...]
    logits: npt.NDArray[np.float32]


class Oracle:
    """transformers with the checkpoint in `folder`, one prompt at a time, unpadded. Its `answer` is greedy."""

    def __init__(self, folder: Path, model: Any) -> None:
        self.folder = folder
        self._model = model
        self.answer = functools.lru_cache(maxsize=256)(self._answer)

    def gates(self) -> list[Any]:
        """The gates of all layers, in order."""
        return [module for name, module in self._model.named_modules() if name.endswith(("mlp.gate", "mlp.router"))]

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The model's own, by name: one that is changed before the first answer changes all of them."""
        yield from self._model.named_parameters()

    @torch.inference_mode()
    def run(self, token_ids: Sequence[int]) -> None:
        """One forward over `token_ids`."""
        self._model(torch.tensor([token_ids]), use_cache=False)

    def drawn(self, prompt_ids: tuple[int, ...], num_tokens: int, sampling: control_pb2.Sampling) -> OracleAnswer:
        """The same with `num_tokens` drawn by `sampling`."""
        return self.answer(prompt_ids, num_tokens, sampling.SerializeToString(deterministic=True))

    @torch.inference_mode()
    def _answer(self, prompt_ids: tuple[int, ...], num_tokens: int, sampling: bytes = b"") -> OracleAnswer:
        how = control_pb2.Sampling.FromString(sampling)
        ids, cache, token_ids, logits = torch.tensor([prompt_ids]), None, [], []
        for position in range(len(prompt_ids), len(prompt_ids) + num_tokens):
            out = self._model(ids, cache=cache, use_cache=True)
            cache = out.past_key_values
            row = out.logits[:, -1].float()
            logits.append(row[0].numpy())
            token_ids.append(int(draw_tokens(row, [Draw(sampling=how, position=position)])))
            ids = torch.tensor([[token_ids[-1]]])
        return OracleAnswer(token_ids=tuple(token_ids), logits=np.stack(logits))


def tiny_llama(folder: Path) -> Oracle:
    """A random Llama with tied embeddings."""
    torch.manual_seed(1)
    return _save(LlamaForCausalLM(LlamaConfig(**_SIZES, intermediate_size=80, tie_word_embeddings=True)), folder)


def tiny_scaled_llama(folder: Path, *, rope: str) -> Oracle:
    """A random Llama with a rope of `ROPES`."""
    torch.manual_seed(3)
    changes = ROPES[rope]
    parameters = {"rope_theta": 10000.0, **changes["rope_parameters"]}
    config = LlamaConfig(**{**_SIZES, **changes, "rope_parameters": parameters}, intermediate_size=80)
    return _save(LlamaForCausalLM(config), folder)


def tiny_mixtral(folder: Path) -> Oracle:
    """A random Mixtral with 2 of 8 experts and skewed gates: some experts get most rows, others few or none."""
    torch.manual_seed(2)
    sizes = {**_SIZES, "initializer_range": 0.12}
    config = MixtralConfig(**sizes, intermediate_size=40, num_local_experts=8, num_experts_per_tok=2)
    return _save(_with_skewed_gates(MixtralForCausalLM(config)), folder)


def tiny_qwen2(folder: Path) -> Oracle:
    """A random Qwen2."""
    torch.manual_seed(4)
    config = Qwen2Config(**_SIZES, intermediate_size=80)
    return _save(_with_random_vectors(Qwen2ForCausalLM(config)), folder)


def tiny_qwen3(folder: Path) -> Oracle:
    """A random Qwen3; its heads together are wider than its rows (as _SIZES has it), and its rope is scaled."""
    torch.manual_seed(5)
    config = Qwen3Config(**_SIZES, intermediate_size=80, rope_parameters={"rope_theta": 1e4, **_YARN})
    return _save(_with_random_vectors(Qwen3ForCausalLM(config)), folder)


def tiny_qwen3_moe(folder: Path, **changes: Any) -> Oracle:
    """A random Qwen3-MoE with 3 of 8 experts and skewed gates; `changes` to its config say which layers are dense."""
    torch.manual_seed(6)
    sizes = {**_SIZES, "initializer_range": 0.12, "intermediate_size": 80, "moe_intermediate_size": 40}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts=8, num_experts_per_tok=3, **changes))
    return _save(_with_skewed_gates(_with_random_vectors(model)), folder)


def tiny_glm4_moe(folder: Path, **changes: Any) -> Oracle:
    """A random GLM-4.5: dense, experts, experts, of which 3 of 8 from 2 of 4 groups; a layer beyond, not to be read."""
    torch.manual_seed(25)
    sizes = {**_SIZES, "initializer_range": 0.12, "intermediate_size": 80, "moe_intermediate_size": 40}
    groups = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
    config = Glm4MoeConfig(**{**sizes, **groups, **_GLM, **changes})
    return _with_prediction_layer(_save(_with_skewed_gates(_with_random_vectors(Glm4MoeForCausalLM(config))), folder))


def tiny_gpt_oss(folder: Path, **changes: Any) -> Oracle:
    """A random gpt-oss, 3 of 8 experts; its limit cuts often, its window is shorter than a prompt and a chunk."""
    torch.manual_seed(21)
    sizes = {**_SIZES, "initializer_range": 0.12, "intermediate_size": 40, "num_local_experts": 8}
    own = {"num_experts_per_tok": 3, "swiglu_limit": 0.6, "sliding_window": 37, "rope_parameters": _UNTRUNCATED}
    config = GptOssConfig(**{**sizes, **own, **changes})
    return _save(_with_skewed_gates(_with_random_vectors(GptOssForCausalLM(config))), folder)


def mxfp4_gpt_oss(folder: Path) -> Oracle:
    """A random gpt-oss as it is published, its experts' weights in blocks, read by transformers out of the same files.

    A third of an expert begins inside a block.
    """
    tiny_gpt_oss(folder, hidden_size=64, intermediate_size=64)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*blocks, 16), dtype=torch.uint8)
        # Powers of two from 1/64 to 1/16.
        tensors[f"{name}_scales"] = torch.randint(121, 124, blocks, dtype=torch.uint8)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    return from_folder(folder, GptOssForCausalLM)


def sweep_model(folder: Path, *, family: str, num_layers: int) -> Oracle:
    """A random model whose heads, widths and vocabulary take many splits, some of them with padding.

    Those with experts have 24, of which 3 are chosen.
    """
    torch.manual_seed(_SWEEP_SEEDS.get(family, 3))
    sizes = {**_SIZES, **_SWEEP_SIZES, "num_hidden_layers": num_layers}
    makers: dict[str, Callable[[], Any]] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=44, tie_word_embeddings=False)),
        "mixtral": lambda: MixtralForCausalLM(
            MixtralConfig(**sizes, intermediate_size=20, num_local_experts=24, num_experts_per_tok=3)
        ),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**sizes, intermediate_size=44, tie_word_embeddings=True)),
        "qwen3": lambda: Qwen3ForCausalLM(
            Qwen3Config(**sizes, intermediate_size=44, rope_parameters={"rope_theta": 1e4, **_YARN})
        ),
        "qwen3_moe": lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **sizes,
                intermediate_size=44,
                moe_intermediate_size=20,
                num_experts=24,
                num_experts_per_tok=3,
                norm_topk_prob=False,
                mlp_only_layers=[1],
            )
        ),
        "gpt_oss": lambda: GptOssForCausalLM(
            GptOssConfig(
                **sizes,
                intermediate_size=20,
                num_local_experts=24,
                num_experts_per_tok=3,
                swiglu_limit=0.6,
                sliding_window=SWEEP_WINDOWS[family],
                rope_parameters=_UNTRUNCATED,
            )
        ),
        "glm4_moe": lambda: Glm4MoeForCausalLM(
            Glm4MoeConfig(
                **sizes,
                intermediate_size=44,
                moe_intermediate_size=20,
                n_routed_experts=24,
                num_experts_per_tok=3,
                n_group=6,
                topk_group=3,
                **_GLM,
            )
        ),
    }
    oracle = _save(_with_skewed_gates(_with_random_vectors(makers[family.removesuffix("_wide")]())), folder)
    return _with_prediction_layer(oracle) if family == "glm4_moe" else oracle


def from_folder(folder: Path, model_class: Any) -> Oracle:
    """A checkpoint that is there already."""
    return Oracle(folder, model_class.from_pretrained(folder, dtype=torch.float32).eval())


@torch.no_grad()
def _with_random_vectors(model: Any) -> Any:
    """Biases and the weights of norms drawn anew: a fresh model's are 0 and 1, so that one left out would not show.

    A bias may be a buffer, as that of a choice is, or have two dimensions, as experts' have.
    """
    for name, vector in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("bias"):
            vector.copy_(torch.randn_like(vector) * 0.5)
        elif vector.ndim == 1 and name.endswith(("weight", "sinks")):
            vector.copy_(torch.rand_like(vector) + 0.5)
    return model


@torch.no_grad()
def _with_skewed_gates(model: Any) -> Any:
    """Gates that send most rows to some experts, and few or none to others."""
    for name, weight in model.named_parameters():
        if name.endswith(("mlp.gate.weight", "mlp.router.weight")):
            weight.mul_(torch.linspace(1.0, 6.0, len(weight)).unsqueeze(1))
    return model


def _with_prediction_layer(oracle: Oracle) -> Oracle:
    """The checkpoint with a layer that drafts further tokens, as GLM-4.5 is published; transformers saves none."""
    file = oracle.folder / "model.safetensors"
    tensors = load_file(file)
    numbers = [int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.")]
    last, extra = f"model.layers.{max(numbers)}.", f"model.layers.{max(numbers) + 1}."
    layer = {name.replace(last, extra): torch.randn_like(value) for name, value in tensors.items() if last in name}
    hidden = len(tensors["model.norm.weight"])
    layer[f"{extra}eh_proj.weight"] = torch.randn(hidden, 2 * hidden)
    for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight"):
        layer[extra + name] = torch.randn(hidden)
    for name in ("embed_tokens.weight", "shared_head.head.weight"):
        layer[extra + name] = torch.randn(VOCAB_SIZE, hidden)
    save_file({**tensors, **layer}, file, metadata={"format": "pt"})
    return oracle


def _save(model: Any, folder: Path) -> Oracle:
    model.eval().save_pretrained(folder)
    vocabulary = {f"w{index}": index for index in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return Oracle(folder, model)
