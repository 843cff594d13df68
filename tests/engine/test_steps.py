"""Steps in flight alone: which ranks are silent, and answers in the order of steps."""

import pytest

from proto import control_pb2, step_pb2
from worker.engine.sequence import Sequence, from_submit
from worker.engine.steps import StepsInFlight


def sequence(request_id: int) -> Sequence:
    return from_submit(control_pb2.Submit(request_id=request_id, prompt_ids=[1], max_new_tokens=9))


def send(steps: StepsInFlight, slots: dict[int, Sequence]) -> int:
    chunks = [(item, step_pb2.Chunk(slot=slot)) for slot, item in slots.items()]
    return steps.send(chunks, joins=[], leaves=[]).step_id


def test_the_oldest_step_names_the_ranks_that_have_not_answered_and_goes_with_the_last() -> None:
    steps = StepsInFlight(world_size=2, most=2)
    first, second = send(steps, {0: sequence(1)}), send(steps, {0: sequence(1)})
    assert not steps.has_room
    steps.take(step_pb2.StepResult(step_id=first, global_rank=1))
    assert steps.oldest == (first, frozenset({0}))
    steps.take(step_pb2.StepResult(step_id=first, global_rank=0, step_s=2.0))
    assert steps.oldest == (second, frozenset({0, 1})) and steps.has_room
    assert (steps.totals.num_steps, steps.totals.step_s) == (1, 2.0)


def test_an_early_answer_waits_and_comes_after_the_end_of_the_step_before_it() -> None:
    steps = StepsInFlight(world_size=2, most=2)
    one, other = sequence(1), sequence(2)
    first, second = send(steps, {0: one, 5: other}), send(steps, {0: one})
    assert steps.take(step_pb2.StepResult(step_id=second, global_rank=1, slots=[0], token_ids=[8])) == []
    (answer,) = steps.take(
        step_pb2.StepResult(step_id=first, global_rank=1, slots=[5], token_ids=[6], not_finite=[5], logits=[b"l"])
    )
    assert answer.draws == ((other, 6, False, b"l"),) and answer.finished == ()
    last, early = steps.take(step_pb2.StepResult(step_id=first, global_rank=0, slots=[0], token_ids=[7]))
    assert last.draws == ((one, 7, True, None),) and last.finished == (one, other)
    assert early.draws == ((one, 8, True, None),) and early.finished == ()


def test_a_rank_that_answers_a_step_twice_is_not_taken_for_another() -> None:
    steps = StepsInFlight(world_size=2, most=1)
    result = step_pb2.StepResult(step_id=send(steps, {0: sequence(1)}), global_rank=1)
    steps.take(result)
    with pytest.raises(KeyError):
        steps.take(result)
