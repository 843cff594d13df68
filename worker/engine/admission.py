"""Who may come in: prompts and reservations that wait, first come first served, and where each fits.

What comes in is `running.py`'s from then on.
"""

from collections import deque
from collections.abc import Sequence as Items

from proto import control_pb2
from worker.engine.dp_state import DpState
from worker.engine.outbox import Outbox
from worker.engine.prefix_cache import PageKeys
from worker.engine.request_bounds import RequestBounds
from worker.engine.reservations import Reservations
from worker.engine.sequence import Sequence, from_start, from_submit


class Admission:
    """The queues of one replica. What can never run is refused at once; what fits nowhere now waits."""

    def __init__(self, dp_states: Items[DpState], *, bounds: RequestBounds, revision: bytes, outbox: Outbox) -> None:
        """`revision` is the model's, for the keys of the prefix cache."""
        self._dp_states = dp_states
        self._bounds = bounds
        self._settings = bounds.settings
        self._revision = revision
        self._outbox = outbox
        self._waiting: deque[Sequence] = deque()
        self._reservations = Reservations(dp_states, page_size=bounds.settings.page_size)

    @property
    def num_waiting(self) -> int:
        """Prompts and reservations without pages."""
        return len(self._waiting) + self._reservations.num_queued

    @property
    def num_reserved(self) -> int:
        """Reservations that have pages and whose sequence has not started."""
        return len(self._reservations) - self._reservations.num_queued

    def submit(self, message: control_pb2.Submit) -> None:
        """Queues a prompt, or refuses it."""
        sequence = from_submit(message)
        if not self._is_sound(sequence.tokens, message):
            return
        if self._settings.prefix_cache:
            sequence.page_keys = PageKeys(page_size=self._settings.page_size, salt=self._revision)
            sequence.page_keys.extend(sequence.tokens, end=len(sequence.tokens))
        new_tokens = 0 if sequence.handoff else sequence.max_new_tokens
        if self._may_fit(sequence.request_id, prompt_tokens=len(sequence.tokens), max_new_tokens=new_tokens):
            self._waiting.append(sequence)

    def reserve(self, message: control_pb2.Reserve) -> None:
        """Queues a reservation, or refuses it."""
        prompt_tokens, new_tokens = message.prompt_tokens, message.max_new_tokens
        if self._may_fit(message.request_id, prompt_tokens=prompt_tokens, max_new_tokens=new_tokens):
            self._reservations.add(message)

    def start(self, message: control_pb2.Start) -> list[Sequence]:
        """The sequence of a reservation, which runs from now on; none where it is refused, the reservation with it."""
        if not self._is_sound(message.output_ids, message):
            self._reservations.release(message.request_id)
            return []
        granted = self._reservations.take(message.request_id)
        sequence = from_start(message)
        self._dp_states[granted.dp].start(sequence, slot=granted.slot, home=granted.home)
        return [sequence]

    def abort(self, request_id: int) -> bool:
        """Ends a prompt that waits; False where none of that id does."""
        for waiting in self._waiting:
            if waiting.request_id == request_id:
                self._waiting.remove(waiting)
                self._outbox.tell_ended(request_id, "abort")
                return True
        return False

    def release(self, request_id: int) -> None:
        """Ends a reservation and frees what it has; nothing where there is none."""
        if self._reservations.release(request_id):
            self._outbox.tell_ended(request_id, "abort")

    def admit_if_freed(self) -> list[Sequence]:
        """As `admit`, but looks only where pages or a slot came back: looking costs the length of its first prompt."""
        return self.admit() if any(state.has_freed for state in self._dp_states) else []

    def admit(self) -> list[Sequence]:
        """Admits waiting prompts until the first that fits nowhere, then grants reservations likewise.

        Returns the sequences that run from now on.
        """
        for state in self._dp_states:
            state.has_freed = False
        admitted: list[Sequence] = []
        while self._waiting and self._try_admit(self._waiting[0]):
            admitted.append(self._waiting.popleft())
        for reserved in self._reservations.grant():
            self._outbox.tell_reserved(reserved)
        return admitted

    def _try_admit(self, sequence: Sequence) -> bool:
        """Admits it where the least work is, its own that is not cached included; False where it fits nowhere."""
        with_slot = [state for state in self._dp_states if state.has_slot]
        # Without its cached pages too: those lie as they lie, and beside them it may not fit where it would alone.
        found = [(cached, state) for state in with_slot for cached in (self._cached(state, sequence), [])]
        num_pages = self._num_pages(sequence)
        fitting = [(cached, state) for cached, state in found if state.pages.fits(num_pages, cached=cached)]
        if not fitting:
            return False
        size = self._settings.page_size
        cached, state = min(
            fitting,
            key=lambda item: (item[1].tokens_ahead - len(item[0]) * size, -item[1].pages.num_free, item[1].dp),
        )
        state.admit(sequence, num_pages=num_pages, cached=cached)
        if sequence.handoff:
            self._outbox.tell_want_target(sequence.request_id)
        else:
            self._outbox.tell_admitted(sequence)
        return True

    def _cached(self, state: DpState, sequence: Sequence) -> list[bytes]:
        """The keys of its first pages that are cached there; its last token is never among them: it is to be drawn
        from.
        """
        most = (len(sequence.tokens) - 1) // self._settings.page_size
        digests = sequence.page_keys.digests[:most] if sequence.page_keys else []
        return digests[: state.pages.num_cached(digests)]

    def _num_pages(self, sequence: Sequence) -> int:
        """Pages of all of its positions: of the prompt where it is handed off, of all tokens else."""
        tokens = len(sequence.tokens) + (0 if sequence.handoff else sequence.max_new_tokens)
        return -(-tokens // self._settings.page_size)

    def _is_sound(self, token_ids: Items[int], message: control_pb2.Submit | control_pb2.Start) -> bool:
        return not self._refuse(message.request_id, self._bounds.fault(token_ids, message))

    def _may_fit(self, request_id: int, *, prompt_tokens: int, max_new_tokens: int) -> bool:
        misfit = self._bounds.misfit(prompt_tokens=prompt_tokens, max_new_tokens=max_new_tokens)
        return not self._refuse(request_id, misfit)

    def _refuse(self, request_id: int, reason: str | None) -> bool:
        """Refuses it at once where there is a reason; whether there was."""
        if reason is not None:
            self._outbox.tell_refused(request_id, reason)
        return reason is not None
