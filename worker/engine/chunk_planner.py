"""Which sequences of one dp coordinate have a chunk in the next step, how long it is and where its pages are.

What the coordinate holds is `dp_state.py`'s; who is in which step that was sent out, `steps.py`'s.
"""

from collections.abc import Iterator

from parallel.chunk import choose_offset, cut_chunk
from parallel.handoff import PageOwners
from parallel.settings import EngineSettings
from parallel.shape import ReplicaShape
from proto import step_pb2
from worker.engine.dp_state import DpState
from worker.engine.sequence import Sequence

#: Steps in flight that one decoding sequence may be in.
_MAX_STEPS_OF_ONE = 2


class ChunkPlanner:
    """Plans the chunks of one dp coordinate: decoding sequences first, then prompts, up to the batch's budget."""

    def __init__(self, state: DpState, *, shape: ReplicaShape, settings: EngineSettings) -> None:
        self._state = state
        self._pages = state.pages
        self._pp = shape.pp
        self._cp = shape.attention.cp
        self._num_writers = shape.ranks_per_sequence
        self._settings = settings
        self._turn = 0

    def plan_chunks(self) -> Iterator[tuple[Sequence, step_pb2.Chunk]]:
        """The chunks of the next step, with their pages taken and the sequences' counts moved on."""
        budget = self._settings.max_batch_tokens
        self._turn += 1
        for sequence in self._next_to_decode()[:budget]:
            budget -= 1
            sequence.last_turn = self._turn
            yield sequence, self._plan_chunk(sequence, new_tokens=1)
        for sequence in self._state.running.values():
            new_tokens = self._prompt_tokens(sequence, budget=budget)
            if new_tokens:
                budget -= new_tokens
                yield sequence, self._plan_chunk(sequence, new_tokens=new_tokens)

    def _next_to_decode(self) -> list[Sequence]:
        """The decoding sequences of the next step: every pp-th part of them in turn, so that all stages have work.

        A sequence is in one running step at most, and may be in one planned ahead.
        """
        decoding = [sequence for sequence in self._state.running.values() if sequence.can_decode]
        ready = [sequence for sequence in decoding if sequence.in_flight < _MAX_STEPS_OF_ONE]
        ready.sort(key=lambda sequence: (sequence.in_flight, sequence.last_turn))
        return ready[: -(-len(decoding) // self._pp)]

    def _prompt_tokens(self, sequence: Sequence, *, budget: int) -> int:
        """How many tokens of its prompt come next: all that are left, or as many as end a page inside the budget."""
        if not sequence.is_prefilling or (sequence.handoff and sequence.target is None):
            return 0
        left = sequence.prefill_end - sequence.planned_tokens
        if left <= budget:
            return left
        size = self._settings.page_size
        whole_pages = (sequence.planned_tokens + budget) // size * size - sequence.planned_tokens
        return whole_pages if whole_pages > 0 else budget

    def _plan_chunk(self, sequence: Sequence, *, new_tokens: int) -> step_pb2.Chunk:
        size, cached = self._settings.page_size, sequence.planned_tokens
        table = self._pages.table(sequence.request_id)
        needed = -(-(cached + new_tokens) // size)
        owners = PageOwners(table, count=-(-cached // size))
        offset = self._offset(sequence, owners, pages=needed - len(owners))
        chunk = step_pb2.Chunk(slot=sequence.slot, cached_tokens=cached, new_tokens=new_tokens, offset=offset)
        if len(table) < needed:
            cut = cut_chunk(
                cached_tokens=cached,
                new_tokens=new_tokens,
                page_size=size,
                cp=self._cp,
                offset=offset,
                page_owners=owners,
            )
            chunk.new_pages.extend(
                self._pages.take(sequence.request_id, cp_rank=owner).page for owner in cut.new_page_owners
            )
        if sequence.is_prefilling:
            chunk.token_ids.extend(sequence.tokens[cached : cached + new_tokens])
            # Steps run in order, so who reads these pages finds them written.
            self._state.publish(sequence, start=cached, end=cached + new_tokens)
        self._advance(sequence, chunk)
        return chunk

    def _offset(self, sequence: Sequence, owners: PageOwners, *, pages: int) -> int:
        """The zigzag's offset: where the chunk's pages are to be, or, for one reserved before, where it is."""
        if self._cp == 1 or pages == 0:
            return 0
        table = self._pages.table(sequence.request_id)
        if len(table) > len(owners):
            assert pages == 1, "only decode finds pages reserved, and begins one at a time"
            return table[len(owners)].coordinate
        # Pages of the prefix cache lie as they lie: what is new is spread evenly for itself, as was promised.
        own = owners[sequence.num_joined_pages :]
        held = [own.count(index) for index in range(self._cp)]
        return choose_offset(pages=pages, cp=self._cp, held=held, load=self._pages.load())

    def _advance(self, sequence: Sequence, chunk: step_pb2.Chunk) -> None:
        sequence.planned_tokens += chunk.new_tokens
        sequence.in_flight += 1
        if sequence.handoff:
            sequence.writes.num_pending += self._num_writers
            # Its last chunk gives back what was promised and not taken.
            self._state.has_freed = True
        if sequence.planned_tokens < sequence.prefill_end:
            return
        chunk.sample = True
        chunk.logits = sequence.wants_logits
        if sequence.num_planned_draws < len(sequence.forced_ids):
            chunk.forced_id = sequence.forced_ids[sequence.num_planned_draws]
        sequence.num_planned_draws += 1
        if sequence.handoff:
            self._pages.settle(sequence.request_id)
