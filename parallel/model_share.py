"""The part of a model that one rank holds: slices of tensors, layers, heads, KV. Pure: no weight is read.

A slice names the rows that exist, `padded` the size that every rank of the axis computes with.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

from parallel.models.description import ModelDescription, Part, Split, TensorSpec
from parallel.settings import EngineSettings
from parallel.shape import RankCoordinates, ReplicaShape
from parallel.sharding import (
    Interval,
    even_interval,
    experts_of,
    kv_head_interval,
    stage_layers,
)
from parallel.storage import DTYPE_BYTES, CacheGroup, RankStorage, lay_out_storage


@dataclass(frozen=True, kw_only=True)
class TensorSlice:
    """The part of a checkpoint tensor that one rank reads: an interval for each dimension."""

    spec: TensorSpec
    intervals: tuple[Interval, ...]

    @property
    def num_elements(self) -> int:
        """Elements after padding: what the rank holds in memory."""
        return prod(interval.padded for interval in self.intervals)

    @property
    def is_matrix(self) -> bool:
        """Whether it may be held in the checkpoint's dtype while arithmetic has another."""
        return len(self.intervals) > 1 and not self.spec.in_float32

    def num_bytes(self, settings: EngineSettings) -> int:
        """Bytes in memory."""
        if self.spec.in_float32:
            return self.num_elements * DTYPE_BYTES["float32"]
        return self.num_elements * DTYPE_BYTES[settings.matrix_dtype if self.is_matrix else settings.dtype]


@dataclass(frozen=True, kw_only=True)
class ModelShare:
    """What the rank at `coordinates` of a replica of `shape` holds of the model."""

    description: ModelDescription
    shape: ReplicaShape
    coordinates: RankCoordinates

    @cached_property
    def layers(self) -> range:
        """Those of its stage."""
        return stage_layers(self.description, shape=self.shape, pp_rank=self.coordinates.pp_rank)

    def num_heads(self, layer: int) -> int:
        """Query heads in layer `layer`."""
        return self.description.attention[layer].num_heads // self.shape.attention.tp

    def kv_heads(self, group: CacheGroup) -> Interval:
        """KV heads of the layers of `group`; neighbouring tp ranks may hold one alike."""
        tp, tp_rank = self.shape.attention.tp, self.coordinates.attn_tp_rank
        return kv_head_interval(group.num_kv_heads, tp=tp, tp_rank=tp_rank)

    def storage(self, settings: EngineSettings) -> RankStorage:
        """Its KV memory: of each group the layers of its stage, its own heads, and a spare page."""
        groups = self.description.cache_groups
        heads = {group.name: self.kv_heads(group) for group in groups}
        return lay_out_storage(
            groups,
            layers=self.layers,
            heads={name: (interval.start, interval.padded) for name, interval in heads.items()},
            num_pages={group.name: settings.pages_of(group, pp=self.shape.pp) + 1 for group in groups},
            page_size=settings.page_size,
            dtype=settings.dtype,
        )

    @cached_property
    def experts(self) -> dict[int, tuple[int, ...]]:
        """The expert of each of its slots, by layer of its stage; empty where none of them has experts."""
        ep_rank = self.coordinates.moe_ep_rank
        if self.shape.experts is None or ep_rank is None:
            return {}
        tables = experts_of(self.description, self.shape.experts)
        return {layer: table.held_by(ep_rank) for layer, table in tables.items() if layer in self.layers}

    def slices(self) -> Iterator[TensorSlice]:
        """Every tensor slice; no tensor of an expert that it does not hold."""
        held = {layer: frozenset(experts) for layer, experts in self.experts.items()}
        for spec in self.description.tensors:
            is_held = spec.expert is None or spec.layer is None or spec.expert in held.get(spec.layer, ())
            if is_held and self._is_on_stage(spec) and self._adds(spec.added_over):
                intervals = [Interval(start=0, end=size, padded=size) for size in spec.shape]
                for dim, split in spec.splits:
                    intervals[dim] = self._interval(split, spec.shape[dim], layer=spec.layer)
                yield TensorSlice(spec=spec, intervals=tuple(intervals))

    def token_bytes(self, settings: EngineSettings) -> dict[str, int]:
        """Bytes that one token takes on this rank, over the stage's layers, by cache group."""
        return {
            group.name: group.token_bytes(num_heads=self.kv_heads(group).padded, dtype=settings.dtype)
            * sum(layer in self.layers for layer in group.layers)
            for group in self.description.cache_groups
        }

    def _is_on_stage(self, spec: TensorSpec) -> bool:
        pp_rank = self.coordinates.pp_rank
        first, last = pp_rank == 0, pp_rank == self.shape.pp - 1
        if spec.part is Part.EMBEDDING:
            return first
        if spec.part is Part.OUTPUT:
            return last
        assert spec.layer is not None
        return spec.layer in self.layers

    def _adds(self, split: Split | None) -> bool:
        """Whether this rank adds a bias to the sum over the ranks of `split`; one that is no sum's it always does."""
        if split is None:
            return True
        is_experts = split in (Split.EXPERT_INTERMEDIATE, Split.EXPERT_PAIRS)
        return (self.coordinates.moe_tp_rank if is_experts else self.coordinates.attn_tp_rank) == 0

    def _interval(self, split: Split, size: int, *, layer: int | None) -> Interval:
        if split in (Split.EXPERT_INTERMEDIATE, Split.EXPERT_PAIRS):
            assert self.shape.experts is not None and self.coordinates.moe_tp_rank is not None
            width = 2 if split is Split.EXPERT_PAIRS else 1
            part = even_interval(size // width, parts=self.shape.experts.moe_tp, index=self.coordinates.moe_tp_rank)
            return Interval(start=part.start * width, end=part.end * width, padded=part.padded * width)
        if split is Split.KV_HEADS:
            assert layer is not None
            group = self.description.group_of(layer)
            heads, width = self.kv_heads(group), size // group.num_kv_heads
            return Interval(start=heads.start * width, end=heads.end * width, padded=heads.padded * width)
        if split is Split.OUTPUT_VOCABULARY:
            ranks = self.shape.group_of(self.coordinates.global_rank, self.shape.output_axis).ranks
            return even_interval(size, parts=len(ranks), index=ranks.index(self.coordinates.global_rank))
        return even_interval(size, parts=self.shape.attention.tp, index=self.coordinates.attn_tp_rank)
