"""The leader of a replica: takes messages of the router and of the ranks, and gives step plans and events.

It does no input or output, so the same leader runs over real ranks and over mocked ones. It decides nothing itself:
`admission.py` says who comes in, `chunk_planner.py` what is computed next, `steps.py` whose turn an answer is,
`running.py` what becomes of a sequence, `outbox.py` keeps what the router is to be told.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Items

from parallel.settings import EngineSettings
from parallel.shape import ReplicaShape
from parallel.storage import CacheGroup
from proto import control_pb2, step_pb2
from worker.engine.admission import Admission
from worker.engine.chunk_planner import ChunkPlanner
from worker.engine.dp_state import DpState
from worker.engine.holding import Holding
from worker.engine.outbox import Outbox
from worker.engine.page_allocator import PageAllocator
from worker.engine.peer_orders import PeerOrders
from worker.engine.pipeline_choice import FixedParts, PipelineChoice
from worker.engine.request_bounds import RequestBounds
from worker.engine.running import RunningSequences
from worker.engine.sequence import Sequence
from worker.engine.steps import StepsInFlight


class Leader:
    """Scheduling state of one replica. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        *,
        shape: ReplicaShape,
        settings: EngineSettings,
        groups: Items[CacheGroup],
        vocab_size: int | None = None,
        revision: bytes = b"",
        pipeline: PipelineChoice | None = None,
    ) -> None:
        """`groups` are the model's cache groups. `vocab_size` bounds what ranks can embed, None where any id will do.
        `revision` is the model's, for the keys of the prefix cache. `pipeline` says in how many parts decode goes, None
        in one for each stage.
        """
        self._tp, self._pp = shape.attention.tp, shape.pp
        self._pipeline = pipeline or FixedParts(parts=shape.pp)
        self._outbox = Outbox()
        self._dp_states = [
            DpState(dp=dp, shape=shape, settings=settings, groups=groups) for dp in range(shape.attention.dp)
        ]
        self._planners = [ChunkPlanner(state, shape=shape, settings=settings) for state in self._dp_states]
        bounds = RequestBounds(settings=settings, cp=shape.attention.cp, groups=groups, vocab_size=vocab_size)
        self._admission = Admission(self._dp_states, bounds=bounds, revision=revision, outbox=self._outbox)
        self._running = RunningSequences(self._dp_states, dp_ranks=shape.dp_ranks, outbox=self._outbox)
        self._steps = StepsInFlight(world_size=shape.world_size)
        self._peer_orders = PeerOrders(world_size=shape.world_size)

    # ---- what comes in ----

    def handle(self, message: control_pb2.ToReplica) -> None:
        """Takes one message of the router. Messages about requests that have ended are late and change nothing."""
        kind = message.WhichOneof("message")
        if kind == "submit":
            self._admission.submit(message.submit)
        elif kind == "target":
            self._running.take_target(message.target)
        elif kind == "reserve":
            self._admission.reserve(message.reserve)
        elif kind == "start":
            self._running.add(self._admission.start(message.start))
        elif kind == "abort":
            if not self._admission.abort(message.abort.request_id):
                self._running.abort(message.abort.request_id)
        elif kind == "release":
            self._admission.release(message.release.request_id)
        else:
            raise ValueError(f"a leader does not take a message of kind {kind}")
        self._running.add(self._admission.admit())

    def handle_result(self, result: step_pb2.StepResult) -> None:
        """Takes what one rank answers to a step."""
        for answer in self._steps.take(result):
            self._running.take_answer(answer)
        self._running.add(self._admission.admit_if_freed())

    def handle_writes(self, done: step_pb2.WritesDone) -> None:
        """Takes one rank's word that of its writes of one chunk none is under way any more."""
        self._running.take_writes(done)
        self._running.add(self._admission.admit_if_freed())

    def handle_writes_failed(self, failed: step_pb2.WritesFailed) -> None:
        """Takes one rank's word that a hand-off cannot be."""
        self._running.take_failed_writes(failed)

    def handle_peer_answer(self, answer: step_pb2.PeerAnswer) -> None:
        """Takes one rank's word that it has carried out an order about a replica of the other pool."""
        answered = self._peer_orders.take(answer)
        if answered is not None:
            self._outbox.tell_peer_answered(answered)

    # ---- what goes out ----

    @property
    def can_plan(self) -> bool:
        """Whether one more step may be in flight: one runs for each part of the batch, and one is planned ahead. With
        more than that, a batch that was in parts would never come together.
        """
        return len(self._steps) < self._num_parts() + 1

    @property
    def is_idle(self) -> bool:
        """Whether the replica holds nothing of any request."""
        return not (self._running or self._admission.num_waiting or self._admission.num_reserved or self._steps)

    @property
    def oldest_step(self) -> tuple[int, frozenset[int]] | None:
        """The id of the oldest step in flight and the ranks that have not answered it."""
        return self._steps.oldest

    def next_plan(self) -> list[step_pb2.StepPlan] | None:
        """Plans the next step: what each dp coordinate is told of it; None where no sequence has anything to do."""
        parts = self._num_parts()
        steps = [planner.plan_step(parts=parts) for planner in self._planners]
        if not any(step.sequences for step in steps):
            return None
        step_id = self._steps.send(steps)
        padded_rows = -(-max(max(step.rows) for step in steps) // self._tp)
        # Which of a tp group's ranks draws is known to them alone: at worst one draws for all.
        padded_draws = min(max(max(step.draws) for step in steps), padded_rows)
        return [
            planner.complete(step, step_id=step_id, padded_rows=padded_rows, padded_draws=padded_draws)
            for planner, step in zip(self._planners, steps, strict=True)
        ]

    def take_events(self) -> list[control_pb2.Event]:
        """What the router has to know since the last call: tokens first, then what they led to."""
        return self._outbox.take(self._load)

    def check_integrity(self) -> None:
        """AssertionError unless every page is free or owned once and, when idle, all are free."""
        for state in self._dp_states:
            state.pages.check_integrity(is_idle=self.is_idle)
            assert not self.is_idle or not (state.tokens_ahead or any(state.homes.counts)), "an idle replica has work"

    def allocators(self) -> Iterator[PageAllocator]:
        """The page allocators of all dp coordinates, groups and cp ranks, for tests and reports."""
        for state in self._dp_states:
            yield from state.pages.allocators

    def sequences(self) -> Iterator[Sequence]:
        """The admitted sequences, for tests and reports."""
        yield from self._running

    def pages_of(self, sequence: Sequence) -> list[Holding]:
        """What an admitted sequence holds in each cache group, for tests and reports."""
        return self._dp_states[sequence.dp].pages.holdings(sequence.request_id)

    def _num_parts(self) -> int:
        """As many as stages where there is one only, where nothing decodes, and while prompts are left to plan: their
        chunks have rows enough for all stages.
        """
        if self._pp == 1 or any(state.prompts for state in self._dp_states):
            return self._pp
        turns = [state.turns for state in self._dp_states]
        num_sequences = sum(turn.num_sequences for turn in turns)
        if not num_sequences:
            return self._pp
        context = sum(turn.num_tokens for turn in turns) / num_sequences
        return self._pipeline.num_parts(rows=max(turn.num_rows for turn in turns), context=context)

    def _load(self) -> control_pb2.Load:
        load = control_pb2.Load(
            free_pages=sum(state.pages.num_free for state in self._dp_states),
            running=len(self._running) + self._admission.num_reserved,
            waiting=self._admission.num_waiting,
        )
        load.MergeFrom(self._steps.totals)
        return load
