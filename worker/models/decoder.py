"""The forward that decoder-only models share: pre-norm residual blocks of attention and feed-forward."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from worker.blocks.parts import Parts
from worker.blocks.step_context import StepContext
from worker.kernels.interface import Norm

#: (x [T, H], residual [T, H], context): the residual, and on top of it what the block makes of x, its norm included.
Block = Callable[[torch.Tensor, torch.Tensor, StepContext], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class DecoderLayer:
    """x + attention(x), then x + feed_forward(x)."""

    attention: Block
    feed_forward: Block


def decoder_layer(parts: Parts, *, layer: int, feed_forward: Block, **attention: bool) -> DecoderLayer:
    """The model's layer `layer` under the names that the Llama family gives its norms and its attention.

    `attention` are the flags of `Parts.attention`.
    """
    prefix = f"model.layers.{layer}"
    norm = parts.norm(f"{prefix}.input_layernorm.weight")
    return DecoderLayer(
        attention=parts.attention(f"{prefix}.self_attn", layer=layer, norm=norm, **attention),
        feed_forward=feed_forward,
    )


def feed_forward_norm(parts: Parts, *, layer: int) -> Norm:
    """The norm before the feed-forward of layer `layer` under the name of the Llama family."""
    return parts.norm(f"model.layers.{layer}.post_attention_layernorm.weight")


def dense_block(parts: Parts, *, layer: int) -> Block:
    """The dense feed-forward of layer `layer` under the names of the Llama family, with its norm."""
    return feed_forward_block(parts, prefix=f"model.layers.{layer}.mlp", norm=feed_forward_norm(parts, layer=layer))


def feed_forward_block(parts: Parts, *, prefix: str, norm: Norm) -> Block:
    """The dense feed-forward at `prefix` under the names of the Llama family."""
    return parts.feed_forward(
        gate=f"{prefix}.gate_proj.weight",
        up=f"{prefix}.up_proj.weight",
        down=f"{prefix}.down_proj.weight",
        norm=norm,
    )


class Sum:
    """Blocks side by side over the same rows, their contributions added up in order."""

    def __init__(self, *blocks: Block) -> None:
        self._blocks = blocks

    def __call__(self, x_TH: torch.Tensor, residual: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Collective as its blocks are."""
        for block in self._blocks:
            residual = block(x_TH, residual, context)
        return residual


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The layers of one stage."""

    layers: Sequence[DecoderLayer]

    def __call__(self, x_TH: torch.Tensor, context: StepContext, *, on_layer: Callable[[int], None]) -> torch.Tensor:
        """x [T, H] through the stage's layers; `on_layer(i)` is called when the i-th of them is computed."""
        for index, layer in enumerate(self.layers):
            x_TH = layer.attention(x_TH, x_TH, context)
            x_TH = layer.feed_forward(x_TH, x_TH, context)
            on_layer(index)
        return x_TH
