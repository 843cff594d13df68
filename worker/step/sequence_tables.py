"""From step plans to rows: which rows of a step this rank computes, and what is known of everybody's. No kernels.

A plan is of one dp coordinate; all its ranks apply it alike, each to tables of its own pages.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from attention.exchange.rows import ExchangeRows
from parallel.arrays import Bools, Ints
from parallel.page_columns import PageColumns, column
from parallel.settings import EngineSettings
from parallel.shape import RankCoordinates, ReplicaShape
from parallel.storage import CacheGroup
from proto import control_pb2, step_pb2
from worker.step.rows import DrawRows, StepRows
from worker.step.segments import Chunks, Segments, cut_chunks, plan_chunks
from worker.step.sequences import HandedChunk, RankSequence, TablePart, table_part
from worker.step.tables import GroupTables


class SequenceTables:
    """The sequences of a dp coordinate as one rank knows them."""

    def __init__(
        self,
        *,
        shape: ReplicaShape,
        coordinates: RankCoordinates,
        settings: EngineSettings,
        groups: Sequence[CacheGroup],
        device: torch.device,
    ) -> None:
        self._sizes = shape.attention
        self._cp_rank = coordinates.attn_cp_rank
        self._page_size = settings.page_size
        self._groups = groups
        self._spare_slot = settings.max_sequences
        self._sequences: dict[int, RankSequence] = {}
        self._lengths = np.zeros(settings.max_sequences + 1, dtype=np.int64)
        self._homes = np.zeros(settings.max_sequences + 1, dtype=np.int64)
        self._tables = [
            GroupTables(
                num_slots=settings.max_sequences,
                cp=shape.attention.cp,
                cp_rank=coordinates.attn_cp_rank,
                page_size=settings.page_size,
                spare_page=settings.pages_of(group, pp=shape.pp),
                device=device,
            )
            for group in groups
        ]

    def joining(self, plan: step_pb2.StepPlan) -> Iterator[tuple[int, int]]:
        """The (slot, first token) of sequences that join with a token to embed."""
        for join in plan.joins:
            if join.HasField("first_token"):
                yield join.slot, join.first_token

    def sampling(self, slot: int) -> control_pb2.Sampling:
        """How tokens of the sequence in `slot` are drawn."""
        return self._sequences[slot].sampling

    def apply(self, plan: step_pb2.StepPlan) -> StepRows:
        """Takes the plan's changes and returns this rank's rows."""
        for slot in plan.leaves:
            del self._sequences[slot]
        for join in plan.joins:
            self._join(join)
        for tables, new in zip(self._tables, plan.new_pages, strict=False):
            columns = PageColumns(cp_ranks=column(new.cp_ranks), pages=column(new.pages))
            tables.append(column(new.slots).astype(np.int64), columns)
        chunks = plan_chunks(plan, lengths=self._lengths)
        # A prompt's pages have one owner in all groups: those that it begins, and the half-full one it begins in.
        owners = self._tables[0].owners
        segments = cut_chunks(chunks, homes=self._homes, owners=owners, page_size=self._page_size)
        rows = self._rows(plan, chunks, segments)
        self._lengths[chunks.slots] = chunks.ends
        return rows

    def _join(self, join: step_pb2.SequenceJoin) -> None:
        target = join.target if join.HasField("target") else None
        self._sequences[join.slot] = RankSequence(
            request_id=join.request_id,
            sampling=join.sampling,
            prompt_end=join.prompt_end,
            target=target,
            target_pages=tuple(map(table_part, join.target.pages)),
        )
        slot = np.array([join.slot])
        self._lengths[slot], self._homes[slot] = join.cached_tokens, join.home
        for tables, pages in zip(self._tables, join.pages, strict=True):
            part = table_part(pages)
            tables.clear(join.slot, first_page=part.first_page)
            tables.append(np.full(len(part.columns), join.slot), part.columns)
            start = np.array([part.first_page * self._page_size])
            tables.advance(slot, starts=start, ends=np.maximum(start, join.cached_tokens))

    def _rows(self, plan: step_pb2.StepPlan, chunks: Chunks, segments: Segments) -> StepRows:
        is_own = segments.computed_by == self._cp_rank
        counts = (segments.end - segments.start)[is_own]
        num_rows, local_rows = int(counts.sum()), plan.local_rows[self._cp_rank]
        padding = self._sizes.tp * local_rows - num_rows
        assert padding >= 0, (
            f"the plan names {local_rows} rows for each of tp {self._sizes.tp}, but there are {num_rows}"
        )
        groups = {
            group.name: self._exchange_rows(group, tables, chunks, segments, padding=padding)
            for group, tables in zip(self._groups, self._tables, strict=True)
        }
        everywhere = groups[self._groups[0].name]
        own_chunk, first_row = segments.chunk[is_own], np.cumsum(counts) - counts
        is_decoding = own_chunk < chunks.num_decoding
        return StepRows(
            local_rows=local_rows,
            padded_rows=plan.padded_rows,
            positions=everywhere.take(everywhere.computed_by == self._cp_rank).positions,
            token_ids=self._token_ids(chunks, segments, is_own, total=num_rows + padding),
            slot_rows=first_row[is_decoding],
            slots=chunks.slots[own_chunk[is_decoding]],
            draws=_draws(chunks, segments, is_own, padded=plan.padded_draws),
            drawn_slots=[
                slot for slot in chunks.slots[chunks.is_drawn].tolist() if self._sequences[slot].target is None
            ],
            probes={probe.slot: probe for probe in plan.probes},
            handed=tuple(self._handed(chunks, segments, is_own)),
            groups=groups,
        )

    def _exchange_rows(
        self, group: CacheGroup, tables: GroupTables, chunks: Chunks, segments: Segments, *, padding: int
    ) -> ExchangeRows:
        slots, starts = chunks.slots[segments.chunk], chunks.starts[segments.chunk]
        end_page = -(-segments.end // self._page_size)
        seen = tables.begun(slots, starts=starts, ends=segments.end)
        first_page = np.zeros_like(end_page)
        skipped = np.zeros_like(seen)
        if group.window:
            first_page = np.maximum(segments.start - group.window + 1, 0) // self._page_size
            skipped = seen - tables.between(slots, first=first_page, end=end_page)
        stored_by = tables.owner_of(slots, end_page - 1)
        tables.advance(chunks.slots, starts=chunks.starts, ends=chunks.ends)
        at_home = np.zeros((padding, self._sizes.cp), dtype=np.int64)
        at_home[:, self._cp_rank] = 1

        def padded(values: Ints, value: int) -> Ints:
            return np.concatenate([values, np.full(padding, value)]) if padding else values

        return ExchangeRows(
            page_size=self._page_size,
            tables=tables.tables,
            owners=tables.owners,
            cached_tokens=padded(chunks.starts, 0),
            new_tokens=padded(chunks.ends - chunks.starts, 1),
            chunk=np.concatenate([segments.chunk, len(chunks.slots) + np.arange(padding)]),
            slot=padded(slots, self._spare_slot),
            computed_by=padded(segments.computed_by, self._cp_rank),
            stored_by=padded(stored_by, self._cp_rank),
            start=padded(segments.start, 0),
            end=padded(segments.end, 1),
            seen=np.concatenate([seen, at_home]),
            skipped=np.concatenate([skipped, np.zeros_like(at_home)]),
            first_page=padded(first_page, 0),
            padding=padding,
        )

    def _token_ids(self, chunks: Chunks, segments: Segments, is_own: Bools, *, total: int) -> Ints:
        ids = np.zeros(total, dtype=np.int64)
        row = 0
        for segment in np.flatnonzero(is_own).tolist():
            chunk, start, end = int(segments.chunk[segment]), int(segments.start[segment]), int(segments.end[segment])
            if chunk >= chunks.num_decoding:
                first = start - int(chunks.starts[chunk])
                tokens = chunks.token_ids[chunk - chunks.num_decoding]
                ids[row : row + end - start] = tokens[first : first + end - start]
            row += end - start
        return ids

    def _handed(self, chunks: Chunks, segments: Segments, is_own: Bools) -> Iterator[HandedChunk]:
        for chunk in range(chunks.num_decoding, len(chunks.slots)):
            slot, end = int(chunks.slots[chunk]), int(chunks.ends[chunk])
            sequence = self._sequences[slot]
            if sequence.target is None:
                continue
            own = is_own & (segments.chunk == chunk)
            cached = int(chunks.starts[chunk]) - sequence.handed_off
            yield HandedChunk(
                sequence=sequence,
                start=sequence.handed_off,
                end=end,
                # What the prefix cache had goes with the first chunk, wherever it lies: reckoned as if all were here.
                own_tokens=int((segments.end - segments.start)[own].sum()) + cached,
                sources=tuple(
                    self._source(group, tables, sequence, slot=slot, end=end)
                    for group, tables in zip(self._groups, self._tables, strict=True)
                ),
            )
            sequence.handed_off = end

    def _source(
        self, group: CacheGroup, tables: GroupTables, sequence: RankSequence, *, slot: int, end: int
    ) -> TablePart:
        first = max(sequence.handed_off, group.first_seen(sequence.prompt_end)) // self._page_size
        last = max(-(-end // self._page_size), first)
        owners, numbers = tables.last_pages(slot, first=first, end=last)
        return TablePart(first_page=first, columns=PageColumns(cp_ranks=owners.astype(np.int32), pages=numbers))


def _draws(chunks: Chunks, segments: Segments, is_own: Bools, *, padded: int) -> DrawRows:
    """The rows that end a chunk which is drawn from."""
    ends_chunk = np.append(segments.chunk[1:] != segments.chunk[:-1], np.ones(min(len(segments.chunk), 1), np.bool_))
    is_drawn = is_own & ends_chunk & chunks.is_drawn[segments.chunk]
    last_row = np.cumsum(np.where(is_own, segments.end - segments.start, 0)) - 1
    return DrawRows(
        rows=last_row[is_drawn],
        slots=chunks.slots[segments.chunk[is_drawn]],
        positions=segments.end[is_drawn],
        padded=padded,
    )
