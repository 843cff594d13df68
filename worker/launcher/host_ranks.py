"""The ranks of one host under one lease: started on demand, assigned, watched, ended together."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from proto import control_pb2
from worker.launcher.group_memories import GroupMemories
from worker.launcher.rank_handle import RankCallbacks, RankHandle, StartRank

logger = logging.getLogger(__name__)

_PING_INTERVAL_S = 0.5
_BEATS_PER_TIMEOUT = 4


class AssignmentError(Exception):
    """An assignment that cannot be taken; `status` is the gRPC status code's name."""

    def __init__(self, message: str, *, status: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(kw_only=True)
class _Rank:
    """A live rank, what it is assigned to, and when it was last heard."""

    handle: RankHandle
    device: int
    replica: str = ""
    epoch: int = 0
    global_rank: int = -1
    heard: float | None = None  # None until it has started: imports take seconds and prove no hang
    failure: control_pb2.RankFailure | None = None
    hung: str = ""


@dataclass(kw_only=True)
class _Replica:
    """The part of a replica that this host holds."""

    epoch: int
    memories: GroupMemories
    assign_events: asyncio.Queue[control_pb2.AssignEvent | AssignmentError] = field(default_factory=asyncio.Queue)
    from_leader: asyncio.Queue[control_pb2.FromReplica] = field(default_factory=asyncio.Queue)
    is_attached: bool = False


class HostRanks:
    """All its methods belong to one event loop. `host_events` is what the router's Watch stream carries."""

    def __init__(self, start_rank: StartRank, *, heartbeat_timeout_s: float) -> None:
        self.host_events: asyncio.Queue[control_pb2.HostEvent] = asyncio.Queue()
        self._start_rank = start_rank
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._ping_interval_s = min(_PING_INTERVAL_S, heartbeat_timeout_s / _BEATS_PER_TIMEOUT)
        self._by_device: dict[int, _Rank] = {}
        self._replicas: dict[str, _Replica] = {}
        self._stopping = False
        self._pinger = asyncio.create_task(self._ping())

    async def assign(self, request: control_pb2.AssignRequest) -> AsyncIterator[control_pb2.AssignEvent]:
        """Brings this host's ranks of a replica to `request`; AssignmentError where one of them cannot."""
        known = self._replicas.get(request.replica)
        if known is not None and request.epoch <= known.epoch:
            raise AssignmentError(
                f"epoch {request.epoch} of {request.replica} is stale: this host has epoch {known.epoch}",
                status="FAILED_PRECONDITION",
            )
        try:
            memories = GroupMemories(request)
        except ValueError as error:  # sizes that are no shape
            raise AssignmentError(str(error), status="FAILED_PRECONDITION") from error
        replica = _Replica(epoch=request.epoch, memories=memories)
        self._replicas[request.replica] = replica
        self._unassign_others(request)
        for given in request.ranks:
            self._assign_rank(request, given, shared_groups=replica.memories.of_rank(given.global_rank))
        if known is not None:
            known.memories.close()  # after the ranks were told: one that still looks for it learns why it is gone
        ready = 0
        while ready < len(request.ranks):
            event = await replica.assign_events.get()
            if isinstance(event, AssignmentError):
                raise event
            ready += event.WhichOneof("event") == "ready"
            yield event

    def attach(self, replica: str, *, epoch: int) -> "asyncio.Queue[control_pb2.FromReplica]":
        """What the replica's leader says, for one reader; AssignmentError where it is not here, or taken."""
        known = self._replicas.get(replica)
        if known is None or known.epoch != epoch:
            has = "nothing" if known is None else f"epoch {known.epoch}"
            raise AssignmentError(
                f"epoch {epoch} of {replica} is not assigned here: this host has {has}", status="FAILED_PRECONDITION"
            )
        if self._leader(replica) is None:
            raise AssignmentError(f"the leader of {replica} is not on this host", status="FAILED_PRECONDITION")
        if known.is_attached:
            # Two readers of one queue would each get a part of the tokens.
            raise AssignmentError(f"epoch {epoch} of {replica} is attached already", status="FAILED_PRECONDITION")
        known.is_attached = True
        return known.from_leader

    def detach(self, replica: str, *, epoch: int) -> None:
        """The reader of (replica, epoch) is gone: another may attach."""
        known = self._replicas.get(replica)
        if known is not None and known.epoch == epoch:
            known.is_attached = False

    def to_leader(self, replica: str, message: control_pb2.ToReplica, *, epoch: int) -> None:
        """Hands a message to the leader of (replica, epoch); one for a leader that has ended is dropped."""
        leader = self._leader(replica)
        if leader is not None and leader.epoch == epoch:
            message.replica, message.epoch = replica, epoch
            leader.handle.send(control_pb2.ToRank(replica=message))

    async def stop(self) -> None:
        """Ends every rank and waits until all are gone; idempotent."""
        self._stopping = True
        self._pinger.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._pinger
        await asyncio.gather(*(rank.handle.stop() for rank in list(self._by_device.values())))
        for replica in self._replicas.values():
            replica.memories.close()

    def _assign_rank(
        self,
        request: control_pb2.AssignRequest,
        given: control_pb2.RankAssignment,
        *,
        shared_groups: list[control_pb2.SharedGroup],
    ) -> None:
        rank = self._by_device.get(given.device)
        if rank is None:
            rank = self._by_device[given.device] = self._start(given.device, num_threads=given.cores.num_threads)
        rank.replica, rank.epoch, rank.global_rank = request.replica, request.epoch, given.global_rank
        assign = control_pb2.AssignRank(assignment=request, global_rank=given.global_rank, shared_groups=shared_groups)
        rank.handle.send(control_pb2.ToRank(assign=assign))

    def _unassign_others(self, request: control_pb2.AssignRequest) -> None:
        """Ranks of the replica's last epoch that have no part in the new one give up what they hold."""
        kept = {given.device for given in request.ranks}
        for rank in self._by_device.values():
            if rank.replica == request.replica and rank.device not in kept:
                rank.replica, rank.global_rank = "", -1
                rank.handle.send(control_pb2.ToRank(unassign=control_pb2.Unassign()))

    def _start(self, device: int, *, num_threads: int) -> _Rank:
        callbacks = RankCallbacks(
            message=lambda message: self._on_message(device, message), ended=lambda reason: self._on_end(device, reason)
        )
        return _Rank(handle=self._start_rank(device, callbacks, num_threads=num_threads), device=device)

    def _leader(self, replica: str) -> _Rank | None:
        ranks = (rank for rank in self._by_device.values() if rank.replica == replica and rank.global_rank == 0)
        return next(ranks, None)

    def _on_message(self, device: int, message: control_pb2.FromRank) -> None:
        rank = self._by_device[device]
        rank.heard = time.monotonic()
        kind = message.WhichOneof("message")
        if kind == "failure":
            rank.failure = rank.failure or message.failure
            return
        replica = self._replicas.get(message.of_replica)
        if replica is None or replica.epoch != message.of_epoch:
            return  # of an epoch that this host has left behind
        if kind == "replica":
            replica.from_leader.put_nowait(message.replica)
        elif kind == "progress":
            replica.assign_events.put_nowait(control_pb2.AssignEvent(progress=message.progress))
        elif kind == "ready":
            replica.assign_events.put_nowait(control_pb2.AssignEvent(ready=message.ready))

    def _on_end(self, device: int, reason: str) -> None:
        rank = self._by_device.pop(device)
        if self._stopping:
            return
        failure = rank.failure or control_pb2.RankFailure(reason=rank.hung or reason, cause=True, status="INTERNAL")
        logger.error("rank lost: replica=%s rank=%d reason=%s", rank.replica, rank.global_rank, failure.reason)
        lost = control_pb2.RankLost(
            replica=rank.replica,
            epoch=rank.epoch,
            global_rank=rank.global_rank,
            reason=failure.reason,
            cause=failure.cause,
        )
        self.host_events.put_nowait(control_pb2.HostEvent(rank_lost=lost))
        replica = self._replicas.get(rank.replica)
        if replica is not None:
            error = AssignmentError(f"rank {rank.global_rank}: {failure.reason}", status=failure.status)
            replica.assign_events.put_nowait(error)
            if not any(other.replica == rank.replica for other in self._by_device.values()):
                replica.memories.close()

    async def _ping(self) -> None:
        """Pings every rank; one that stays silent for too long is ended, which reports it."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(self._ping_interval_s)
            now = time.monotonic()
            # Where this process itself did not run, silence proves nothing.
            late, last = now - last - self._ping_interval_s, now
            for rank in list(self._by_device.values()):
                rank.handle.send(control_pb2.ToRank(ping=control_pb2.Ping()))
                if rank.heard is None:
                    continue
                rank.heard += max(0.0, late)
                silent_s = now - rank.heard
                if silent_s > self._heartbeat_timeout_s and not rank.hung:
                    rank.hung = f"it has not answered for {silent_s:.1f} s"
                    asyncio.ensure_future(rank.handle.stop())  # noqa: RUF006 - ended through _on_end
