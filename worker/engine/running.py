"""The admitted sequences of a replica, from admission to end: what becomes of one when something happens to it.

Where they run and what they hold is `dp_state.py`'s.
"""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items

from proto import control_pb2, step_pb2
from worker.engine.chunk_planner import DpStep
from worker.engine.dp_state import DpState
from worker.engine.outbox import Outbox
from worker.engine.sequence import Sequence
from worker.engine.steps import Answer


class RunningSequences:
    """By request. Whatever ends one, it goes when it is quiet: its pages and slot return, and the router is told."""

    def __init__(self, dp_states: Items[DpState], *, dp_ranks: Items[int], outbox: Outbox) -> None:
        """`dp_ranks`: the dp coordinate of each rank of the replica."""
        self._dp_states = dp_states
        self._dp_ranks = dp_ranks
        self._outbox = outbox
        self._sequences: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences.values())

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Takes those that were admitted or started."""
        for sequence in sequences:
            self._sequences[sequence.request_id] = sequence

    def take_target(self, target: control_pb2.Target) -> None:
        """Where a sequence's KV is to go; nothing where the sequence has ended."""
        sequence = self._sequences.get(target.request_id)
        if sequence is not None and not sequence.finish_reason:
            sequence.target = target
            self._outbox.tell_admitted(sequence)

    def take_answer(self, answer: Answer) -> None:
        """What a rank drew; then those whose step is over may be quiet."""
        self._take_draws(answer.result)
        for state, step in zip(self._dp_states, answer.finished, strict=False):
            self._finish(state, step)

    def take_writes(self, done: step_pb2.WritesDone) -> None:
        """One rank's word that of its writes of one chunk none is under way any more."""
        sequence = self._sequences[done.request_id]
        sequence.writes.take(done)
        self._end_if_quiet(sequence)

    def take_failed_writes(self, failed: step_pb2.WritesFailed) -> None:
        """One rank's word that a hand-off cannot be: it ends; its pages stay while a write is under way."""
        sequence = self._sequences[failed.request_id]
        if sequence.finish_reason in ("", "handoff"):
            self._fail(sequence, f"rank {failed.global_rank}: {failed.reason}", kind=control_pb2.FAILURE_KIND_HANDOFF)

    def abort(self, request_id: int) -> None:
        """Nobody wants it any more; nothing where it has ended."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            if not sequence.finish_reason:
                self._finish_for(sequence, "abort")
            self._end_if_quiet(sequence)

    def _take_draws(self, result: step_pb2.StepResult) -> None:
        state = self._dp_states[self._dp_ranks[result.global_rank]]
        if result.logits or result.not_finite:
            self._take_odd_draws(state, result)
            return
        told = self._outbox.tell_token
        for slot, token_id in zip(result.slots, result.token_ids, strict=True):
            sequence = state.sequence(slot)
            if not sequence.finish_reason:
                sequence.draw(token_id)
                told(sequence.request_id, token_id)
                if sequence.finish_reason:
                    state.stop(sequence)

    def _take_odd_draws(self, state: DpState, result: step_pb2.StepResult) -> None:
        """Those of a rank that was asked for logits, or found some that are no numbers."""
        not_finite = set(result.not_finite)
        for index, (slot, token_id) in enumerate(zip(result.slots, result.token_ids, strict=True)):
            sequence = state.sequence(slot)
            if slot in not_finite:
                state.withdraw(sequence)
            if sequence.finish_reason:
                continue
            if sequence.wants_logits:
                self._outbox.tell_logits(sequence, result.logits[index])
            if slot in not_finite:
                message = f"the model's logits for output token {sequence.num_outputs} hold NaN or infinity"
                self._fail(sequence, message, kind=control_pb2.FAILURE_KIND_NOT_FINITE)
                continue
            sequence.draw(token_id)
            self._outbox.tell_token(sequence.request_id, token_id)
            if sequence.finish_reason:
                state.stop(sequence)

    def _finish(self, state: DpState, step: DpStep) -> None:
        """A step is over: what its sequences no longer see returns."""
        for sequence, end in step.reached:
            if state.pages.release_unseen(sequence.request_id, end=end):
                state.has_freed = True
        for sequence in step.sequences:
            sequence.in_flight -= 1
            if sequence.finish_reason:
                self._end_if_quiet(sequence)

    def _fail(self, sequence: Sequence, message: str, *, kind: control_pb2.FailureKind) -> None:
        self._finish_for(sequence, "failed")
        self._outbox.tell_failed(sequence.request_id, message, kind=kind)

    def _finish_for(self, sequence: Sequence, reason: str) -> None:
        sequence.finish_reason = reason
        self._dp_states[sequence.dp].stop(sequence)

    def _end_if_quiet(self, sequence: Sequence) -> None:
        if not sequence.finish_reason or not sequence.is_quiet:
            return
        self._dp_states[sequence.dp].release(sequence)
        del self._sequences[sequence.request_id]
        if sequence.finish_reason == "handoff":
            self._outbox.tell_handoff_done(sequence)
        self._outbox.tell_ended(sequence.request_id, sequence.finish_reason, writes_may_land=sequence.writes.may_land)
