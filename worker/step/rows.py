"""From step plans to rows: each rank's own page tables, and which rows of a step it computes. No torch, no kernels.

Every rank applies every plan, so all ranks know all row counts; it keeps page numbers for all sequences alike.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from parallel.chunk import Segment, cut_chunk
from parallel.handoff import PageOwners, PagePlace
from parallel.page_table import PageTable
from parallel.settings import EngineSettings
from parallel.shape import RankCoordinates, ReplicaShape
from proto import control_pb2, step_pb2

Ints = npt.NDArray[np.int64]


@dataclass(kw_only=True)
class RankSequence:
    """What a rank keeps of one sequence. Positions before `handed_off` are on their way to the target's pages,
    `target_places` in order of position.
    """

    slot: int
    request_id: int
    sampling: control_pb2.Sampling
    target: control_pb2.Target | None
    table: PageTable
    target_places: Sequence[PagePlace] = ()
    handed_off: int = 0


@dataclass(frozen=True, kw_only=True)
class PlacedChunk:
    """A chunk of this step with its sequence and its cut. Its hand-off begins at `handoff_start`: what the prefix
    cache had goes with the first chunk.
    """

    sequence: RankSequence
    chunk: step_pb2.Chunk
    segments: tuple[Segment, ...]
    handoff_start: int

    @property
    def end(self) -> int:
        """The position after its last."""
        return self.chunk.cached_tokens + self.chunk.new_tokens


@dataclass(frozen=True, kw_only=True)
class RowSegment:
    """Consecutive rows of this rank: the positions [start, end) of one sequence."""

    sequence: RankSequence
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class StepRows:
    """The T rows of one (dp, cp) coordinate in a step, the same on all its tp ranks and stages.

    Hidden states are spread over the tp ranks: rank t has the rows [t * local_rows, (t + 1) * local_rows), those from
    T on being padding. `padded_rows` is the largest local row count of the stage. `token_ids` [T] are the prompt's;
    rows that embed the last token of a slot are listed in `slot_rows` with their `slots`. `pages` and `offsets` [T]
    say where each row's K and V go. `draws` pairs a row with the chunk whose next token it gives. `chunks` are those
    of the dp coordinate, whatever cp coordinate they are cut to.
    """

    chunks: tuple[PlacedChunk, ...]
    segments: tuple[RowSegment, ...]
    local_rows: int
    padded_rows: int
    positions: Ints
    token_ids: Ints
    slot_rows: Ints
    slots: Ints
    pages: Ints
    offsets: Ints
    draws: tuple[tuple[int, PlacedChunk], ...]

    @property
    def num_rows(self) -> int:
        """T."""
        return len(self.positions)


class SequenceTables:
    """The sequences of a replica as one rank knows them."""

    def __init__(self, *, shape: ReplicaShape, coordinates: RankCoordinates, settings: EngineSettings) -> None:
        self._shape = shape
        self._coordinates = coordinates
        self._settings = settings
        self._page_size = settings.page_size
        self._sequences: dict[int, RankSequence] = {}

    def joining(self, plan: step_pb2.StepPlan) -> Iterator[tuple[int, int]]:
        """The (slot, first token) of sequences that join with a token to embed."""
        for join in plan.joins:
            if join.HasField("first_token"):
                yield join.slot, join.first_token

    def apply(self, plan: step_pb2.StepPlan) -> StepRows:
        """Takes the plan's changes and returns this rank's rows."""
        for slot in plan.leaves:
            del self._sequences[slot]
        for join in plan.joins:
            self._sequences[join.slot] = _joined(join, cp=self._shape.attention.cp)
        placed = [self._place(chunk) for chunk in plan.chunks]
        return self._rows(placed)

    def _place(self, chunk: step_pb2.Chunk) -> PlacedChunk:
        sequence = self._sequences[chunk.slot]
        cached_pages = -(-chunk.cached_tokens // self._page_size)
        cut = cut_chunk(
            cached_tokens=chunk.cached_tokens,
            new_tokens=chunk.new_tokens,
            page_size=self._page_size,
            cp=self._shape.attention.cp,
            offset=chunk.offset,
            page_owners=PageOwners(sequence.table.places, count=cached_pages),
        )
        if len(sequence.table) * self._page_size < chunk.cached_tokens + chunk.new_tokens:
            for owner, page in zip(cut.new_page_owners, chunk.new_pages, strict=True):
                sequence.table.append(PagePlace(coordinate=owner, page=page))
        start, sequence.handed_off = sequence.handed_off, chunk.cached_tokens + chunk.new_tokens
        return PlacedChunk(sequence=sequence, chunk=chunk, segments=cut.segments, handoff_start=start)

    def _rows(self, placed: list[PlacedChunk]) -> StepRows:
        mine = self._coordinates
        own = tuple(item for item in placed if self._settings.dp_rank_of(item.chunk.slot) == mine.attn_dp_rank)
        builder = _RowBuilder(page_size=self._page_size, coordinate=mine.attn_cp_rank)
        for item in own:
            builder.add(item)
        return builder.finish(own, tp=self._shape.attention.tp, padded_rows=self._padded_rows(placed))

    def _padded_rows(self, placed: list[PlacedChunk]) -> int:
        counts = np.zeros((self._shape.attention.dp, self._shape.attention.cp), dtype=np.int64)
        for item in placed:
            dp_rank = self._settings.dp_rank_of(item.chunk.slot)
            for segment in item.segments:
                counts[dp_rank, segment.coordinate] += segment.end - segment.start
        return -(-int(counts.max(initial=0)) // self._shape.attention.tp)


class _RowBuilder:
    """Collects the rows of one cp coordinate, chunk by chunk."""

    def __init__(self, *, page_size: int, coordinate: int) -> None:
        self._page_size = page_size
        self._coordinate = coordinate
        self._segments: list[RowSegment] = []
        self._positions: list[Ints] = []
        self._pages: list[Ints] = []
        self._token_ids: list[int] = []
        self._slot_rows: list[int] = []
        self._slots: list[int] = []
        self._draws: list[tuple[int, PlacedChunk]] = []

    def add(self, item: PlacedChunk) -> None:
        """Adds the segments of a chunk that this coordinate works on."""
        for segment in item.segments:
            if segment.coordinate == self._coordinate:
                self._add_segment(item, segment)

    def _add_segment(self, item: PlacedChunk, segment: Segment) -> None:
        start, end, cached = segment.start, segment.end, item.chunk.cached_tokens
        first_row = len(self._token_ids)
        positions = np.arange(start, end)
        table = item.sequence.table.places
        first_page = start // self._page_size
        numbers = np.array([place.page for place in table[first_page : -(-end // self._page_size)]])
        self._segments.append(RowSegment(sequence=item.sequence, start=start, end=end))
        self._positions.append(positions)
        self._pages.append(numbers[positions // self._page_size - first_page])
        if item.chunk.token_ids:
            self._token_ids.extend(item.chunk.token_ids[start - cached : end - cached])
        else:
            self._slot_rows.append(first_row)
            self._slots.append(item.sequence.slot)
            self._token_ids.append(0)
        if item.chunk.sample and end == item.end:
            self._draws.append((first_row + end - start - 1, item))

    def finish(self, chunks: tuple[PlacedChunk, ...], *, tp: int, padded_rows: int) -> StepRows:
        """The rows collected."""
        positions = np.concatenate([np.empty(0, dtype=np.int64), *self._positions])
        return StepRows(
            chunks=chunks,
            segments=tuple(self._segments),
            local_rows=-(-len(positions) // tp),
            padded_rows=padded_rows,
            positions=positions,
            token_ids=np.array(self._token_ids, dtype=np.int64),
            slot_rows=np.array(self._slot_rows, dtype=np.int64),
            slots=np.array(self._slots, dtype=np.int64),
            pages=np.concatenate([np.empty(0, dtype=np.int64), *self._pages]),
            offsets=positions % self._page_size,
            draws=tuple(self._draws),
        )


def _joined(join: step_pb2.SequenceJoin, *, cp: int) -> RankSequence:
    return RankSequence(
        slot=join.slot,
        request_id=join.request_id,
        sampling=join.sampling,
        target=join.target if join.HasField("target") else None,
        table=PageTable(cp=cp, places=page_places(join.pages)),
        target_places=page_places(join.target.pages),
    )


def page_places(pages: Iterable[control_pb2.Page]) -> list[PagePlace]:
    """A table as a message has it, worked out once: it is as long as the sequence, and each chunk looks at it."""
    return [PagePlace(coordinate=page.coordinate, page=page.page) for page in pages]
