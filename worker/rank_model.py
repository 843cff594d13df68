"""Builds one rank's model: its weights, its KV memory, its kernels."""

from collections.abc import Callable
from pathlib import Path

import torch

from attention.dtypes import TORCH_DTYPES
from attention.exchange.choice import ExchangePolicy, Strategy
from attention.exchange.member import CpMember
from attention.interface import AttentionBackend, AttentionSpec
from parallel.collectives.communicator import Communicator
from parallel.collectives.groups import RankGroups
from parallel.link import LINKS, LinkSpeed
from parallel.model_share import ModelShare
from parallel.settings import EngineSettings
from parallel.storage import CacheGroup, Listed
from worker.blocks.expert_share import expert_share
from worker.blocks.parts import Parts
from worker.blocks.rope import RotaryTables
from worker.kernels.interface import Kernels
from worker.kv_memory import KvMemory
from worker.models.decoder import Decoder
from worker.models.registry import build_layer
from worker.step.runner import RankModel
from worker.step.sequence_tables import SequenceTables
from worker.step.slot_tokens import SlotTokens
from worker.step.stage_ends import DrawOutput, EmbeddingInput, PipelineInput, PipelineOutput, StageInput, StageOutput
from worker.weights import load_weights

_EMBEDDING = "model.embed_tokens.weight"


def build_model(
    folder: Path,
    rank_share: ModelShare,
    *,
    settings: EngineSettings,
    kernels: Kernels,
    groups: RankGroups,
    memory: KvMemory,
    make_backend: Callable[[AttentionSpec], AttentionBackend],
    progress: Callable[[float], None],
) -> RankModel:
    """Blocking: reads this rank's slices of the checkpoint in `folder` and packs them."""
    dtype, device = TORCH_DTYPES[settings.dtype], memory.region.device
    description, shape, coordinates = rank_share.description, rank_share.shape, rank_share.coordinates
    is_widened = kernels.widens and settings.matrix_dtype != settings.dtype
    matrices = TORCH_DTYPES[settings.matrix_dtype] if is_widened else None
    weights = load_weights(
        folder, rank_share.slices(), dtype=dtype, matrices=matrices, device=device, progress=progress
    )
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
        description,
        weights=weights,
        kernels=kernels,
        dtype=dtype,
        groups=groups,
        memory=memory,
        share=rank_share,
        expert_share=share,
    )
    slot_tokens = SlotTokens(num_slots=settings.max_sequences, groups=groups, device=device)
    tables = SequenceTables(
        shape=shape, coordinates=coordinates, settings=settings, groups=description.cache_groups, device=device
    )
    ends = _StageEnds(
        parts, kernels=kernels, groups=groups, slot_tokens=slot_tokens, tables=tables, dtype=dtype, device=device
    )
    is_first, is_last = coordinates.pp_rank == 0, coordinates.pp_rank == shape.pp - 1
    model = RankModel(
        input=ends.input(is_first=is_first, is_last=is_last),
        decoder=Decoder(layers=[build_layer(parts, layer=layer) for layer in rank_share.layers]),
        output=ends.output(is_last=is_last),
        slot_tokens=slot_tokens,
        tables=tables,
        members=_members(
            rank_share, group=groups["attn_cp"], settings=settings, memory=memory, make_backend=make_backend
        ),
        ropes=_ropes(rank_share, device=device),
        dtype=dtype,
        device=device,
    )
    # A bias or a norm that the forward forgets would only make the tokens worse.
    assert not weights.unread, f"the forward of {description.family} leaves {sorted(weights.unread)} unread"
    return model


class _StageEnds:
    """Makes the ends of one stage out of its weights."""

    def __init__(
        self,
        parts: Parts,
        *,
        kernels: Kernels,
        groups: RankGroups,
        slot_tokens: SlotTokens,
        tables: SequenceTables,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._parts = parts
        self._kernels = kernels
        self._groups = groups
        self._slot_tokens = slot_tokens
        self._tables = tables
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
        output = self._parts.output(norm="model.norm.weight", head="lm_head.weight")
        return DrawOutput(
            output,
            kernels=self._kernels,
            slot_tokens=self._slot_tokens,
            groups=self._groups,
            shares_output=self._parts.shares_output,
            sampling=self._tables.sampling,
        )


def _members(
    share: ModelShare,
    *,
    group: Communicator,
    settings: EngineSettings,
    memory: KvMemory,
    make_backend: Callable[[AttentionSpec], AttentionBackend],
) -> dict[str, CpMember]:
    """What this rank brings to the exchange of each cache group that has a layer here."""
    members = {}
    for cache_group in share.description.cache_groups:
        if memory.storage.group(cache_group.name).layers:
            spec = _attention_spec(share, cache_group, memory=memory)
            members[cache_group.name] = CpMember(
                group=group,
                backend=make_backend(spec),
                policy=_exchange_policy(share, cache_group, spec=spec, settings=settings, link=LINKS[group.link]),
                device=spec.device,
            )
    return members


def _attention_spec(share: ModelShare, group: CacheGroup, *, memory: KvMemory) -> AttentionSpec:
    region = memory.storage.group(group.name)
    heads = {share.num_heads(layer) for layer in region.layers}
    assert len(heads) == 1, f"the layers of group {group.name} have {sorted(heads)} query heads: they are two groups"
    return AttentionSpec(
        num_heads=heads.pop(),
        page=region.page,
        key=group.key,
        value=group.value,
        window=group.window,
        listed=group.sees.tokens if isinstance(group.sees, Listed) else 0,
        device=memory.region.device,
    )


def _exchange_policy(
    share: ModelShare, group: CacheGroup, *, spec: AttentionSpec, settings: EngineSettings, link: LinkSpeed
) -> ExchangePolicy:
    element = settings.dtype_bytes
    return ExchangePolicy(
        page_size=spec.page_size,
        num_heads=spec.num_heads,
        token_bytes=group.token_bytes(num_heads=share.kv_heads(group).padded, dtype=settings.dtype),
        query_bytes=spec.num_heads * spec.key.width * element,
        output_bytes=spec.num_heads * spec.value.width * element,
        key_flops=2 * spec.num_heads * (spec.key.width + spec.value.width),
        window=spec.window,
        link=link,
        max_tokens=settings.exchange_tokens,
        forced=None if settings.exchange == "auto" else Strategy(settings.exchange),
    )


def _ropes(share: ModelShare, *, device: torch.device) -> RotaryTables:
    """The rotary embeddings of the stage's layers."""
    return RotaryTables({share.description.attention[layer].rope for layer in share.layers}, device=device)
