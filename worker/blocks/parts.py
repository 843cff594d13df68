"""Makes the parallel parts of one rank's model out of its weights. Forwards name tensors; the splits are here."""

from collections.abc import Callable, Mapping, Sequence

import torch

from moe.experts import ExpertWeights
from moe.gate import Gate
from moe.linear import Linear
from moe.slots import SlotMap
from parallel.collectives.groups import RankGroups
from parallel.model_share import ModelShare
from parallel.models.description import ModelDescription
from parallel.models.gates import SWIGLU
from worker.blocks.attention import AttentionBlock, AttentionLayer
from worker.blocks.expert_share import ExpertShare
from worker.blocks.experts import ExpertBlock
from worker.blocks.feed_forward import FeedForwardBlock
from worker.blocks.tensor_parallel import EnteringRows, LeavingRows
from worker.blocks.vocabulary import Embedding, Output
from worker.kernels.interface import HeadWeights, Kernels, Norm
from worker.kv_memory import KvMemory
from worker.weights import Weights


class Parts:
    """The factory of one rank's blocks; each weight is taken out of `weights` as its block is made."""

    def __init__(
        self,
        description: ModelDescription,
        *,
        weights: Weights,
        kernels: Kernels,
        dtype: torch.dtype,
        groups: RankGroups,
        memory: KvMemory,
        share: ModelShare,
        expert_share: ExpertShare | None,
    ) -> None:
        self.description = description
        self._weights = weights
        self._kernels = kernels
        self._dtype = dtype
        self._groups = groups
        self._memory = memory
        self._share = share
        self._expert_share = expert_share

    @property
    def shares_output(self) -> bool:
        """Whether the ranks of a stage multiply each other's rows with the output."""
        return self._share.shape.output_sharing > 1

    def has(self, name: str) -> bool:
        """Whether the model has the tensor `name`: what a config may switch off, its forward asks for."""
        return name in self._weights

    def embedding(self, name: str) -> Embedding:
        """The token embedding."""
        return Embedding(self._weights.pop(name), dtype=self._dtype, tp=self._groups["attn_tp"])

    def norm(self, name: str) -> Norm:
        """A norm over the hidden size, for the block behind it, or for several over the same rows."""
        return Norm(weight=self._weights.pop(name), eps=self.description.norm_eps)

    def output(self, *, norm: str, head: str) -> Output:
        """The last norm and the output product."""
        return Output(
            norm=self._kernels.norm(self.norm(norm)),
            head=self._linear(head),
            group=self._groups[self._share.shape.output_axis],
            vocab_size=self.description.vocab_size,
        )

    def attention(
        self,
        prefix: str,
        *,
        layer: int,
        norm: Norm,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm: bool = False,
    ) -> AttentionBlock:
        """The attention of layer `layer`: q_proj, k_proj, v_proj, o_proj of `prefix`, and what the flags add."""
        biases = self._held(f"{prefix}.o_proj.bias") if o_bias else []
        enter, norm_inside = self._enter(norm)
        weights = self._head_weights(prefix, layer=layer, has_biases=qkv_bias, has_head_norms=qk_norm)
        return AttentionBlock(
            enter=enter,
            heads=self._kernels.heads(weights, norm=norm_inside),
            layer=self._attention_layer(prefix, layer=layer),
            leave=self._leave(f"{prefix}.o_proj.weight", biases=biases),
        )

    def feed_forward(self, *, gate: str, up: str, down: str, norm: Norm) -> FeedForwardBlock:
        """A dense feed-forward block of the three tensors named."""
        enter, norm_inside = self._enter(norm)
        gates, ups = self._weights.pop(gate), self._weights.pop(up)
        return FeedForwardBlock(
            enter=enter,
            gated=self._kernels.gated(gates, ups, activation=SWIGLU, norm=norm_inside),
            leave=self._leave(down),
        )

    def experts(self, *, layer: int, norm: Norm, gate: str, expert: str, names: Mapping[str, str]) -> ExpertBlock:
        """The experts of layer `layer` behind the gate named.

        `expert` is a prefix with `{}` for the expert's number, `names` give gate, up, down.
        """

        def weights(index: int) -> ExpertWeights:
            gate, up, down = (
                self._weights.pop(f"{expert.format(index)}.{names[part]}.weight") for part in ("gate", "up", "down")
            )
            return ExpertWeights(gate=gate, up=up, down=down)

        return self._experts(gate, layer=layer, norm=norm, weights=weights)

    def paired_experts(self, *, layer: int, norm: Norm, gate: str, prefix: str) -> ExpertBlock:
        """The same of experts with biases, the rows of whose gate and up lie in turn.

        Expert E's are `prefix`.E.gate_up_proj and down_proj, with _bias each.
        """

        def weights(index: int) -> ExpertWeights:
            gate_up, down = (f"{prefix}.{index}.{name}" for name in ("gate_up_proj", "down_proj"))
            gate, up = _in_turn(self._weights.pop(gate_up))
            held = self._held(f"{down}_bias")
            return ExpertWeights(
                gate=gate,
                up=up,
                down=self._weights.pop(down),
                gate_up_biases=_in_turn(self._weights.pop(f"{gate_up}_bias")),
                down_bias=self._weights.pop(held[0]) if held else None,
            )

        return self._experts(gate, layer=layer, norm=norm, weights=weights)

    def _experts(self, gate: str, *, layer: int, norm: Norm, weights: Callable[[int], ExpertWeights]) -> ExpertBlock:
        experts, share = self.description.experts, self._expert_share
        assert experts is not None and share is not None
        held, slots = share.layers[layer].held, share.layers[layer].slots
        # An expert may have two slots here: it is loaded once.
        loaded = {index: weights(index) for index in sorted(set(held))}
        return ExpertBlock(
            gate=self._gate(gate, norm=norm, slots=slots),
            dispatchers=share.dispatchers,
            experts=self._kernels.experts(
                [loaded[index] for index in held], first=share.first_slot, activation=experts.activation
            ),
        )

    def _gate(self, prefix: str, *, norm: Norm, slots: SlotMap) -> Gate:
        assert self.description.experts is not None
        spec = self.description.experts.gate
        return self._kernels.gate(
            spec,
            weight=self._weights.pop(f"{prefix}.weight"),
            bias=self._weights.pop(f"{prefix}.bias") if spec.has_bias else None,
            correction=self._weights.pop(f"{prefix}.e_score_correction_bias") if spec.has_correction else None,
            norm=norm,
            slots=slots,
        )

    def _attention_layer(self, prefix: str, *, layer: int) -> AttentionLayer:
        attention, group = self.description.attention[layer], self.description.group_of(layer)
        return AttentionLayer(
            rope=attention.rope,
            group=group.name,
            memory=self._memory.layer(layer, group=group, scale=attention.scale),
            sinks_H=self._weights.pop(f"{prefix}.sinks") if attention.has_sinks else None,
        )

    def _head_weights(self, prefix: str, *, layer: int, has_biases: bool, has_head_norms: bool) -> HeadWeights:
        qkv = [f"{prefix}.{name}" for name in ("q_proj", "k_proj", "v_proj")]
        group = self.description.group_of(layer)
        return HeadWeights(
            qkv=[self._weights.pop(f"{name}.weight") for name in qkv],
            biases=[self._weights.pop(f"{name}.bias") for name in qkv] if has_biases else [],
            head_norms=(
                (self.norm(f"{prefix}.q_norm.weight"), self.norm(f"{prefix}.k_norm.weight")) if has_head_norms else None
            ),
            num_heads=self._share.num_heads(layer),
            num_kv_heads=self._share.kv_heads(group).padded,
            head_dim=group.key.width,
        )

    def _enter(self, norm: Norm) -> tuple[EnteringRows, Norm | None]:
        """How rows enter a block, and the norm that is left to its first product."""
        tp = self._groups["attn_tp"]
        if tp.size == 1:
            return EnteringRows(None, tp=tp), norm
        return EnteringRows(self._kernels.norm(norm), tp=tp), None

    def _leave(self, name: str, *, biases: Sequence[str] = ()) -> LeavingRows:
        return LeavingRows(self._linear(name, biases=biases), tp=self._groups["attn_tp"])

    def _held(self, bias: str) -> list[str]:
        """The bias, where this rank is the one that adds it to a sum over ranks."""
        return [bias] if bias in self._weights else []

    def _linear(self, *names: str, biases: Sequence[str] = ()) -> Linear:
        return self._kernels.linear(
            [self._weights.pop(name) for name in names], biases=[self._weights.pop(name) for name in biases]
        )


def _in_turn(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[2 · n, ...] whose rows are of gate and up in turn, to those of each."""
    return tensor[0::2], tensor[1::2]
