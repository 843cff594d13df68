"""Llama: a dense decoder with grouped-query attention (arXiv 2302.13971, 2307.09288)."""

from collections.abc import Iterator
from typing import Any

from parallel.models import decoder
from parallel.models.description import ModelDescription, Split, TensorSpec


def describe(config: dict[str, Any]) -> ModelDescription:
    """The description of a checkpoint with model_type `llama`."""
    decoder.require(config, "hidden_act", "silu")
    decoder.require(config, "attention_bias", False)
    decoder.require(config, "mlp_bias", False)
    heads = decoder.positive(config, "num_attention_heads")
    num_layers = decoder.positive(config, "num_hidden_layers")
    return ModelDescription(
        family="llama",
        num_layers=num_layers,
        hidden_size=decoder.positive(config, "hidden_size"),
        vocab_size=decoder.positive(config, "vocab_size"),
        num_heads=heads,
        num_kv_heads=decoder.positive(config, "num_key_value_heads", default=heads),
        head_dim=decoder.head_dim(config),
        intermediate_size=decoder.positive(config, "intermediate_size"),
        experts=None,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=decoder.rope(config),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_positions=decoder.positive(config, "max_position_embeddings", default=2048),
        checkpoint_dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        cache_groups=decoder.full_attention(num_layers=num_layers, head_size=decoder.head_dim(config)),
        tensors=tuple(_tensors(config, num_layers=num_layers)),
    )


def _tensors(config: dict[str, Any], *, num_layers: int) -> Iterator[TensorSpec]:
    yield from decoder.outer_tensors(config)
    for layer in range(num_layers):
        yield from decoder.attention_tensors(config, layer=layer)
        yield from decoder.feed_forward_tensors(
            ("gate_proj", "up_proj", "down_proj"),
            prefix=f"model.layers.{layer}.mlp",
            hidden=decoder.positive(config, "hidden_size"),
            width=decoder.positive(config, "intermediate_size"),
            layer=layer,
            split=Split.DENSE_INTERMEDIATE,
        )
