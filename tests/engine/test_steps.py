"""Steps in flight alone: which ranks are silent, and answers in the order of steps."""

import pytest

from proto import step_pb2
from worker.engine.chunk_planner import DpStep
from worker.engine.steps import StepsInFlight


def test_the_oldest_step_names_the_ranks_that_have_not_answered_and_goes_with_the_last() -> None:
    steps = StepsInFlight(world_size=2)
    first, second = steps.send([]), steps.send([])
    assert len(steps) == 2
    steps.take(step_pb2.StepResult(step_id=first, global_rank=1))
    assert steps.oldest == (first, frozenset({0}))
    steps.take(step_pb2.StepResult(step_id=first, global_rank=0, step_s=2.0))
    assert steps.oldest == (second, frozenset({0, 1})) and len(steps) == 1
    assert (steps.totals.num_steps, steps.totals.step_s) == (1, 2.0)


def test_an_early_answer_waits_and_comes_after_the_end_of_the_step_before_it() -> None:
    steps = StepsInFlight(world_size=2)
    parts = [DpStep(rows=[1], draws=[1])]
    first, second = steps.send(parts), steps.send(parts)
    early = step_pb2.StepResult(step_id=second, global_rank=1, slots=[0], token_ids=[8])
    assert steps.take(early) == []
    other = step_pb2.StepResult(step_id=first, global_rank=1, slots=[5], token_ids=[6])
    (answer,) = steps.take(other)
    assert (answer.result, answer.finished) == (other, ())
    last, waited = steps.take(step_pb2.StepResult(step_id=first, global_rank=0))
    assert last.result.global_rank == 0 and last.finished == parts
    assert (waited.result, waited.finished) == (early, ())


def test_a_rank_that_answers_a_step_twice_is_not_taken_for_another() -> None:
    steps = StepsInFlight(world_size=2)
    result = step_pb2.StepResult(step_id=steps.send([]), global_rank=1)
    steps.take(result)
    with pytest.raises(KeyError):
        steps.take(result)
