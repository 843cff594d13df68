"""What one dp coordinate holds: its pages, slots and homes, and its sequences in order of admission.

Who comes in is chosen in `admission.py`, what they compute in `chunk_planner.py`.
"""

from collections.abc import Sequence as Items

from parallel.settings import EngineSettings
from parallel.shape import ReplicaShape
from parallel.storage import CacheGroup
from proto import step_pb2
from worker.engine.decode_turns import DecodeTurns
from worker.engine.homes import Homes
from worker.engine.pages import DpPages
from worker.engine.sequence import Sequence


class DpState:
    """A sequence is here from its admission, with a slot and pages or the promise of them, until its release.

    `by_slot` has all of them; `prompts`, by request, those of whose prompt tokens are left to plan; `turns` those that
    decode. `tokens_ahead` is what all are still to compute, of prompts and, at most, outputs.
    """

    def __init__(self, *, dp: int, shape: ReplicaShape, settings: EngineSettings, groups: Items[CacheGroup]) -> None:
        cp, pp = shape.attention.cp, shape.pp
        self.dp = dp
        self.pages = DpPages(groups, cp=cp, pp=pp, settings=settings)
        self.homes = Homes(cp)
        self.by_slot: list[Sequence | None] = [None] * settings.max_sequences
        self.prompts: dict[int, Sequence] = {}
        self.turns = DecodeTurns(cp=cp)
        self.tokens_ahead = 0
        #: Whether pages or a slot came back since admission looked last: looking costs the length of a prompt.
        self.has_freed = False
        self._page_size = settings.page_size
        self._free_slots = list(reversed(range(settings.max_sequences)))
        self._leaves: list[int] = []

    @property
    def has_slot(self) -> bool:
        """Whether one more sequence may be here."""
        return bool(self._free_slots)

    def take_slot(self) -> int:
        """A free slot."""
        return self._free_slots.pop()

    def give_back_slot(self, slot: int) -> None:
        """Frees a slot."""
        self._free_slots.append(slot)

    def sequence(self, slot: int) -> Sequence:
        """The sequence in a slot that is taken."""
        sequence = self.by_slot[slot]
        assert sequence is not None, f"slot {slot} of dp coordinate {self.dp} is free"
        return sequence

    def admit(self, sequence: Sequence, *, num_pages: int, cached: Items[bytes]) -> None:
        """`sequence` runs here from now on, after the prefix `cached`; what its `num_pages` need is promised to it."""
        self.pages.promise(sequence.request_id, num_pages, cached=cached)
        sequence.cached_tokens = sequence.planned_tokens = len(cached) * self._page_size
        home = self.homes.next
        if not sequence.handoff:
            self.homes.take(home)
        self._run(sequence, slot=self.take_slot(), home=0 if sequence.handoff else home)
        self.prompts[sequence.request_id] = sequence

    def start(self, sequence: Sequence, *, slot: int, home: int) -> None:
        """`sequence` decodes here from now on, with what was reserved for it."""
        self._run(sequence, slot=slot, home=home)
        self.decode(sequence)

    def decode(self, sequence: Sequence) -> None:
        """From now on its tokens are planned one by one."""
        sequence.plain_until = sequence.planned_tokens
        self.turns.add(sequence)

    def stop(self, sequence: Sequence) -> None:
        """Nothing more is planned of it."""
        self.tokens_ahead -= sequence.tokens_ahead
        sequence.compute_end = sequence.planned_tokens
        self.prompts.pop(sequence.request_id, None)
        self.turns.discard(sequence)

    def join(self, sequence: Sequence) -> step_pb2.SequenceJoin:
        """What ranks have to know of `sequence` before its first chunk; no page of that has begun."""
        sequence.joined = True
        return step_pb2.SequenceJoin(
            slot=sequence.slot,
            request_id=sequence.request_id,
            sampling=sequence.sampling,
            pages=self.pages.columns(sequence.request_id),
            first_token=None if sequence.is_prefilling else sequence.tokens[-1],
            target=sequence.target,
            cached_tokens=sequence.planned_tokens,
            prompt_end=sequence.prefill_end,
            home=sequence.home,
        )

    def take_leaves(self) -> list[int]:
        """The slots that ranks may forget, each told once."""
        leaves, self._leaves = self._leaves, []
        return leaves

    def publish(self, sequence: Sequence, *, start: int, end: int) -> None:
        """Lets others read the pages of positions [start, end) that are full: its keys reach so far."""
        if sequence.page_keys is not None:
            first, last = start // self._page_size, end // self._page_size
            self.pages.publish(sequence.request_id, sequence.page_keys.digests[first:last], first=first)

    def withdraw(self, sequence: Sequence) -> None:
        """What `sequence` computed or found is not to be trusted: no other finds it from now on."""
        if sequence.page_keys is not None:
            self.pages.withdraw(sequence.page_keys.digests)
            sequence.page_keys = None

    def release(self, sequence: Sequence) -> None:
        """Gives up what an ended sequence holds; where the prefix cache is on, its outputs' full pages stay there."""
        if sequence.page_keys is not None:
            # Of the token drawn last no KV was computed, and of what was planned behind it none that counts.
            known = min(len(sequence.tokens), sequence.planned_tokens)
            sequence.page_keys.extend(sequence.tokens, end=known)
            self.publish(sequence, start=sequence.prefill_end, end=known)
        self.pages.release(sequence.request_id)
        self.give_back_slot(sequence.slot)
        if not sequence.handoff:
            self.homes.give_back(sequence.home)
        self.by_slot[sequence.slot] = None
        if sequence.joined:
            self._leaves.append(sequence.slot)
        self.has_freed = True

    def _run(self, sequence: Sequence, *, slot: int, home: int) -> None:
        sequence.dp, sequence.slot, sequence.home = self.dp, slot, home
        self.by_slot[slot] = sequence
        self.tokens_ahead += sequence.tokens_ahead
