"""From a computed chunk to the writes that this rank has to make for its hand-off."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from parallel.handoff import CacheLayout, Copy, Lane, byte_runs, cache_layout, plan_copies, plan_lanes
from parallel.model_share import ModelShare
from parallel.wire import shape_from_wire
from proto import control_pb2
from worker.handoff.transport.interface import WriteRuns
from worker.step.rows import PlacedChunk

#: Bytes of a chunk that go in one message to a peer.
PART_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SourceMemory:
    """Where this rank's KV lies: byte address of its first layer, bytes from layer to layer and of an element."""

    base_address: int
    layer_bytes: int
    element_bytes: int
    token_elements: int


@dataclass(frozen=True, kw_only=True)
class LaneRuns:
    """A chunk's runs of one lane: `elements` [n, 3] are source start, target start and size inside any layer."""

    lane: Lane
    target_rank: int
    elements: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class HandoffSource:
    """One rank as a source: its share of the model, its replica's layout and where its KV lies."""

    share: ModelShare
    layout: CacheLayout
    memory: SourceMemory


class HandoffPlanner:
    """One pair of layouts, from one source rank's view. Pure: it makes lists of addresses."""

    def __init__(self, source: HandoffSource, *, target: control_pb2.ConnectTarget) -> None:
        self._source = source.layout
        self._coordinates = source.share.coordinates
        self._memory = source.memory
        self._target = cache_layout(
            source.share.description, shape=shape_from_wire(target.sizes), page_size=target.page_size
        )
        self.endpoints = [control_pb2.Endpoint.FromString(endpoint) for endpoint in target.endpoints]
        self._lanes = [
            lane
            for lane in plan_lanes(self._source, self._target)
            if lane.source_pp == self._coordinates.pp_rank and lane.source_tp == self._coordinates.attn_tp_rank
        ]

    def plan(self, item: PlacedChunk) -> list[LaneRuns]:
        """The runs of the positions of `item`, a chunk whose sequence has a target: the same in all layers."""
        target = item.sequence.target
        assert target is not None
        if not self._lanes:
            return []  # another tp rank holds the same heads and sends them
        by_coordinate: dict[int, list[Copy]] = {}
        for copy in plan_copies(
            source_table=item.sequence.table.places,
            source_page_size=self._source.page_size,
            target_table=item.sequence.target_places,
            target_page_size=self._target.page_size,
            positions=(item.handoff_start, item.end),
        ):
            if copy.source.coordinate == self._coordinates.attn_cp_rank:
                by_coordinate.setdefault(copy.target.coordinate, []).append(copy)
        return [
            LaneRuns(
                lane=lane,
                target_rank=self._target.shape.attention_rank(
                    pp_rank=lane.target_pp, dp=target.dp, cp=coordinate, tp=lane.target_tp
                ),
                elements=elements,
            )
            for coordinate, copies in sorted(by_coordinate.items())
            for lane, elements in self._elements(copies)
        ]

    def runs(self, planned: LaneRuns, *, layers: range) -> WriteRuns:
        """(source address, target address, bytes) in those of the stage's `layers` that the lane takes; may be none."""
        lane, memory, endpoint = planned.lane, self._memory, self.endpoints[planned.target_rank]
        first_source = self._source.stages[lane.source_pp][0]
        first, end = max(lane.layers[0], first_source + layers.start), min(lane.layers[1], first_source + layers.stop)
        taken = np.arange(first, max(first, end))
        source_layers = (taken - first_source)[:, None]
        target_layers = (taken - self._target.stages[lane.target_pp][0])[:, None]
        elements = planned.elements * memory.element_bytes
        out = np.empty((len(taken), len(elements), 3), dtype=np.uint64)
        out[:, :, 0] = memory.base_address + source_layers * memory.layer_bytes + elements[None, :, 0]
        out[:, :, 1] = endpoint.base_address + target_layers * endpoint.layer_bytes + elements[None, :, 1]
        out[:, :, 2] = elements[None, :, 2]
        return out.reshape(-1, 3)

    def _elements(self, copies: Sequence[Copy]) -> Iterator[tuple[Lane, npt.NDArray[np.int64]]]:
        """The runs of `copies` in each lane. Lanes that differ in their layers alone share one list."""
        by_heads: dict[tuple[int, tuple[int, int]], npt.NDArray[np.int64]] = {}
        for lane in self._lanes:
            key = (lane.target_tp, lane.heads)
            if key not in by_heads:
                by_heads[key] = self._runs_of(copies, lane=lane)
            yield lane, by_heads[key]

    def _runs_of(self, copies: Sequence[Copy], *, lane: Lane) -> npt.NDArray[np.int64]:
        runs = [
            (run.source_start, run.target_start, run.size)
            for copy in copies
            for run in byte_runs(
                copy,
                lane=lane,
                source=self._source,
                target=self._target,
                token_elements=self._memory.token_elements,
            )
        ]
        return np.array(runs, dtype=np.int64)


def layer_parts(num_layers: int, *, layer_bytes: int) -> list[range]:
    """The stage's layers in the parts that are sent when computed: each of about PART_BYTES, or of one layer.

    `layer_bytes` is what the chunk takes in a layer: many small messages would cost more than they hide.
    """
    size = min(max(PART_BYTES // max(layer_bytes, 1), 1), num_layers)
    return [range(first, min(first + size, num_layers)) for first in range(0, num_layers, size)]
