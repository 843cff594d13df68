"""The hand-off of one sequence's KV from a prefill replica to a decode replica, as a list of copies.

Three pure steps. `plan_lanes` intersects layers and KV heads once per pair of layouts: each target rank's byte is
written by exactly one lane, each source byte read from one replica of it. `plan_copies` cuts a range of positions at
the page boundaries of both sides. `copy_runs` gives their bytes, by what each side's storage says; a transport
executes those.

```
source page (P = 16)  |................|................|          target page (P = 8)  |........|........|........|
positions             0               16               32                               0        8       16
```
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from parallel.arrays import Ints
from parallel.models.description import ModelDescription
from parallel.shape import ReplicaShape
from parallel.sharding import kv_head_interval, stage_layers
from parallel.storage import CacheGroup, GroupRegion, PageLayout, PlaneLayout


@dataclass(frozen=True, kw_only=True)
class Lane:
    """The `layers` of one cache group that go from one place to another of the two meshes: of the planes that are
    stored per head the KV `heads` [first, end) of the model's, or, where that is None, those that heads share.
    """

    group: str
    source_pp: int
    source_tp: int
    target_pp: int
    target_tp: int
    layers: tuple[int, ...]
    heads: tuple[int, int] | None

    @property
    def num_heads(self) -> int:
        """Heads that a plane has in it."""
        return 1 if self.heads is None else self.heads[1] - self.heads[0]


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Copies of consecutive positions, each from inside one source page to inside one target page; [n]. Pages are
    places in the sequence's tables, starts positions inside a page.
    """

    source_page: Ints
    source_start: Ints
    target_page: Ints
    target_start: Ints
    num_tokens: Ints

    def take(self, index: npt.NDArray[np.bool_]) -> "Copies":
        """The copies at `index`."""
        return Copies(
            source_page=self.source_page[index],
            source_start=self.source_start[index],
            target_page=self.target_page[index],
            target_start=self.target_start[index],
            num_tokens=self.num_tokens[index],
        )


def plan_lanes(description: ModelDescription, *, source: ReplicaShape, target: ReplicaShape) -> tuple[Lane, ...]:
    """Every non-empty intersection of layers and heads; of what several tp ranks hold only the first sends."""
    return tuple(
        lane
        for group in description.cache_groups
        for source_pp in range(source.pp)
        for target_pp in range(target.pp)
        for lane in _lanes_between(description, group, (source, source_pp), (target, target_pp))
    )


def _lanes_between(
    description: ModelDescription, group: CacheGroup, source: tuple[ReplicaShape, int], target: tuple[ReplicaShape, int]
) -> Iterator[Lane]:
    """Those of one group between two stages."""
    held = [stage_layers(description, shape=shape, pp_rank=pp_rank) for shape, pp_rank in (source, target)]
    layers = tuple(layer for layer in group.layers if all(layer in part for part in held))
    if not layers:
        return
    for source_tp, target_tp, heads in _common_heads(group, source[0].attention.tp, target[0].attention.tp):
        yield Lane(
            group=group.name,
            source_pp=source[1],
            source_tp=source_tp,
            target_pp=target[1],
            target_tp=target_tp,
            layers=layers,
            heads=heads,
        )


def plan_copies(*, source_page_size: int, target_page_size: int, positions: tuple[int, int]) -> Copies:
    """Cuts the positions [first, end) at the page boundaries of both sides, in order."""
    first, end = positions
    cuts = [
        np.arange(-(-(first + 1) // size) * size, end, size, dtype=np.int64)
        for size in (source_page_size, target_page_size)
    ]
    starts = np.unique(np.concatenate([np.array([first] if first < end else [], dtype=np.int64), *cuts]))
    return Copies(
        source_page=starts // source_page_size,
        source_start=starts % source_page_size,
        target_page=starts // target_page_size,
        target_start=starts % target_page_size,
        num_tokens=np.diff(starts, append=end),
    )


def copy_runs(
    copies: Copies, *, lane: Lane, source: GroupRegion, target: GroupRegion, pages: tuple[Ints, Ints]
) -> Ints:
    """Contiguous bytes of the copies inside one layer's memory: rows of (source start, target start, bytes).

    `pages` are the numbers of the source page and of the target page of each copy. What is contiguous on both sides is
    one run: a whole page, or several, where nothing differs.
    """
    planes = [
        (own, other)
        for own, other in zip(source.page.planes, target.page.planes, strict=True)
        if own.per_head == (lane.heads is not None)
    ]
    parts = []
    for own, other in planes:
        for head in range(*(lane.heads or (0, 1))):
            heads = (head - source.first_head, head - target.first_head) if lane.heads else (0, 0)
            parts.append(
                _plane_runs(
                    (_starts(source.page, own, pages[0], copies.source_start, head=heads[0]), own),
                    (_starts(target.page, other, pages[1], copies.target_start, head=heads[1]), other),
                    copies.num_tokens,
                )
            )
    if not parts or not len(copies.num_tokens):
        return np.empty((0, 3), dtype=np.int64)
    # Copy by copy, and inside one in the order of planes and heads: so that neighbours in memory are neighbours here.
    in_order = np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])
    return _joined(in_order.reshape(-1, 3))


def _starts(page: PageLayout, plane: PlaneLayout, pages: Ints, positions: Ints, *, head: int) -> Ints:
    """The first byte of each copy on one side."""
    return pages * page.page_bytes + plane.offset + head * plane.head_stride + positions * plane.position_stride


def _plane_runs(source: tuple[Ints, PlaneLayout], target: tuple[Ints, PlaneLayout], num_tokens: Ints) -> Ints:
    """Runs of one head of one plane: [n, r, 3], where r is 1 unless one side has its positions apart."""
    (source_start, own), (target_start, other) = source, target
    size = own.run_bytes
    if own.position_stride == size == other.position_stride:
        return np.stack([source_start, target_start, num_tokens * size], axis=1)[:, None]
    token = np.arange(int(num_tokens.max(initial=0)))
    sizes = np.where(token < num_tokens[:, None], size, 0)
    starts = [
        start[:, None] + token * plane.position_stride for start, plane in ((source_start, own), (target_start, other))
    ]
    return np.stack([*starts, sizes], axis=2)


def _joined(runs: Ints) -> Ints:
    """Runs [n, 3] with those joined that follow each other on both sides; none of size 0."""
    runs = runs[runs[:, 2] > 0]
    ends = runs[:-1, :2] + runs[:-1, 2:]
    begins = np.flatnonzero(np.append(True, (ends != runs[1:, :2]).any(axis=1)))
    return np.column_stack([runs[begins, :2], np.add.reduceat(runs[:, 2], begins)])


def _common_heads(
    group: CacheGroup, source_tp: int, target_tp: int
) -> Sequence[tuple[int, int, tuple[int, int] | None]]:
    """(source tp rank, target tp rank, heads) of what is stored per head, and of what heads share."""
    found: list[tuple[int, int, tuple[int, int] | None]] = []
    kinds = {plane.per_head for plane in group.planes}
    if True in kinds:
        sources, targets = (
            [kv_head_interval(group.num_kv_heads, tp=tp, tp_rank=rank) for rank in range(tp)]
            for tp in (source_tp, target_tp)
        )
        for own, source in enumerate(sources):
            if source in sources[:own]:
                continue  # a lower tp rank holds the same
            for other, target in enumerate(targets):
                first, end = max(source.start, target.start), min(source.end, target.end)
                if first < end:
                    found.append((own, other, (first, end)))
    if False in kinds:
        found += [(0, other, None) for other in range(target_tp)]
    return found
