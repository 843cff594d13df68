"""What one dp coordinate holds: its pages, its slots, and the sequences that run there in order of admission.

Who comes in is chosen in `admission.py`, what they compute in `chunk_planner.py`.
"""

from collections.abc import Sequence as Items

from parallel.settings import EngineSettings
from proto import control_pb2, step_pb2
from worker.engine.pages import DpPages
from worker.engine.sequence import Sequence


class DpState:
    """A sequence is here from its admission, with a slot and pages or the promise of them, until its release."""

    def __init__(self, *, dp: int, cp: int, settings: EngineSettings) -> None:
        self.dp = dp
        self.pages = DpPages(cp=cp, num_pages=settings.num_pages)
        self.running: dict[int, Sequence] = {}
        #: Whether pages or a slot came back since admission looked last: looking costs the length of a prompt.
        self.has_freed = False
        self._page_size = settings.page_size
        self._free_slots = list(reversed(settings.slots_of(dp)))
        self._leaves: list[int] = []

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

    def admit(self, sequence: Sequence, *, pages: int, cached: Items[bytes]) -> None:
        """`sequence` runs here from now on, after the prefix `cached`; `pages` on every cp rank are promised to it."""
        self.pages.promise(sequence.request_id, pages, cached=cached)
        sequence.num_joined_pages = len(cached)
        sequence.cached_tokens = sequence.planned_tokens = len(cached) * self._page_size
        self._run(sequence, slot=self.take_slot())

    def start(self, sequence: Sequence, *, slot: int, num_pages: int) -> None:
        """`sequence` runs here from now on, in the slot and the pages that were reserved for it."""
        sequence.num_joined_pages = num_pages
        self._run(sequence, slot=slot)

    def join(self, sequence: Sequence) -> step_pb2.SequenceJoin:
        """What ranks have to know of `sequence` before its first chunk."""
        places = self.pages.table(sequence.request_id)[: sequence.num_joined_pages]
        join = step_pb2.SequenceJoin(slot=sequence.slot, request_id=sequence.request_id, sampling=sequence.sampling)
        join.pages.extend(control_pb2.Page(coordinate=place.coordinate, page=place.page) for place in places)
        if sequence.prefill_end < len(sequence.tokens):
            join.first_token = sequence.tokens[-1]
        if sequence.target is not None:
            join.target.CopyFrom(sequence.target)
        sequence.joined = True
        return join

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
        sequence.page_keys = None
        self.pages.withdraw(sequence.request_id)

    def release(self, sequence: Sequence) -> None:
        """Gives up what an ended sequence holds; where the prefix cache is on, its outputs' full pages stay there."""
        if sequence.page_keys is not None:
            # Of the token drawn last no KV was computed, and of what was planned behind it none that counts.
            known = min(len(sequence.tokens), sequence.planned_tokens)
            sequence.page_keys.extend(sequence.tokens, end=known)
            self.publish(sequence, start=sequence.prefill_end, end=known)
        self.pages.release(sequence.request_id)
        self.give_back_slot(sequence.slot)
        del self.running[sequence.request_id]
        if sequence.joined:
            self._leaves.append(sequence.slot)
        self.has_freed = True

    def _run(self, sequence: Sequence, *, slot: int) -> None:
        sequence.dp, sequence.slot = self.dp, slot
        self.running[sequence.request_id] = sequence
