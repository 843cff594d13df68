"""What the router has to know: events as they happen, and drawn tokens gathered in one event for all sequences.

It turns words into messages, and decides nothing.
"""

from collections.abc import Callable

from proto import control_pb2
from worker.engine.sequence import Sequence


class Outbox:
    """Events since the router was told last, in order. Each `tell_*` adds one."""

    def __init__(self) -> None:
        self._events: list[control_pb2.Event] = []
        self._drawn_for: list[int] = []
        self._drawn: list[int] = []

    def take(self, load: Callable[[], control_pb2.Load]) -> list[control_pb2.Event]:
        """All of it: tokens first, then what they led to, and where there is anything the replica's load."""
        events, self._events = self._events, []
        if self._drawn:
            tokens = control_pb2.Tokens(request_ids=self._drawn_for, token_ids=self._drawn)
            events.insert(0, control_pb2.Event(tokens=tokens))
            self._drawn_for, self._drawn = [], []
        if events:
            events.append(control_pb2.Event(load=load()))
        return events

    def tell_token(self, request_id: int, token_id: int) -> None:
        """One more token was drawn."""
        self._drawn_for.append(request_id)
        self._drawn.append(token_id)

    def tell_logits(self, sequence: Sequence, values: bytes) -> None:
        """The logits, float32, from which its next token is drawn; to be told before that token is taken."""
        logits = control_pb2.Logits(request_id=sequence.request_id, output_index=sequence.num_drawn, float32=values)
        self._events.append(control_pb2.Event(logits=logits))

    def tell_reserved(self, reserved: control_pb2.Reserved) -> None:
        """Pages are set aside for a sequence whose KV may come now."""
        self._events.append(control_pb2.Event(reserved=reserved))

    def tell_want_target(self, request_id: int) -> None:
        """It has all its pages here and asks where its KV is to go."""
        self._events.append(control_pb2.Event(want_target=control_pb2.WantTarget(request_id=request_id)))

    def tell_admitted(self, sequence: Sequence) -> None:
        """Its chunks may be planned from now on."""
        admitted = control_pb2.Admitted(request_id=sequence.request_id, cached_tokens=sequence.cached_tokens)
        self._events.append(control_pb2.Event(admitted=admitted))

    def tell_refused(self, request_id: int, message: str) -> None:
        """It can never run here."""
        self._events.append(control_pb2.Event(refused=control_pb2.Refused(request_id=request_id, message=message)))

    def tell_failed(self, request_id: int, message: str, *, kind: control_pb2.FailureKind) -> None:
        """Something broke it; its end follows when nothing of it is under way."""
        failed = control_pb2.Failed(request_id=request_id, kind=kind, message=message)
        self._events.append(control_pb2.Event(failed=failed))

    def tell_handoff_done(self, sequence: Sequence) -> None:
        """All of its KV has been written."""
        done = control_pb2.HandoffDone(
            request_id=sequence.request_id, bytes=sequence.writes.num_bytes, seconds=sequence.writes.seconds
        )
        self._events.append(control_pb2.Event(handoff_done=done))

    def tell_ended(self, request_id: int, reason: str, *, writes_may_land: bool = False) -> None:
        """The last word about it: nothing of it is here any more."""
        ended = control_pb2.Ended(request_id=request_id, reason=reason, writes_may_land=writes_may_land)
        self._events.append(control_pb2.Event(ended=ended))

    def tell_peer_answered(self, answered: control_pb2.PeerAnswered) -> None:
        """Every rank has carried out an order about a replica of the other pool."""
        self._events.append(control_pb2.Event(peer_answered=answered))
