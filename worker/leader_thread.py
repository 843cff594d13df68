"""The thread in which a replica's leader schedules: messages in, step plans and events out."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from parallel.settings import EngineSettings
from parallel.shape import ReplicaShape
from parallel.storage import CacheGroup
from proto import control_pb2, step_pb2
from worker.engine.leader import Leader
from worker.engine.pipeline_choice import PipelineChoice
from worker.thread_end import end_thread

#: A replica to which nothing has come for so long is in no hurry.
_QUIET_S = 1.0
#: How long ranks have to say where they are.
_ANSWER_S = 1.0


class StepTimeoutError(RuntimeError):
    """Ranks did not answer a step in time."""


class LeaderThread:
    """Drains everything that has arrived, plans while it may, then tells the router: one message for all of it."""

    def __init__(
        self,
        *,
        shape: ReplicaShape,
        settings: EngineSettings,
        groups: Sequence[CacheGroup],
        vocab_size: int,
        revision: bytes,
        pipeline: PipelineChoice,
        broadcast: Callable[[step_pb2.ToMember], None],
        send_plans: Callable[[Sequence[step_pb2.StepPlan]], None],
        tell_router: Callable[[control_pb2.FromReplica], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        self._leader = Leader(
            shape=shape,
            settings=settings,
            groups=groups,
            vocab_size=vocab_size,
            revision=revision,
            pipeline=pipeline,
        )
        self._step_timeout_s = settings.step_timeout_s
        self._broadcast = broadcast
        self._send_plans = send_plans
        self._tell_router = tell_router
        self._fail = fail
        self._inbox: queue.SimpleQueue[control_pb2.ToReplica | step_pb2.FromMember | None] = queue.SimpleQueue()
        self._asked_at: float | None = None
        self._waiting_ranks: set[int] = set()
        self._is_quiet = False
        self._is_proven = True
        self._oldest: tuple[int, float] | None = None
        self._thread = threading.Thread(target=self._run, name="leader", daemon=True)
        self._thread.start()

    def put(self, message: control_pb2.ToReplica | step_pb2.FromMember) -> None:
        """Hands a message of the router or of a rank to the leader."""
        self._inbox.put(message)

    def close(self) -> None:
        """Ends the thread; idempotent. RuntimeError where it does not end."""
        self._inbox.put(None)
        end_thread(self._thread)

    def _run(self) -> None:
        try:
            while self._take():
                self._plan()
                events = self._leader.take_events()
                if events:
                    self._tell_router(control_pb2.FromReplica(events=events))
                self._prove_when_quiet()
                self._watch_steps()
            self._prove()
        except BaseException as error:  # the thread's edge: the rank must not go on without it
            self._fail(error)

    def _prove_when_quiet(self) -> None:
        """Proves the pages' integrity once after work, when nothing has come for a while: it walks over every page."""
        if not self._leader.is_idle:
            self._is_proven = False
        elif self._is_quiet:
            self._prove()

    def _prove(self) -> None:
        if self._leader.is_idle and not self._is_proven:
            self._leader.check_integrity()
            self._is_proven = True

    def _take(self) -> bool:
        """Waits for a message and takes all that are there; False when closed."""
        try:
            message = self._inbox.get(timeout=_QUIET_S)
        except queue.Empty:
            self._is_quiet = True
            return True
        self._is_quiet = False
        try:
            while message is not None:
                self._handle(message)
                message = self._inbox.get_nowait()
        except queue.Empty:
            return True
        return False

    def _handle(self, message: control_pb2.ToReplica | step_pb2.FromMember) -> None:
        if isinstance(message, step_pb2.FromMember):
            kind = message.WhichOneof("message")
            if kind == "result":
                self._leader.handle_result(message.result)
            elif kind == "whereabouts":
                if message.whereabouts.in_collective:
                    self._waiting_ranks.add(message.whereabouts.global_rank)
            elif kind == "writes_failed":
                self._leader.handle_writes_failed(message.writes_failed)
            elif kind == "peer_answer":
                self._leader.handle_peer_answer(message.peer_answer)
            else:
                self._leader.handle_writes(message.writes)
        elif message.WhichOneof("message") == "peer_order":
            self._broadcast(step_pb2.ToMember(peer_order=message.peer_order))
        else:
            self._leader.handle(message)

    def _plan(self) -> None:
        while self._leader.can_plan:
            plans = self._leader.next_plan()
            if plans is None:
                return
            self._send_plans(plans)

    def _watch_steps(self) -> None:
        """StepTimeoutError naming the ranks at fault where the oldest step has run for longer than a step may.

        One rank that hangs keeps all others waiting in a collective, so they are asked where they are first.
        """
        step, now = self._leader.oldest_step, time.monotonic()
        if step is None:
            self._oldest = None
        elif self._oldest is None or self._oldest[0] != step[0]:
            self._oldest = (step[0], now)
            self._asked_at = None
        elif now - self._oldest[1] > self._step_timeout_s:
            if self._asked_at is None:
                self._asked_at, self._waiting_ranks = now, set()
                self._broadcast(step_pb2.ToMember(where=step_pb2.Where()))
            elif now - self._asked_at > _ANSWER_S:
                raise StepTimeoutError(self._blame(step[0], silent=step[1]))

    def _blame(self, step_id: int, *, silent: frozenset[int]) -> str:
        hung = silent - self._waiting_ranks or silent
        sentence = f"ranks {_listed(hung)} did not answer step {step_id} within {self._step_timeout_s:g} s"
        waiting = silent - hung
        return f"{sentence}; ranks {_listed(waiting)} wait for them in a collective" if waiting else sentence


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))
