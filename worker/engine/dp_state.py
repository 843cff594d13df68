"""The state of one dp coordinate: its pages, its slots and the sequences that run there, in order of admission."""

from collections.abc import Iterator

from parallel.chunk import choose_offset, cut_chunk
from parallel.handoff import PageOwners
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes
from proto import step_pb2
from worker.engine.pages import DpPages
from worker.engine.sequence import Sequence

#: Steps in flight that one decoding sequence may be in.
_MAX_STEPS_OF_ONE = 2


class DpState:
    """Plans the chunks of one dp coordinate: decoding sequences first, then prompts, up to the batch's budget."""

    def __init__(self, *, dp: int, pp: int, sizes: AttentionSizes, settings: EngineSettings) -> None:
        self.dp = dp
        self.pages = DpPages(cp=sizes.cp, num_pages=settings.num_pages)
        self.running: dict[int, Sequence] = {}
        self._pp = pp
        self._cp = sizes.cp
        self._turn = 0
        self._settings = settings
        self._free_slots = list(reversed(settings.slots_of(dp)))

    @property
    def has_slot(self) -> bool:
        """Whether one more sequence may be here."""
        return bool(self._free_slots)

    @property
    def tokens_ahead(self) -> int:
        """Tokens that the sequences here are still to compute: of their prompts, and of their outputs at most."""
        return sum(sequence.tokens_ahead for sequence in self.running.values())

    def take_slot(self) -> int:
        """A free slot."""
        return self._free_slots.pop()

    def give_back_slot(self, slot: int) -> None:
        """Frees a slot."""
        self._free_slots.append(slot)

    def plan_chunks(self) -> Iterator[tuple[Sequence, step_pb2.Chunk]]:
        """The chunks of the next step, with their pages taken and the sequences' counts moved on."""
        budget = self._settings.max_batch_tokens
        self._turn += 1
        for sequence in self._next_to_decode()[:budget]:
            budget -= 1
            sequence.last_turn = self._turn
            yield sequence, self._plan_chunk(sequence, new_tokens=1)
        for sequence in self.running.values():
            new_tokens = self._prompt_tokens(sequence, budget=budget)
            if new_tokens:
                budget -= new_tokens
                yield sequence, self._plan_chunk(sequence, new_tokens=new_tokens)

    def _next_to_decode(self) -> list[Sequence]:
        """The decoding sequences of the next step: every pp-th part of them in turn, so that all stages have work.

        A sequence is in one running step at most, and may be in one planned ahead.
        """
        decoding = [sequence for sequence in self.running.values() if sequence.can_decode]
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
        table = self.pages.table(sequence.request_id)
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
                self.pages.take(sequence.request_id, cp_rank=owner).page for owner in cut.new_page_owners
            )
        if sequence.is_prefilling:
            chunk.token_ids.extend(sequence.tokens[cached : cached + new_tokens])
            self._publish(sequence, end=cached + new_tokens)
        self._advance(sequence, chunk)
        return chunk

    def _offset(self, sequence: Sequence, owners: PageOwners, *, pages: int) -> int:
        """The zigzag's offset: where the chunk's pages are to be, or, for one reserved before, where it is."""
        if self._cp == 1 or pages == 0:
            return 0
        table = self.pages.table(sequence.request_id)
        if len(table) > len(owners):
            assert pages == 1, "only decode finds pages reserved, and begins one at a time"
            return table[len(owners)].coordinate
        # Pages of the prefix cache lie as they lie: what is new is spread evenly for itself, as was promised.
        own = owners[sequence.num_joined_pages :]
        held = [own.count(index) for index in range(self._cp)]
        return choose_offset(pages=pages, cp=self._cp, held=held, load=self.pages.load())

    def _publish(self, sequence: Sequence, *, end: int) -> None:
        """Lets others read the prompt's full pages: steps run in order, so who reads them finds them written."""
        if sequence.page_keys is not None:
            first = sequence.planned_tokens // self._settings.page_size
            last = end // self._settings.page_size
            self.pages.publish(sequence.request_id, sequence.page_keys.digests[first:last], first=first)

    def withdraw(self, sequence: Sequence) -> None:
        """What `sequence` computed or found is not to be trusted: no other finds it from now on."""
        sequence.page_keys = None
        self.pages.withdraw(sequence.request_id)

    def release(self, sequence: Sequence) -> None:
        """Gives up what an ended sequence holds; where the prefix cache is on, its outputs' full pages stay there."""
        if sequence.page_keys is not None:
            # Of the token drawn last no KV was computed, and of what was planned behind it none that counts.
            known = min(len(sequence.tokens), sequence.planned_tokens)
            sequence.page_keys.extend(sequence.tokens, end=known)
            first = sequence.prefill_end // self._settings.page_size
            last = known // self._settings.page_size
            self.pages.publish(sequence.request_id, sequence.page_keys.digests[first:last], first=first)
        self.pages.release(sequence.request_id)
        self.give_back_slot(sequence.slot)
        del self.running[sequence.request_id]

    def _advance(self, sequence: Sequence, chunk: step_pb2.Chunk) -> None:
        sequence.planned_tokens += chunk.new_tokens
        sequence.in_flight += 1
        if sequence.planned_tokens < sequence.prefill_end:
            return
        chunk.sample = True
        chunk.logits = sequence.wants_logits
        if sequence.num_planned_draws < len(sequence.forced_ids):
            chunk.forced_id = sequence.forced_ids[sequence.num_planned_draws]
        sequence.num_planned_draws += 1
        if sequence.handoff:
            self.pages.settle(sequence.request_id)
