"""From a computed chunk to the writes that this rank has to make for its hand-off."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from parallel.handoff import CacheLayout, Lane, PagePlace, byte_runs, plan_copies, plan_lanes
from parallel.shape import RankCoordinates
from proto import control_pb2
from worker.step_rows import PlacedChunk
from worker.transport.interface import WriteRuns


@dataclass(frozen=True, kw_only=True)
class SourceMemory:
    """Where this rank's KV lies: byte address of its first layer, bytes from layer to layer and of an element."""

    base_address: int
    layer_bytes: int
    element_bytes: int
    token_elements: int


@dataclass(frozen=True, kw_only=True)
class RankWrites:
    """The runs that go to one rank of the target."""

    target_rank: int
    runs: WriteRuns


class HandoffPlanner:
    """One pair of layouts, from one source rank's view. Pure: it makes lists of addresses."""

    def __init__(
        self,
        *,
        source: CacheLayout,
        target: CacheLayout,
        coordinates: RankCoordinates,
        memory: SourceMemory,
        endpoints: list[control_pb2.Endpoint],
    ) -> None:
        self._source = source
        self._target = target
        self._coordinates = coordinates
        self._memory = memory
        self._endpoints = endpoints
        self._lanes = [
            lane
            for lane in plan_lanes(source, target)
            if lane.source_pp == coordinates.pp_rank and lane.source_tp == coordinates.attn_tp_rank
        ]

    def writes(self, item: PlacedChunk) -> Iterator[RankWrites]:
        """The writes of the positions of `item`, a chunk whose sequence has a target, by target rank."""
        target = item.sequence.target
        assert target is not None
        copies = [
            copy
            for copy in plan_copies(
                source_table=item.sequence.table.places,
                source_page_size=self._source.page_size,
                target_table=[PagePlace(coordinate=page.coordinate, page=page.page) for page in target.pages],
                target_page_size=self._target.page_size,
                positions=(item.chunk.cached_tokens, item.end),
            )
            if copy.source.coordinate == self._coordinates.attn_cp_rank
        ]
        for lane in self._lanes:
            for coordinate in sorted({copy.target.coordinate for copy in copies}):
                runs = [
                    (run.source_start, run.target_start, run.size)
                    for copy in copies
                    if copy.target.coordinate == coordinate
                    for run in byte_runs(
                        copy,
                        lane=lane,
                        source=self._source,
                        target=self._target,
                        token_elements=self._memory.token_elements,
                    )
                ]
                target_rank = self._target.shape.attention_rank(
                    pp_rank=lane.target_pp, dp=target.dp, cp=coordinate, tp=lane.target_tp
                )
                yield RankWrites(target_rank=target_rank, runs=self._addresses(runs, lane=lane, rank=target_rank))

    def _addresses(self, runs: list[tuple[int, int, int]], *, lane: Lane, rank: int) -> WriteRuns:
        """The same runs in every layer of the lane, as (source address, target address, bytes)."""
        memory, endpoint = self._memory, self._endpoints[rank]
        layers = np.arange(*lane.layers)
        source_layers = layers - self._source.stages[lane.source_pp][0]
        target_layers = layers - self._target.stages[lane.target_pp][0]
        elements = np.array(runs, dtype=np.int64) * memory.element_bytes
        out = np.empty((len(layers), len(runs), 3), dtype=np.uint64)
        out[:, :, 0] = memory.base_address + source_layers[:, None] * memory.layer_bytes + elements[None, :, 0]
        out[:, :, 1] = endpoint.base_address + target_layers[:, None] * endpoint.layer_bytes + elements[None, :, 1]
        out[:, :, 2] = elements[None, :, 2]
        return out.reshape(-1, 3)
