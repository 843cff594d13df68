"""The hand-off of one sequence's KV from a prefill replica to a decode replica, as a list of copies.

Two pure steps. `plan_lanes` intersects layers and KV heads once per pair of layouts: each target rank's byte is written
by exactly one lane, each source byte read from one replica of it. `plan_copies` cuts a range of positions at the page
boundaries of both sides. A transport executes `byte_runs` of the result.

```
source page (P = 16)  |................|................|          target page (P = 8)  |........|........|........|
positions             0               16               32                               0        8       16
```
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from parallel.models.description import ModelDescription
from parallel.shape import ReplicaShape
from parallel.sharding import kv_head_interval, stage_layers


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """How a replica keeps KV: `stages` holds layers [first, end) by pp rank, `heads` KV heads by tp rank."""

    shape: ReplicaShape
    page_size: int
    stages: tuple[tuple[int, int], ...]
    heads: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class PagePlace:
    """A page of a sequence's table: the cp coordinate that owns it and its number there."""

    coordinate: int
    page: int


class PageOwners(Sequence[int]):
    """The coordinates that own the first `count` pages of a table: a view, as tables are long and looked at often."""

    def __init__(self, table: Sequence[PagePlace], *, count: int) -> None:
        self._table = table
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [self._table[item].coordinate for item in range(*index.indices(self._count))]
        return self._table[range(self._count)[index]].coordinate


@dataclass(frozen=True, kw_only=True)
class Lane:
    """The layers and KV heads, [first, end) of the model's, that go from one place to another of the two meshes."""

    source_pp: int
    source_tp: int
    target_pp: int
    target_tp: int
    layers: tuple[int, int]
    heads: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Copy:
    """`num_tokens` consecutive positions: from inside one source page to inside one target page."""

    source: PagePlace
    target: PagePlace
    source_start: int
    target_start: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class ElementRun:
    """Contiguous elements inside a layer's memory of each side."""

    source_start: int
    target_start: int
    size: int


def cache_layout(description: ModelDescription, *, shape: ReplicaShape, page_size: int) -> CacheLayout:
    """The layout of a replica of `shape` that serves `description`."""
    stages = [stage_layers(description, shape=shape, pp_rank=rank) for rank in range(shape.pp)]
    tp = shape.attention.tp
    heads = [kv_head_interval(description.num_kv_heads, tp=tp, tp_rank=rank) for rank in range(tp)]
    return CacheLayout(
        shape=shape,
        page_size=page_size,
        stages=tuple((layers.start, layers.stop) for layers in stages),
        heads=tuple((interval.start, interval.end) for interval in heads),
    )


def plan_lanes(source: CacheLayout, target: CacheLayout) -> tuple[Lane, ...]:
    """Every non-empty intersection of layers and heads; of replicated source heads only the first holder sends."""
    lanes: list[Lane] = []
    for source_pp, source_layers in enumerate(source.stages):
        for target_pp, target_layers in enumerate(target.stages):
            layers = _intersect(source_layers, target_layers)
            if layers is None:
                continue
            for source_tp in _first_holders(source.heads):
                for target_tp, target_heads in enumerate(target.heads):
                    heads = _intersect(source.heads[source_tp], target_heads)
                    if heads is not None:
                        lanes.append(
                            Lane(
                                source_pp=source_pp,
                                source_tp=source_tp,
                                target_pp=target_pp,
                                target_tp=target_tp,
                                layers=layers,
                                heads=heads,
                            )
                        )
    return tuple(lanes)


def plan_copies(
    *,
    source_table: Sequence[PagePlace],
    source_page_size: int,
    target_table: Sequence[PagePlace],
    target_page_size: int,
    positions: tuple[int, int],
) -> Iterator[Copy]:
    """Cuts the positions [first, end) at the page boundaries of both tables, in order."""
    position, end = positions
    while position < end:
        source_page, source_start = divmod(position, source_page_size)
        target_page, target_start = divmod(position, target_page_size)
        num_tokens = min(end - position, source_page_size - source_start, target_page_size - target_start)
        yield Copy(
            source=source_table[source_page],
            target=target_table[target_page],
            source_start=source_start,
            target_start=target_start,
            num_tokens=num_tokens,
        )
        position += num_tokens


def byte_runs(
    copy: Copy, *, lane: Lane, source: CacheLayout, target: CacheLayout, token_elements: int
) -> Iterator[ElementRun]:
    """The runs of one copy inside a layer's memory `[page, 2, kv_head, position, token_elements]` of each side.

    A whole page whose heads are the same on both sides is one run.
    """
    source_first, source_end = source.heads[lane.source_tp]
    target_first, target_end = target.heads[lane.target_tp]
    source_heads, target_heads = source_end - source_first, target_end - target_first
    size = copy.num_tokens * token_elements
    whole = copy.num_tokens == source.page_size == target.page_size
    if whole and source_first == target_first and source_end == target_end:
        page = 2 * source_heads * size
        yield ElementRun(source_start=copy.source.page * page, target_start=copy.target.page * page, size=page)
        return
    for part in range(2):
        for head in range(*lane.heads):
            source_row = (copy.source.page * 2 + part) * source_heads + head - source_first
            target_row = (copy.target.page * 2 + part) * target_heads + head - target_first
            yield ElementRun(
                source_start=(source_row * source.page_size + copy.source_start) * token_elements,
                target_start=(target_row * target.page_size + copy.target_start) * token_elements,
                size=size,
            )


def _intersect(left: tuple[int, int], right: tuple[int, int]) -> tuple[int, int] | None:
    first, end = max(left[0], right[0]), min(left[1], right[1])
    return (first, end) if first < end else None


def _first_holders(heads: Sequence[tuple[int, int]]) -> list[int]:
    """The tp ranks that hold an interval which no lower tp rank holds."""
    return [index for index, interval in enumerate(heads) if interval not in heads[:index]]
