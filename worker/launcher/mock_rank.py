"""A rank without torch: it checks its assignment as a real one does and answers with tokens that are easy to foretell.

The leader is the real one, so pages, admission, hand-off and events are as in production; only the model is a formula.
Mocked ranks of a launcher share its process, and a mocked leader answers for all ranks of its replica.
"""

import asyncio
from collections.abc import Callable

from parallel.checkpoint.location import resolve_model
from parallel.models.registry import describe_checkpoint
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
                shape=shape, settings=settings_from_wire(assignment.engine), vocab_size=description.vocab_size
            )
            self._replica = MockReplica(
                leader,
                vocab_size=description.vocab_size,
                world_size=shape.world_size,
                writers=shape.ranks_per_sequence,
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
        vocab_size: int,
        world_size: int,
        writers: int,
        step_s: float,
        tell: Callable[[control_pb2.FromReplica], None],
    ) -> None:
        self._leader = leader
        self._vocab_size = vocab_size
        self._world_size = world_size
        self._writers = writers
        self._step_s = step_s
        self._tell = tell
        self._last_token: dict[int, int] = {}
        self._targets: dict[int, int] = {}

    def handle(self, message: control_pb2.ToReplica) -> None:
        """Takes a message of the router."""
        if message.WhichOneof("message") == "peer_order":
            self._obey(message.peer_order)
        else:
            self._leader.handle(message)
        self._go_on()

    def _obey(self, order: control_pb2.PeerOrder) -> None:
        """Every rank answers at once: nothing is ever written."""
        for rank in range(self._world_size):
            self._leader.handle_peer_answer(step_pb2.PeerAnswer(global_rank=rank, order_id=order.order_id))

    def _go_on(self) -> None:
        while self._leader.can_plan and (plan := self._leader.next_plan()) is not None:
            asyncio.get_running_loop().call_later(self._step_s, self._answer, plan)
        events = self._leader.take_events()
        if events:
            self._tell(control_pb2.FromReplica(events=events))
        if self._leader.is_idle:
            self._leader.check_integrity()

    def _answer(self, plan: step_pb2.StepPlan) -> None:
        for join in plan.joins:
            self._last_token[join.slot] = join.first_token
            self._targets.pop(join.slot, None)
            if join.HasField("target"):
                self._targets[join.slot] = join.request_id
        drawn = [(chunk.slot, self._draw(chunk)) for chunk in plan.chunks if chunk.sample]
        for rank in range(self._world_size):
            result = step_pb2.StepResult(step_id=plan.step_id, global_rank=rank)
            if rank == 0:
                result.slots.extend(slot for slot, _ in drawn)
                result.token_ids.extend(token for _, token in drawn)
            self._leader.handle_result(result)
        for chunk in plan.chunks:
            if chunk.slot in self._targets:
                done = step_pb2.WritesDone(request_id=self._targets[chunk.slot], end_position=chunk.cached_tokens)
                for _ in range(self._writers):
                    self._leader.handle_writes(done)
        self._go_on()

    def _draw(self, chunk: step_pb2.Chunk) -> int:
        previous = chunk.token_ids[-1] if chunk.token_ids else self._last_token[chunk.slot]
        position = chunk.cached_tokens + chunk.new_tokens
        token = mock_token(previous, position=position, vocab_size=self._vocab_size)
        token = chunk.forced_id if chunk.HasField("forced_id") else token
        self._last_token[chunk.slot] = token
        return token
