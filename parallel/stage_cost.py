"""What a step of decode costs one rank of a stage: bytes that it reads and operations, by its rows. Pure.

How fast those are is in `link.py`; who chooses by them is `worker/engine/pipeline_choice.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from parallel.model_share import ModelShare, TensorSlice
from parallel.models.description import ModelDescription, Part, Split
from parallel.settings import EngineSettings
from parallel.shape import ReplicaShape


@dataclass(frozen=True, kw_only=True)
class CacheCost:
    """Of the layers of one cache group on the rank: what one key costs the row that meets it. 0 is no window."""

    key_bytes: int
    key_flops: int
    window: int

    def keys(self, context: float) -> float:
        """How many a row meets after `context` tokens."""
        return min(context, self.window) if self.window else context


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """Of one rank of a stage. `weight_bytes` are read whatever the rows, `row_flops` are spent on each of them.

    Of the experts that it holds, `expert_bytes` and, for a row that visits all, `expert_flops`: of its block's rows,
    `block_rows` for each of its own, each visits a share `visits` of the experts.
    """

    weight_bytes: int
    row_flops: int
    expert_bytes: int = 0
    expert_flops: int = 0
    block_rows: float = 1.0
    visits: float = 0.0
    caches: tuple[CacheCost, ...] = ()

    def read_bytes(self, rows: float) -> float:
        """Of weights, in a step of `rows`: of the experts those that some row visits, where a gate is even."""
        visited: float = 1 - (1 - self.visits) ** (self.block_rows * rows)
        return self.weight_bytes + self.expert_bytes * visited

    def flops(self, rows: float) -> float:
        """Of products."""
        return rows * (self.row_flops + self.expert_flops * self.visits * self.block_rows)

    def key_bytes(self, context: float) -> float:
        """Of keys and values that one row reads after `context` tokens."""
        return sum(cache.key_bytes * cache.keys(context) for cache in self.caches)

    def key_flops(self, context: float) -> float:
        """Of one row's attention after `context` tokens."""
        return sum(cache.key_flops * cache.keys(context) for cache in self.caches)


def stage_costs(
    description: ModelDescription, *, shape: ReplicaShape, settings: EngineSettings
) -> tuple[StageCost, ...]:
    """That of each stage's first rank, in their order: all of a stage have as much. Rows are those of a cp coordinate,
    each with a token to draw.
    """
    return tuple(_stage_cost(description, shape, settings, pp_rank=pp_rank) for pp_rank in range(shape.pp))


def _stage_cost(
    description: ModelDescription, shape: ReplicaShape, settings: EngineSettings, *, pp_rank: int
) -> StageCost:
    first = shape.attention_rank(pp_rank=pp_rank, dp=0)
    share = ModelShare(description=description, shape=shape, coordinates=shape.coordinates(first))
    # In the embedding rows only look their tokens up.
    read = [part for part in share.slices() if part.spec.part is not Part.EMBEDDING]
    dense = [part for part in read if part.spec.expert is None]
    held = [part for part in read if part.spec.expert is not None]
    experts, mesh = description.experts, shape.experts
    return StageCost(
        weight_bytes=sum(part.num_bytes(settings) for part in dense),
        row_flops=sum(_row_flops(part, share) for part in dense),
        expert_bytes=sum(part.num_bytes(settings) for part in held),
        expert_flops=sum(_row_flops(part, share) for part in held),
        block_rows=shape.attention.dp * shape.attention.cp / mesh.moe_dp if mesh else 1.0,
        visits=experts.top_k / experts.num_experts if experts else 0.0,
        caches=tuple(_cache_costs(share, settings)),
    )


def _row_flops(part: TensorSlice, share: ModelShare) -> int:
    """Of one of the rank's own rows; a shared output meets as many of each rank that shares it."""
    if len(part.intervals) < 2:
        return 0
    is_output = any(split is Split.OUTPUT_VOCABULARY for _, split in part.spec.splits)
    return 2 * part.num_elements * (share.shape.output_sharing if is_output else 1)


def _cache_costs(share: ModelShare, settings: EngineSettings) -> Iterator[CacheCost]:
    token_bytes = share.token_bytes(settings)
    for group in share.description.cache_groups:
        heads = sum(share.num_heads(layer) for layer in group.layers if layer in share.layers)
        if heads:
            key_flops = 2 * heads * (group.key.width + group.value.width)
            yield CacheCost(key_bytes=token_bytes[group.name], key_flops=key_flops, window=group.window)
