"""A rank without torch: it checks its assignment as a real one does and answers with tokens that are easy to foretell.

The leader is the real one, so pages, admission, hand-off and events are as in production; only the model is a formula.
Mocked ranks of a launcher share its process, and a mocked leader answers for all ranks of its replica.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence

from parallel.checkpoint.location import resolve_model
from parallel.models.registry import describe_checkpoint
from parallel.page_columns import column
from parallel.shape import ReplicaShape
from parallel.wire import check_assignment, settings_from_wire, shape_from_wire
from proto import control_pb2, step_pb2
from worker.engine.leader import Leader
from worker.launcher.rank_handle import RankCallbacks


def mock_token(previous: int, *, position: int, vocab_size: int) -> int:
    """The token that a mocked model draws at `position` after the token `previous`."""
    return (previous * 31 + position * 17 + 7) % vocab_size


class MockRank:
    """Answers as a rank process would. All its methods belong to the launcher's event loop."""

    def __init__(self, callbacks: RankCallbacks, *, step_s: float = 0.0) -> None:
        self._callbacks = callbacks
        self._step_s = step_s
        self._replica: MockReplica | None = None
        self._stopped = False

    def send(self, message: control_pb2.ToRank) -> None:
        """See RankHandle."""
        kind = message.WhichOneof("message")
        if kind == "ping":
            self._tell(control_pb2.FromRank(pong=control_pb2.Pong()))
        elif kind == "assign":
            self._assign(message.assign)
        elif kind == "unassign":
            self._replica = None
        elif self._replica is not None:
            self._replica.handle(message.replica)

    async def stop(self) -> None:
        """See RankHandle."""
        self._end("the mock was stopped")

    def _assign(self, message: control_pb2.AssignRank) -> None:
        assignment, rank = message.assignment, message.global_rank
        try:
            shape = shape_from_wire(assignment.sizes)
            given = next(item for item in assignment.ranks if item.global_rank == rank)
            check_assignment(shape, given)
            description = describe_checkpoint(resolve_model(assignment.model))
        except ValueError as error:
            failure = control_pb2.RankFailure(reason=f"ValueError: {error}", cause=True, status="FAILED_PRECONDITION")
            self._tell(control_pb2.FromRank(failure=failure))
            self._end("the mock gave up")
            return
        self._replica = None
        if rank == 0:
            leader = Leader(
                shape=shape,
                settings=settings_from_wire(assignment.engine),
                groups=description.cache_groups,
                vocab_size=description.vocab_size,
            )
            self._replica = MockReplica(
                leader,
                shape=shape,
                vocab_size=description.vocab_size,
                step_s=self._step_s,
                tell=lambda events: self._tell_of(assignment, control_pb2.FromRank(replica=events)),
            )
        self._tell_of(assignment, control_pb2.FromRank(ready=control_pb2.RankReady(global_rank=rank)))

    def _tell_of(self, assignment: control_pb2.AssignRequest, message: control_pb2.FromRank) -> None:
        """Says something of one assignment, whatever has been assigned since."""
        message.of_replica, message.of_epoch = assignment.replica, assignment.epoch
        self._tell(message)

    def _tell(self, message: control_pb2.FromRank) -> None:
        if not self._stopped:
            self._callbacks.message(message)

    def _end(self, reason: str) -> None:
        if not self._stopped:
            self._stopped = True
            self._callbacks.ended(reason)


class MockReplica:
    """A real leader over ranks that answer each step `step_s` after they got it."""

    def __init__(
        self,
        leader: Leader,
        *,
        shape: ReplicaShape,
        vocab_size: int,
        step_s: float,
        tell: Callable[[control_pb2.FromReplica], None],
    ) -> None:
        self._leader = leader
        self._dp_ranks = shape.dp_ranks
        self._writers = shape.ranks_per_sequence
        self._step_s = step_s
        self._tell = tell
        self._coordinates = [_MockCoordinate(vocab_size) for _ in range(shape.attention.dp)]

    def handle(self, message: control_pb2.ToReplica) -> None:
        """Takes a message of the router."""
        if message.WhichOneof("message") == "peer_order":
            self._obey(message.peer_order)
        else:
            self._leader.handle(message)
        self._go_on()

    def _obey(self, order: control_pb2.PeerOrder) -> None:
        """Every rank answers at once: nothing is ever written."""
        for rank in range(len(self._dp_ranks)):
            self._leader.handle_peer_answer(step_pb2.PeerAnswer(global_rank=rank, order_id=order.order_id))

    def _go_on(self) -> None:
        while self._leader.can_plan and (plans := self._leader.next_plan()) is not None:
            asyncio.get_running_loop().call_later(self._step_s, self._answer, plans)
        events = self._leader.take_events()
        if events:
            self._tell(control_pb2.FromReplica(events=events))
        if self._leader.is_idle:
            self._leader.check_integrity()

    def _answer(self, plans: Sequence[step_pb2.StepPlan]) -> None:
        results = [part.run(plan) for part, plan in zip(self._coordinates, plans, strict=True)]
        for rank, dp in enumerate(self._dp_ranks):
            is_first = self._dp_ranks.index(dp) == rank
            result = results[dp] if is_first else step_pb2.StepResult(step_id=plans[dp].step_id)
            result.global_rank = rank
            self._leader.handle_result(result)
        for request_id in (request_id for part in self._coordinates for request_id in part.take_written()):
            for _ in range(self._writers):
                self._leader.handle_writes(step_pb2.WritesDone(request_id=request_id))
        self._go_on()


class _MockCoordinate:
    """The sequences of one dp coordinate: by slot the token drawn last, how many positions are known, and who is handed
    off.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._last_token: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._targets: dict[int, int] = {}
        self._written: list[int] = []

    def run(self, plan: step_pb2.StepPlan) -> step_pb2.StepResult:
        """What a rank that draws all tokens of the coordinate answers."""
        for join in plan.joins:
            self._last_token[join.slot], self._ends[join.slot] = join.first_token, join.cached_tokens
            self._targets.pop(join.slot, None)
            if join.HasField("target"):
                self._targets[join.slot] = join.request_id
        forced = {probe.slot: probe.forced_id for probe in plan.probes if probe.HasField("forced_id")}
        result = step_pb2.StepResult(step_id=plan.step_id)
        for slot in column(plan.decode_slots).tolist():
            self._draw(result, slot, num_tokens=1, forced=forced)
        for prompt in plan.prompts:
            token_ids = column(prompt.token_ids)
            self._last_token[prompt.slot] = int(token_ids[-1])
            if prompt.slot in self._targets:
                self._written.append(self._targets[prompt.slot])
            if prompt.sample:
                self._draw(result, prompt.slot, num_tokens=len(token_ids), forced=forced)
            else:
                self._ends[prompt.slot] += len(token_ids)
        return result

    def take_written(self) -> list[int]:
        """The requests of which chunks have been handed off since the last call."""
        written, self._written = self._written, []
        return written

    def _draw(self, result: step_pb2.StepResult, slot: int, *, num_tokens: int, forced: Mapping[int, int]) -> None:
        self._ends[slot] += num_tokens
        token = mock_token(self._last_token[slot], position=self._ends[slot], vocab_size=self._vocab_size)
        self._last_token[slot] = forced.get(slot, token)
        result.slots.append(slot)
        result.token_ids.append(self._last_token[slot])
