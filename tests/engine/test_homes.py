"""Decoding sequences are at home where fewest are, so rows are even over cp; each step has a part of every home."""

import pytest

from parallel.page_columns import column
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ReplicaShape
from proto import control_pb2
from tests.engine.simulated_ranks import SimulatedRanks
from worker.engine.decode_turns import DecodeTurns
from worker.engine.sequence import Sequence, from_submit


def decoding(*, cp: int, pp: int, num_sequences: int) -> SimulatedRanks:
    """Ranks whose prompts are all computed."""
    shape = ReplicaShape(pp=pp, attention=AttentionSizes(cp=cp), experts=None)
    settings = EngineSettings(page_size=4, max_batch_tokens=128, max_sequences=24, kv_tokens=4000)
    ranks = SimulatedRanks(shape=shape, settings=settings)
    for request_id in range(num_sequences):
        ranks.submit(control_pb2.Submit(request_id=request_id, prompt_ids=[request_id, 1, 2], max_new_tokens=40))
    assert ranks.plan()
    ranks.answer_all()
    return ranks


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("num_sequences", [1, 7, 24])
def test_rows_of_decode_are_even_over_cp_in_every_step(cp: int, pp: int, num_sequences: int) -> None:
    ranks = decoding(cp=cp, pp=pp, num_sequences=num_sequences)
    turns: list[list[int]] = []
    while len(turns) < 12:
        while plans := ranks.plan():
            turns.append(column(plans[0].decode_slots).tolist())
            rows = ranks.tables[0].decode_rows
            assert max(rows) - min(rows) <= 1
        ranks.answer_all()
    # Each has its turn at least every pp-th time.
    assert all(sum(slot in turn for turn in turns) >= len(turns) // pp for slot in range(num_sequences))


def test_a_home_that_was_left_is_the_next_to_be_taken() -> None:
    ranks = decoding(cp=3, pp=1, num_sequences=7)
    homes = {sequence.request_id: sequence.home for sequence in ranks.leader.sequences()}
    assert list(homes.values()) == [0, 1, 2, 0, 1, 2, 0]
    for request_id in (1, 4):
        ranks.leader.handle(control_pb2.ToReplica(abort=control_pb2.Abort(request_id=request_id)))
    for request_id in (7, 8):
        ranks.submit(control_pb2.Submit(request_id=request_id, prompt_ids=[1, 2], max_new_tokens=40))
    homes = {sequence.request_id: sequence.home for sequence in ranks.leader.sequences()}
    assert (homes[7], homes[8]) == (1, 1)


def test_a_prompt_that_is_handed_off_is_at_home_nowhere() -> None:
    ranks = decoding(cp=2, pp=1, num_sequences=1)
    for request_id in (5, 6):
        ranks.submit(
            control_pb2.Submit(request_id=request_id, prompt_ids=[1, 2], max_new_tokens=4, handoff=request_id == 5)
        )
    homes = {sequence.request_id: sequence.home for sequence in ranks.leader.sequences()}
    assert (homes[5], homes[6]) == (0, 1)


def test_homes_share_a_budget_that_is_less_than_what_waits_and_none_is_forgotten() -> None:
    turns = DecodeTurns(cp=4)
    members = [member(index, home=index % 4) for index in range(12)]
    for sequence in members:
        turns.add(sequence)
    seen: list[Sequence] = []
    for budget in (6, 6, 3, 3, 3, 3):
        taken = turns.next_turn(parts=1, budget=budget)
        assert sum(map(len, taken)) == budget
        assert max(map(len, taken)) - min(map(len, taken)) <= 1
        seen += [sequence for part in taken for sequence in part]
    assert {id(sequence) for sequence in seen} == {id(sequence) for sequence in members}


def member(request_id: int, *, home: int) -> Sequence:
    """A sequence at home there."""
    sequence = from_submit(control_pb2.Submit(request_id=request_id, prompt_ids=[1], max_new_tokens=9))
    sequence.home = home
    return sequence
