"""From a computed chunk to the writes that this rank has to make for its hand-off."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from parallel.arrays import Ints
from parallel.handoff import Lane, copy_runs, plan_copies, plan_lanes
from parallel.model_share import ModelShare
from parallel.storage import CacheGroup, RankStorage, check_alike, check_holds
from parallel.storage_wire import storage_from_wire
from parallel.wire import shape_from_wire
from proto import control_pb2
from worker.handoff.transport.interface import WriteRuns
from worker.step.sequences import HandedChunk

#: Bytes of a chunk that go in one message to a peer.
PART_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class LaneRuns:
    """A chunk's runs of one lane: `runs` [n, 3] are source start, target start and bytes inside any of its layers."""

    lane: Lane
    target_rank: int
    runs: Ints


@dataclass(frozen=True, kw_only=True)
class HandoffSource:
    """One rank as a source: its share of the model, its KV memory and where that begins."""

    share: ModelShare
    storage: RankStorage
    base_address: int


class HandoffPlanner:
    """One pair of layouts, from one source rank's view. Pure: it makes lists of addresses."""

    def __init__(self, source: HandoffSource, *, target: control_pb2.ConnectTarget) -> None:
        """ValueError where a target rank stores something else than this one."""
        share = source.share
        self._source = source
        self._cp_rank = share.coordinates.attn_cp_rank
        self._target = shape_from_wire(target.sizes)
        self.endpoints = _endpoints(target, world_size=self._target.world_size)
        self._storages = [storage_from_wire(endpoint.groups) for endpoint in self.endpoints]
        for storage in self._storages:
            check_alike(source.storage, storage)
        own_place = (share.coordinates.pp_rank, share.coordinates.attn_tp_rank)
        self._lanes: dict[str, list[Lane]] = {group.name: [] for group in share.description.cache_groups}
        for lane in plan_lanes(share.description, source=share.shape, target=self._target):
            if (lane.source_pp, lane.source_tp) == own_place:
                self._lanes[lane.group].append(lane)
                self._check_lane(lane)

    def plan(self, item: HandedChunk) -> list[LaneRuns]:
        """The runs of what `item` hands over: the same in all layers of a group."""
        return [
            planned
            for index, group in enumerate(self._source.share.description.cache_groups)
            for planned in self._plan_group(item, index, group)
        ]

    def runs(self, planned: LaneRuns, *, layers: range) -> WriteRuns:
        """(source address, target address, bytes) in those of the stage's `layers` that the lane takes; may be none."""
        lane, endpoint = planned.lane, self.endpoints[planned.target_rank]
        first = self._source.share.layers.start
        taken = [layer for layer in lane.layers if layer - first in layers]
        own = self._source.storage.group(lane.group)
        other = self._storages[planned.target_rank].group(lane.group)
        out = np.empty((len(taken), len(planned.runs), 3), dtype=np.uint64)
        for place, layer in enumerate(taken):
            out[place, :, 0] = planned.runs[:, 0] + (self._source.base_address + own.layer_start(layer))
            out[place, :, 1] = planned.runs[:, 1] + (endpoint.base_address + other.layer_start(layer))
            out[place, :, 2] = planned.runs[:, 2]
        return out.reshape(-1, 3)

    def _plan_group(self, item: HandedChunk, index: int, group: CacheGroup) -> Iterator[LaneRuns]:
        lanes, wanted = self._lanes[group.name], item.sequence.target
        assert wanted is not None
        source, target = item.sources[index], item.sequence.target_pages[index]
        own = self._source.storage.group(group.name)
        if not lanes or not len(source.columns):
            return  # another tp rank holds the same and sends it, or nothing of it will be seen
        copies = plan_copies(
            source_page_size=own.page.page_size,
            target_page_size=self._page_size(group),
            positions=item.positions(group),
        )
        is_own = source.columns.cp_ranks[copies.source_page - source.first_page] == self._cp_rank
        copies = copies.take(is_own)
        source_pages = source.columns.pages[copies.source_page - source.first_page].astype(np.int64)
        place = copies.target_page - target.first_page
        target_cp, target_pages = target.columns.cp_ranks[place], target.columns.pages[place].astype(np.int64)
        for cp_rank in np.unique(target_cp).tolist():
            chosen = target_cp == cp_rank
            by_heads: dict[tuple[int, tuple[int, int] | None], Ints] = {}
            for lane in lanes:
                rank = self._target.attention_rank(pp_rank=lane.target_pp, dp=wanted.dp, cp=cp_rank, tp=lane.target_tp)
                # Lanes that differ in their layers alone share one list.
                key = (lane.target_tp, lane.heads)
                if key not in by_heads:
                    by_heads[key] = copy_runs(
                        copies.take(chosen),
                        lane=lane,
                        source=own,
                        target=self._storages[rank].group(group.name),
                        pages=(source_pages[chosen], target_pages[chosen]),
                    )
                yield LaneRuns(lane=lane, target_rank=rank, runs=by_heads[key])

    def _check_lane(self, lane: Lane) -> None:
        """ValueError where a target rank that the lane writes to has no place for its layers or heads."""
        for cp_rank in range(self._target.attention.cp):
            for dp_rank in range(self._target.attention.dp):
                rank = self._target.attention_rank(pp_rank=lane.target_pp, dp=dp_rank, cp=cp_rank, tp=lane.target_tp)
                check_holds(self._storages[rank].group(lane.group), layers=lane.layers, heads=lane.heads)

    def _page_size(self, group: CacheGroup) -> int:
        """Of the target, the same on all its ranks."""
        return self._storages[0].group(group.name).page.page_size


def _endpoints(target: control_pb2.ConnectTarget, *, world_size: int) -> list[control_pb2.Endpoint]:
    """ValueError where they are not one for each rank of the target."""
    if len(target.endpoints) != world_size:
        raise ValueError(f"the target has {world_size} ranks, but {len(target.endpoints)} endpoints came")
    try:
        return [control_pb2.Endpoint.FromString(endpoint) for endpoint in target.endpoints]
    except DecodeError as error:
        raise ValueError(f"an endpoint of the target is no message: {error}") from error


def layer_parts(num_layers: int, *, layer_bytes: int) -> list[range]:
    """The stage's layers in the parts that are sent when computed: each of about PART_BYTES, or of one layer.

    `layer_bytes` is what the chunk takes in a layer: many small messages would cost more than they hide.
    """
    size = min(max(PART_BYTES // max(layer_bytes, 1), 1), num_layers)
    return [range(first, min(first + size, num_layers)) for first in range(0, num_layers, size)]
