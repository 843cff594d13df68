"""The forward that decoder-only models share: pre-norm residual blocks of attention and feed-forward."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from worker.blocks.parts import Parts
from worker.blocks.step_context import StepContext

#: Rows [T, H] to a contribution [T, H].
Block = Callable[[torch.Tensor, StepContext], torch.Tensor]
Norm = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class DecoderLayer:
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    input_norm: Norm
    attention: Block
    post_attention_norm: Norm
    feed_forward: Block


def decoder_layer(parts: Parts, *, layer: int, feed_forward: Block, **attention: bool) -> DecoderLayer:
    """The model's layer `layer` under the names that the Llama family gives its norms and its attention.

    `attention` are the flags of `Parts.attention`.
    """
    prefix = f"model.layers.{layer}"
    return DecoderLayer(
        input_norm=parts.norm(f"{prefix}.input_layernorm.weight"),
        attention=parts.attention(f"{prefix}.self_attn", layer=layer, **attention),
        post_attention_norm=parts.norm(f"{prefix}.post_attention_layernorm.weight"),
        feed_forward=feed_forward,
    )


def dense_block(parts: Parts, *, layer: int) -> Block:
    """The dense feed-forward of layer `layer` under the names of the Llama family."""
    return feed_forward_block(parts, prefix=f"model.layers.{layer}.mlp")


def feed_forward_block(parts: Parts, *, prefix: str) -> Block:
    """The dense feed-forward at `prefix` under the names of the Llama family."""
    return parts.feed_forward(
        gate=f"{prefix}.gate_proj.weight", up=f"{prefix}.up_proj.weight", down=f"{prefix}.down_proj.weight"
    )


class Sum:
    """Blocks side by side: the contributions of all, run in order."""

    def __init__(self, *blocks: Block) -> None:
        self._blocks = blocks

    def __call__(self, x_TH: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Collective as its blocks are: x [T, H] to their contribution [T, H]."""
        first, *rest = self._blocks
        out_TH = first(x_TH, context)
        for block in rest:
            out_TH = out_TH + block(x_TH, context)
        return out_TH


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The layers of one stage."""

    layers: Sequence[DecoderLayer]

    def __call__(self, x_TH: torch.Tensor, context: StepContext, *, on_layer: Callable[[int], None]) -> torch.Tensor:
        """x [T, H] through the stage's layers; `on_layer(i)` is called when the i-th of them is computed."""
        for index, layer in enumerate(self.layers):
            x_TH = x_TH + layer.attention(layer.input_norm(x_TH), context)
            x_TH = x_TH + layer.feed_forward(layer.post_attention_norm(x_TH), context)
            on_layer(index)
        return x_TH
