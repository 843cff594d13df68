"""Steps that were sent out and not answered by every rank: whose answers are missing, and answers in order of steps.

What a draw or an end means to a sequence is decided in `running.py`.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from proto import control_pb2, step_pb2
from worker.engine.chunk_planner import DpStep


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one rank drew in a step and, where it was the last to answer, what all dp coordinates did in that step."""

    result: step_pb2.StepResult
    finished: Items[DpStep] = ()


@dataclass(kw_only=True)
class _StepInFlight:
    """What its dp coordinates do, the ranks that have not answered, and answers that wait for their turn."""

    parts: Items[DpStep]
    silent: set[int]
    early: list[step_pb2.StepResult] = field(default_factory=list)

    def take_early(self) -> list[Answer]:
        results, self.early = self.early, []
        answers = []
        for result in results:
            self.silent.remove(result.global_rank)
            answers.append(Answer(result=result, finished=() if self.silent else self.parts))
        return answers


class StepsInFlight:
    """The steps of one replica, oldest first."""

    def __init__(self, *, world_size: int) -> None:
        self._world_size = world_size
        self._steps: dict[int, _StepInFlight] = {}
        self._next_step_id = 0
        self._totals = control_pb2.Load()

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def oldest(self) -> tuple[int, frozenset[int]] | None:
        """The id of the oldest step in flight and the ranks that have not answered it."""
        for step_id, step in self._steps.items():
            return step_id, frozenset(step.silent)
        return None

    @property
    def totals(self) -> control_pb2.Load:
        """Number and seconds of all steps so far, by rank 0's word; nothing else of a load."""
        return self._totals

    def send(self, parts: Items[DpStep]) -> int:
        """One more step is in flight, of so many dp coordinates; returns its id."""
        step_id = self._next_step_id
        self._next_step_id += 1
        self._steps[step_id] = _StepInFlight(parts=parts, silent=set(range(self._world_size)))
        return step_id

    def take(self, result: step_pb2.StepResult) -> list[Answer]:
        """Takes what one rank answers; returns the answers whose turn has come, in order of steps.

        A sequence's tokens may be drawn on another rank each step, and that one may answer before this one does.
        """
        if result.global_rank == 0:
            self._totals.num_steps += 1
            self._totals.step_s += result.step_s
            self._totals.collective_s += result.collective_s
        self._steps[result.step_id].early.append(result)
        answers: list[Answer] = []
        while self._steps:
            step_id, step = next(iter(self._steps.items()))
            answers.extend(step.take_early())
            if step.silent:
                break
            del self._steps[step_id]
        return answers
