"""Builds one rank's model: its weights, its KV memory, its kernels."""

from collections.abc import Callable
from pathlib import Path

import torch

from attention.exchange_choice import ExchangePolicy, Strategy
from attention.interface import AttentionBackend, AttentionSpec
from parallel.collectives.groups import RankGroups
from parallel.link import LINKS
from parallel.model_share import ModelShare
from parallel.settings import EngineSettings
from worker.blocks.expert_share import expert_share
from worker.blocks.parts import Parts, attention_spec
from worker.blocks.rope import RotaryEmbedding
from worker.kv_memory import KvMemory
from worker.models.decoder import Decoder
from worker.models.registry import build_layer
from worker.step.runner import RankModel
from worker.step.slot_tokens import SlotTokens
from worker.step.stage_ends import DrawOutput, EmbeddingInput, PipelineInput, PipelineOutput, StageInput, StageOutput
from worker.weights import load_weights

_EMBEDDING = "model.embed_tokens.weight"


def build_model(
    folder: Path,
    rank_share: ModelShare,
    *,
    settings: EngineSettings,
    groups: RankGroups,
    memory: KvMemory,
    make_backend: Callable[[AttentionSpec], AttentionBackend],
    progress: Callable[[float], None],
) -> RankModel:
    """Blocking: reads this rank's slices of the checkpoint in `folder` and packs them."""
    dtype, device = memory.region.dtype, memory.region.device
    description, shape, coordinates = rank_share.description, rank_share.shape, rank_share.coordinates
    weights = load_weights(folder, rank_share.slices(), dtype=dtype, device=device, progress=progress)
    spec = attention_spec(description, memory=memory, num_heads=rank_share.num_heads, page_size=settings.page_size)
    backend = make_backend(spec)
    share = None
    if shape.experts is not None and coordinates.moe_ep_rank is not None:
        share = expert_share(
            description,
            shape.experts,
            ep_rank=coordinates.moe_ep_rank,
            block=groups["block"],
            settings=settings,
            device=device,
        )
    parts = Parts(
        description, weights=weights, groups=groups, memory=memory, spec=spec, backend=backend, expert_share=share
    )
    slot_tokens = SlotTokens(num_slots=settings.num_slots(dp=shape.attention.dp), groups=groups, device=device)
    ends = _StageEnds(parts, groups=groups, slot_tokens=slot_tokens, dtype=dtype, device=device)
    is_first, is_last = coordinates.pp_rank == 0, coordinates.pp_rank == shape.pp - 1
    model = RankModel(
        input=ends.input(is_first=is_first, is_last=is_last),
        decoder=Decoder(layers=[build_layer(parts, layer=layer) for layer in rank_share.layers]),
        output=ends.output(is_last=is_last),
        slot_tokens=slot_tokens,
        backend=backend,
        policy=_exchange_policy(spec, settings=settings),
        rope=RotaryEmbedding(description.rope, device=device),
        dtype=dtype,
        device=device,
    )
    # A bias or a norm that the forward forgets would only make the tokens worse.
    assert not weights.unread, f"the forward of {description.family} leaves {sorted(weights.unread)} unread"
    return model


class _StageEnds:
    """Makes the ends of one stage out of its weights."""

    def __init__(
        self, parts: Parts, *, groups: RankGroups, slot_tokens: SlotTokens, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._parts = parts
        self._groups = groups
        self._slot_tokens = slot_tokens
        self._dtype = dtype
        self._device = device

    def input(self, *, is_first: bool, is_last: bool) -> StageInput:
        """The embedding, or the stage before."""
        if is_first:
            embedding = self._parts.embedding(_EMBEDDING)
            return EmbeddingInput(embedding, slot_tokens=self._slot_tokens, is_last=is_last, device=self._device)
        hidden_size = self._parts.description.hidden_size
        return PipelineInput(groups=self._groups, hidden_size=hidden_size, dtype=self._dtype, device=self._device)

    def output(self, *, is_last: bool) -> StageOutput:
        """The output and its draws, or the stage after."""
        if not is_last:
            return PipelineOutput(groups=self._groups)
        head = _EMBEDDING if self._parts.description.tied_embeddings else "lm_head.weight"
        output = self._parts.output(norm="model.norm.weight", head=head)
        return DrawOutput(output, slot_tokens=self._slot_tokens, groups=self._groups)


def _exchange_policy(spec: AttentionSpec, *, settings: EngineSettings) -> ExchangePolicy:
    return ExchangePolicy(
        page_size=spec.page_size,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        element_bytes=spec.dtype.itemsize,
        link=LINKS[spec.device.type],
        max_tokens=settings.exchange_tokens,
        forced=None if settings.exchange == "auto" else Strategy(settings.exchange),
    )


def resolve_dtype(name: str) -> torch.dtype:
    """The torch dtype of a setting's name."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
