"""The thread of a prefill rank that writes its KV into the targets' memory and says what became of it.

```
main thread ── part (chunk, layers) ──> queue ──> this thread ── write ──> target's memory      while later layers run
leader      <── WritesFailed, at once where one cannot be ──┤
            <── WritesDone ─────────────────────────────────┘ when nothing of the chunk is under way any more
```
A write that fails or takes too long ends its hand-off, never this rank. One that was given up by time may still be read
and may still land: it is looked after until the transport says that it has ended, or its target is known to be dead.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from proto import control_pb2, step_pb2
from worker.device import use_device
from worker.handoff.orders import PeerAnswers
from worker.handoff.plan import HandoffPlanner, HandoffSource, LaneRuns
from worker.handoff.transport.interface import PeerEpoch, SourceTransport, WriteFailedError, WriteRuns
from worker.step.sequences import HandedChunk
from worker.thread_end import end_thread

logger = logging.getLogger(__name__)

#: How long a finished write may wait for its report, and an end for being noticed.
_BUSY_WAIT_S = 0.0002
#: How long `close` waits for writes that have nothing but a slow target before them.
_CLOSE_GRACE_S = 2.0


@dataclass(frozen=True, kw_only=True)
class ComputedPart:
    """A chunk in the stage's `layers`, whose KV is there when `wait` returns. Parts of a chunk come in order."""

    item: HandedChunk
    layers: range
    is_last: bool
    wait: Callable[[], None]


@dataclass(kw_only=True, eq=False)
class _Target:
    """A target replica in one epoch: the transport's names of the ranks that were written to, and what is under way."""

    planner: HandoffPlanner
    names: dict[int, str] = field(default_factory=dict)
    under_way: dict[int, int] = field(default_factory=dict)  # writes by rank
    next_orders: list[control_pb2.PeerOrder] = field(default_factory=list)  # once nothing is under way


@dataclass(frozen=True, kw_only=True)
class _Write:
    """One write under way."""

    handle: object
    rank: int
    started: float


@dataclass(kw_only=True)
class _Part:
    """The writes of some layers that are under way."""

    started: float
    writes: list[_Write]


@dataclass(kw_only=True)
class _ChunkWrites:
    """The writes of one chunk: to whom, its runs, and what became of them."""

    target: _Target | None
    planned: list[LaneRuns]
    parts: list[_Part] = field(default_factory=list)
    is_whole: bool = False
    failure: str = ""
    may_land: bool = False
    num_bytes: int = 0
    seconds: float = 0.0
    last_end: float = 0.0


class HandoffSender:
    """Sends the KV of this rank's chunks to their targets, in the order of `send`."""

    def __init__(
        self,
        transport: SourceTransport,
        *,
        source: HandoffSource,
        write_timeout_s: float,
        device: torch.device,
        report: Callable[[step_pb2.FromMember], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        """A write that has not ended after `write_timeout_s` ends its hand-off."""
        self._transport = transport
        self._source = source
        self._write_timeout_s = write_timeout_s
        self._device = device
        self._report = report
        self._answers = PeerAnswers(global_rank=source.share.coordinates.global_rank, report=report)
        self._fail = fail
        self._targets: dict[PeerEpoch, _Target] = {}
        self._inbox: queue.SimpleQueue[control_pb2.PeerOrder | ComputedPart | None] = queue.SimpleQueue()
        self._chunks: dict[tuple[int, int], _ChunkWrites] = {}  # by request and the chunk's end
        self._closes_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="handoff", daemon=True)
        self._thread.start()

    def take(self, order: control_pb2.PeerOrder) -> None:
        """connect_target: hand-offs may follow. forget_target: nothing is written there from now on. Each is answered
        when it is carried out: in their order, and for a target that is known when no write to it is under way.
        """
        self._inbox.put(order)

    def send(self, part: ComputedPart) -> None:
        """Writes the KV that this rank holds of a part; every chunk is answered by one WritesDone after its last."""
        self._inbox.put(part)

    def close(self) -> None:
        """Ends the thread after what was ordered is written, or given up where a target stands still: then nothing
        reads the memory any more. Idempotent.
        """
        self._inbox.put(None)
        end_thread(self._thread)

    def _run(self) -> None:
        try:
            use_device(self._device)
            while self._take():
                self._look_at_writes()
                self._forget()
        except BaseException as error:  # the thread's edge: the rank must not go on without it
            self._fail(error)
        finally:
            # Each handle keeps the agent, and its connections with it.
            self._chunks.clear()
            self._transport.close()

    def _take(self) -> bool:
        """Waits a moment for an order and carries it out; False when closed and nothing is left to wait for."""
        try:
            item = self._inbox.get(timeout=_BUSY_WAIT_S if self._chunks or self._closes_at else None)
        except queue.Empty:
            return self._goes_on()
        if item is None:
            self._closes_at = time.perf_counter() + _CLOSE_GRACE_S
        elif isinstance(item, control_pb2.PeerOrder):
            self._take_order(item)
        else:
            item.wait()
            self._begin(item)
        return self._goes_on()

    def _goes_on(self) -> bool:
        if self._closes_at is None:
            return True
        is_writing = any(chunk.parts for chunk in self._chunks.values())
        return is_writing and time.perf_counter() < self._closes_at

    # ---- targets ----

    def _take_order(self, order: control_pb2.PeerOrder) -> None:
        key = PeerEpoch(order.replica, order.epoch)
        target = self._targets.get(key)
        if target is not None:
            # What is known of it goes first, and only when no write to it is under way.
            target.next_orders.append(order)
            if order.forget_target.is_dead:
                self._give_up(target)
            return
        refusal = ""
        if order.WhichOneof("order") == "connect_target":
            try:
                self._targets[key] = _Target(planner=HandoffPlanner(self._source, target=order.connect_target))
            except ValueError as error:  # a target that this rank cannot write to is no fault of the rank's
                refusal = str(error)
        self._answers.give(order, refusal=refusal)

    def _give_up(self, target: _Target) -> None:
        """Nothing can land at a dead target, whatever its transport waits for."""
        for key, chunk in self._chunks.items():
            if chunk.target is target and chunk.parts:
                chunk.parts.clear()
                self._give_up_chunk(key, "its target is dead")
        target.under_way.clear()

    def _forget(self) -> None:
        """Gives up targets that have orders waiting and no write under way, and carries the orders out: one may be
        about a target that the one before it has made known again.
        """
        while (key := self._next_to_forget()) is not None:
            target = self._targets.pop(key)
            for name in target.names.values():
                self._transport.disconnect(name)
            for order in target.next_orders:
                self._take_order(order)

    def _next_to_forget(self) -> PeerEpoch | None:
        for key, target in self._targets.items():
            if target.next_orders and not any(target.under_way.values()):
                return key
        return None

    # ---- writes ----

    def _begin(self, part: ComputedPart) -> None:
        item = part.item
        key = (item.sequence.request_id, item.end)
        if key not in self._chunks:
            self._chunks[key] = self._new_chunk(item)
        # Before the writes: a transport over shared memory has copied when `write` returns.
        chunk, started = self._chunks[key], time.perf_counter()
        try:
            chunk.parts.append(_Part(started=started, writes=[]))
            for write in self._writes(chunk, part.layers):
                chunk.parts[-1].writes.append(write)
        except WriteFailedError as error:
            self._give_up_chunk(key, str(error))
        chunk.is_whole = part.is_last

    def _new_chunk(self, item: HandedChunk) -> _ChunkWrites:
        wanted = item.sequence.target
        assert wanted is not None
        target = self._targets.get(PeerEpoch(wanted.replica, wanted.epoch))
        if target is None:
            return _ChunkWrites(target=None, planned=[])
        return _ChunkWrites(target=target, planned=target.planner.plan(item))

    def _writes(self, chunk: _ChunkWrites, layers: range) -> Iterator[_Write]:
        """Begins the chunk's writes in `layers`, unless it has failed before; WriteFailedError where one cannot be."""
        if chunk.failure:
            return
        if chunk.target is None or chunk.target.next_orders:
            raise WriteFailedError("its target is not there any more")
        for planned in chunk.planned:
            runs = chunk.target.planner.runs(planned, layers=layers)
            if len(runs):
                yield self._write(chunk.target, planned.target_rank, runs)
                chunk.num_bytes += int(runs[:, 2].sum())

    def _write(self, target: _Target, rank: int, runs: WriteRuns) -> _Write:
        endpoint = target.planner.endpoints[rank]
        if rank not in target.names:
            target.names[rank] = self._transport.connect(endpoint)
        started = time.perf_counter()
        try:
            handle = self._transport.write(target.names[rank], runs, target_device=endpoint.device)
        except WriteFailedError:
            self._drop_broken(target, rank)
            raise
        target.under_way[rank] = target.under_way.get(rank, 0) + 1
        return _Write(handle=handle, rank=rank, started=started)

    def _look_at_writes(self) -> None:
        for key, chunk in list(self._chunks.items()):
            for part in list(chunk.parts):
                part.writes = [write for write in part.writes if self._is_under_way(key, chunk, write)]
                if not part.writes:
                    chunk.parts.remove(part)
                    now = time.perf_counter()
                    chunk.seconds += now - max(part.started, chunk.last_end)
                    chunk.last_end = now
            if chunk.is_whole and not chunk.parts:
                del self._chunks[key]
                self._report_done(key, chunk)

    def _is_under_way(self, key: tuple[int, int], chunk: _ChunkWrites, write: _Write) -> bool:
        try:
            if not self._transport.is_done(write.handle):
                if time.perf_counter() - write.started > self._write_timeout_s and not chunk.failure:
                    self._give_up_chunk(key, f"a write has not ended within {self._write_timeout_s:g} s")
                return True
        except WriteFailedError as error:
            chunk.may_land = True
            self._give_up_chunk(key, str(error))
        self._end_write(chunk, write)
        return False

    def _end_write(self, chunk: _ChunkWrites, write: _Write) -> None:
        target = chunk.target
        assert target is not None
        target.under_way[write.rank] -= 1
        if chunk.may_land:
            self._drop_broken(target, write.rank)

    def _drop_broken(self, target: _Target, rank: int) -> None:
        """A connection that has failed stays so; once no write is under way on it, the next one makes a new one."""
        if not target.under_way.get(rank) and rank in target.names:
            self._transport.disconnect(target.names.pop(rank))

    def _give_up_chunk(self, key: tuple[int, int], reason: str) -> None:
        """Ends the hand-off, once: the rest of the chunk is not written, what is under way is still looked after."""
        chunk, request_id = self._chunks[key], key[0]
        if chunk.failure:
            return
        chunk.failure = reason
        logger.warning("hand-off failed: request_id=%016x reason=%s", request_id, reason)
        failed = step_pb2.WritesFailed(global_rank=self._answers.global_rank, request_id=request_id, reason=reason)
        self._report(step_pb2.FromMember(writes_failed=failed))

    def _report_done(self, key: tuple[int, int], chunk: _ChunkWrites) -> None:
        request_id, end_position = key
        done = step_pb2.WritesDone(
            global_rank=self._answers.global_rank,
            request_id=request_id,
            end_position=end_position,
            bytes=chunk.num_bytes,
            seconds=chunk.seconds,
            may_land=chunk.may_land,
        )
        self._report(step_pb2.FromMember(writes=done))
