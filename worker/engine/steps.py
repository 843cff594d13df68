"""Steps that were sent out and not answered by every rank: whose answers are missing, and answers in order of steps.

What a draw or an end means to a sequence is decided in `running.py`.
"""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import repeat
from typing import NamedTuple

from proto import control_pb2, step_pb2
from worker.engine.sequence import Sequence


class Draw(NamedTuple):
    """A token drawn for `sequence`, or one that stands for it where its logits hold no numbers. `logits` are float32,
    None where nobody asked. A tuple, for there is one for each decoding sequence and step.
    """

    sequence: Sequence
    token_id: int
    is_finite: bool = True
    logits: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one rank drew in a step and, where it was the last to answer, the sequences of that step."""

    draws: Items[Draw] = ()
    finished: Items[Sequence] = ()


@dataclass(kw_only=True)
class _StepInFlight:
    """Its sequences by slot, the ranks that have not answered, and answers that wait for their turn."""

    by_slot: dict[int, Sequence]
    silent: set[int]
    early: list[step_pb2.StepResult] = field(default_factory=list)

    def take_early(self) -> Iterator[Answer]:
        results, self.early = self.early, []
        for result in results:
            self.silent.remove(result.global_rank)
            finished = () if self.silent else tuple(self.by_slot.values())
            yield Answer(draws=tuple(self._draws(result)), finished=finished)

    def _draws(self, result: step_pb2.StepResult) -> Iterator[Draw]:
        not_finite = set(result.not_finite)
        logits = result.logits or repeat(None, len(result.slots))
        for slot, token_id, values in zip(result.slots, result.token_ids, logits, strict=True):
            yield Draw(self.by_slot[slot], token_id, slot not in not_finite, values)


class StepsInFlight:
    """The steps of one replica, oldest first, at most `most` at once."""

    def __init__(self, *, world_size: int, most: int) -> None:
        self._world_size = world_size
        self._most = most
        self._steps: dict[int, _StepInFlight] = {}
        self._next_step_id = 0
        self._totals = control_pb2.Load()

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def has_room(self) -> bool:
        """Whether one more step may be in flight."""
        return len(self._steps) < self._most

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

    def send(
        self,
        chunks: Items[tuple[Sequence, step_pb2.Chunk]],
        *,
        joins: Iterable[step_pb2.SequenceJoin],
        leaves: Iterable[int],
    ) -> step_pb2.StepPlan:
        """One more step is in flight: the message of it to every rank."""
        plan = step_pb2.StepPlan(step_id=self._next_step_id, leaves=leaves, joins=joins)
        plan.chunks.extend(chunk for _, chunk in chunks)
        self._next_step_id += 1
        by_slot = {chunk.slot: sequence for sequence, chunk in chunks}
        self._steps[plan.step_id] = _StepInFlight(by_slot=by_slot, silent=set(range(self._world_size)))
        return plan

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
