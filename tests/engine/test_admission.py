"""Admission alone: who waits, where who comes in goes, and when the queue is worth a look."""

from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ReplicaShape
from proto import control_pb2
from tests.harness.cache_groups import FULL
from worker.engine.admission import Admission
from worker.engine.dp_state import DpState
from worker.engine.outbox import Outbox
from worker.engine.request_bounds import RequestBounds

SETTINGS = EngineSettings(page_size=4, kv_tokens=40, max_sequences=2)


class Room:
    """An admission over `dp` coordinates, and what it says."""

    def __init__(self, *, dp: int = 1) -> None:
        shape = ReplicaShape(attention=AttentionSizes(dp=dp), experts=None)
        self.states = [DpState(dp=index, shape=shape, settings=SETTINGS, groups=FULL) for index in range(dp)]
        self._outbox = Outbox()
        bounds = RequestBounds(settings=SETTINGS, cp=1)
        self.admission = Admission(self.states, bounds=bounds, revision=b"", outbox=self._outbox)

    def submit(self, request_id: int, *, tokens: int, handoff: bool = False) -> None:
        self.admission.submit(
            control_pb2.Submit(request_id=request_id, prompt_ids=range(tokens), max_new_tokens=4, handoff=handoff)
        )

    def told(self) -> list[str]:
        kinds = [event.WhichOneof("event") for event in self._outbox.take(control_pb2.Load)]
        return [kind for kind in kinds if kind not in (None, "load")]


def test_a_prompt_waits_for_pages_and_the_queue_is_looked_at_when_some_return() -> None:
    room = Room()
    room.submit(1, tokens=30)
    room.submit(2, tokens=20)
    (first,) = room.admission.admit()
    assert room.admission.num_waiting == 1 and room.told() == ["admitted"]
    assert room.admission.admit_if_freed() == []
    room.states[0].stop(first)
    room.states[0].release(first)
    (second,) = room.admission.admit_if_freed()
    assert second.request_id == 2 and room.admission.num_waiting == 0


def test_prompts_go_where_the_least_work_is_and_ask_for_a_target_where_they_are_handed_off() -> None:
    room = Room(dp=2)
    for request_id, tokens in ((1, 20), (2, 8), (3, 8)):
        room.submit(request_id, tokens=tokens, handoff=request_id == 3)
    assert [sequence.dp for sequence in room.admission.admit()] == [0, 1, 1]
    assert room.told() == ["admitted", "admitted", "want_target"]


def test_a_reservation_counts_as_waiting_until_it_has_pages_and_is_gone_when_its_sequence_starts() -> None:
    room = Room()
    for request_id in (1, 2):
        room.admission.reserve(control_pb2.Reserve(request_id=request_id, prompt_tokens=20, max_new_tokens=4))
    room.admission.admit()
    assert (room.admission.num_reserved, room.admission.num_waiting) == (1, 1)
    start = control_pb2.Start(request_id=1, prompt_ids=range(20), output_ids=[5], max_new_tokens=3)
    (sequence,) = room.admission.start(start)
    assert sequence.dp == 0 and room.states[0].sequence(sequence.slot) is sequence
    assert len(room.states[0].pages.holdings(1)[0].pages) == 6
    assert (room.admission.num_reserved, room.admission.num_waiting) == (0, 1)


def test_what_waits_is_ended_by_an_abort_and_what_does_not_is_left_to_others() -> None:
    room = Room()
    room.submit(1, tokens=30)
    room.submit(2, tokens=30)
    room.admission.admit()
    assert not room.admission.abort(1) and room.admission.abort(2)
    assert room.admission.num_waiting == 0 and room.told() == ["admitted", "ended"]
