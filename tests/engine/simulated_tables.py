"""What the ranks of one dp coordinate know and hold, as plain lists: plans are applied to it and proven against it.

KV at a position stands for the prompt up to there, so that whoever reads a page sees whose it is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from parallel.page_columns import column
from parallel.settings import EngineSettings
from parallel.storage import CacheGroup
from proto import control_pb2, step_pb2

#: Of a group, by number: a page of a cp rank.
Place = tuple[int, int, int]


@dataclass(kw_only=True)
class Known:
    """What ranks know of a sequence. `tables` by group: pages by place in the table, from the first that was told."""

    request_id: int
    home: int
    prompt_end: int
    end: int
    has_target: bool
    tables: list[dict[int, tuple[int, int]]]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Positions [start, end) of a sequence in a step, the pages that its rows see, and those that writes then read."""

    request_id: int
    slot: int
    start: int
    end: int
    is_drawn: bool
    seen: frozenset[Place]
    is_handed_off: bool
    handed_off: frozenset[Place]


@dataclass(kw_only=True)
class SimulatedTables:
    """Of each sequence by slot. `prompts` by request; `memory` is what was written where."""

    cp: int
    groups: Sequence[CacheGroup]
    settings: EngineSettings
    prompts: dict[int, tuple[int, ...]]
    memory: dict[tuple[Place, int], object] = field(default_factory=dict)
    known: dict[int, Known] = field(default_factory=dict)
    #: Rows of the step that was applied last, by cp rank: of decode alone, and all.
    decode_rows: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def apply(self, plan: step_pb2.StepPlan) -> list[Chunk]:
        """Takes a plan; every row of it writes, and finds what it sees. Returns its chunks in order."""
        for slot in plan.leaves:
            del self.known[slot]
        for join in plan.joins:
            assert join.slot not in self.known and join.slot < self.settings.max_sequences
            self.known[join.slot] = self._joined(join)
        self._add_pages(plan)
        spans = list(self._spans(plan))
        slots = [slot for slot, _, _ in spans]
        assert len(set(slots)) == len(slots), "a sequence has one chunk in a step"
        self._count_rows(spans, num_decoding=len(column(plan.decode_slots)))
        for slot, start, end in spans:
            self._write(self.known[slot], range(start, end))
            self.known[slot].end = end
        drawn = {prompt.slot for prompt in plan.prompts if prompt.sample} | set(column(plan.decode_slots).tolist())
        return [self._chunk(slot, start, end, is_drawn=slot in drawn) for slot, start, end in spans]

    def receive(self, reserved: control_pb2.Reserved, *, prompt_tokens: int) -> None:
        """A hand-off writes the KV of a prompt, in each group what is seen behind it."""
        for number, (group, pages) in enumerate(zip(self.groups, reserved.pages, strict=True)):
            table = _table(pages)
            first = max(0, prompt_tokens - group.window + 1) if group.window else 0
            for position in range(first, prompt_tokens):
                self._put(number, table, reserved.request_id, position)

    def pages(self, request_id: int) -> list[dict[int, tuple[int, int]]]:
        """The tables of a sequence that has joined."""
        return next(known.tables for known in self.known.values() if known.request_id == request_id)

    def _joined(self, join: step_pb2.SequenceJoin) -> Known:
        assert join.HasField("first_token") == (join.cached_tokens == join.prompt_end)
        return Known(
            request_id=join.request_id,
            home=join.home,
            prompt_end=join.prompt_end,
            end=join.cached_tokens,
            has_target=join.HasField("target"),
            tables=[_table(pages) for pages in join.pages],
        )

    def _add_pages(self, plan: step_pb2.StepPlan) -> None:
        assert len(plan.new_pages) == len(self.groups)
        for number, new in enumerate(plan.new_pages):
            columns = [column(part).tolist() for part in (new.slots, new.cp_ranks, new.pages)]
            runs = [slot for index, slot in enumerate(columns[0]) if index == 0 or columns[0][index - 1] != slot]
            assert len(runs) == len(set(runs)), "the pages of a slot follow each other"
            for slot, cp_rank, page in zip(*columns, strict=True):
                known = self.known[slot]
                table = known.tables[number]
                assert cp_rank < self.cp
                table[max(table, default=self._first_seen(number, known.end) - 1) + 1] = (cp_rank, page)

    def _spans(self, plan: step_pb2.StepPlan) -> Iterator[tuple[int, int, int]]:
        for slot in column(plan.decode_slots).tolist():
            known = self.known[slot]
            assert known.end >= known.prompt_end
            yield slot, known.end, known.end + 1
        for prompt in plan.prompts:
            known = self.known[prompt.slot]
            token_ids = tuple(column(prompt.token_ids).tolist())
            end = known.end + len(token_ids)
            assert token_ids and token_ids == self.prompts[known.request_id][known.end : end]
            assert end <= known.prompt_end and prompt.sample == (end == known.prompt_end)
            yield prompt.slot, known.end, end

    def _count_rows(self, spans: Sequence[tuple[int, int, int]], *, num_decoding: int) -> None:
        self.decode_rows, self.rows = [0] * self.cp, [0] * self.cp
        for slot, _, _ in spans[:num_decoding]:
            self.decode_rows[self.known[slot].home] += 1
        self.rows[:] = self.decode_rows
        for slot, start, end in spans[num_decoding:]:
            for position in range(start, end):
                places = {table[position // self.settings.page_size][0] for table in self.known[slot].tables}
                assert len(places) == 1, "a prompt's rows have one owner in all groups"
                self.rows[places.pop()] += 1

    def _write(self, known: Known, positions: range) -> None:
        for number in range(len(self.groups)):
            for position in positions:
                self._put(number, known.tables[number], known.request_id, position)

    def _put(self, number: int, table: dict[int, tuple[int, int]], request_id: int, position: int) -> None:
        place, offset = divmod(position, self.settings.page_size)
        self.memory[(number, *table[place]), offset] = self._prefix(request_id, position)

    def _chunk(self, slot: int, start: int, end: int, *, is_drawn: bool) -> Chunk:
        known, size = self.known[slot], self.settings.page_size
        seen: set[Place] = set()
        handed_off: set[Place] = set()
        for number, group in enumerate(self.groups):
            first = max(0, start - group.window + 1) if group.window else 0
            for position in range(first, end):
                page = (number, *known.tables[number][position // size])
                seen.add(page)
                assert self.memory[page, position % size] == self._prefix(known.request_id, position)
            if known.has_target:
                window_start = max(0, known.prompt_end - group.window + 1) if group.window else 0
                written = range(max(start, window_start), end)
                handed_off.update((number, *known.tables[number][position // size]) for position in written)
        return Chunk(
            request_id=known.request_id,
            slot=slot,
            start=start,
            end=end,
            is_drawn=is_drawn,
            seen=frozenset(seen),
            is_handed_off=known.has_target,
            handed_off=frozenset(handed_off),
        )

    def _first_seen(self, number: int, end: int) -> int:
        window = self.groups[number].window
        return max(0, end - window + 1) // self.settings.page_size if window else 0

    def _prefix(self, request_id: int, position: int) -> object:
        """What KV at a position stands for: the prompt up to it; of drawn tokens, whose they are."""
        prompt_ids = self.prompts[request_id]
        return prompt_ids[: position + 1] if position < len(prompt_ids) else (prompt_ids, request_id, position)


def _table(pages: control_pb2.Pages) -> dict[int, tuple[int, int]]:
    places = zip(column(pages.cp_ranks).tolist(), column(pages.pages).tolist(), strict=True)
    return dict(enumerate(places, pages.first_page))
