"""The thread that owns a rank's transport: it makes writes, sees them done, and lets peers' writes progress.

```
main thread ── part (chunk, layers) ──> queue ──> this thread ── write ──> peers' memory      while later layers run
leader      <── WritesDone ─────────────────────────┘ when all of the chunk's bytes have landed
```
"""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from proto import control_pb2, step_pb2
from worker.handoff.plan import HandoffPlanner, HandoffSource, LaneRuns
from worker.handoff.transport.interface import Transport, WriteRuns
from worker.step.rows import PlacedChunk
from worker.thread_end import end_thread

#: How long a write of a peer over TCP may wait for this side, and a finished write for its report.
_POLL_S = 0.002


@dataclass(frozen=True, kw_only=True)
class ComputedPart:
    """A chunk in the stage's `layers`, whose KV is there when `wait` returns. Parts of a chunk come in order."""

    item: PlacedChunk
    layers: range
    is_last: bool
    wait: Callable[[], None]


@dataclass(kw_only=True)
class _Order:
    """The writes of one chunk: to whom, its runs, the writes under way by part, and what is to be reported."""

    peer: "_Peer | None"
    planned: list[LaneRuns]
    parts: list["_Part"] = field(default_factory=list)
    is_whole: bool = False
    num_bytes: int = 0
    seconds: float = 0.0
    last_end: float = 0.0


@dataclass(kw_only=True)
class _Part:
    """The writes of some layers."""

    started: float
    handles: list[object]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Peer:
    """A target replica in one epoch, and the transport's names of the ranks that were written to."""

    planner: HandoffPlanner
    names: dict[int, str] = field(default_factory=dict)


class HandoffThread:
    """Sends the KV of this rank's chunks to their targets, in the order of `send`."""

    def __init__(
        self,
        transport: Transport,
        *,
        source: HandoffSource,
        receives: bool,
        report: Callable[[step_pb2.WritesDone], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        self._transport = transport
        self._source = source
        # A rank that only sends has nothing to look after while it sends nothing.
        self._idle_wait_s = _POLL_S if receives else None
        self._report = report
        self._fail = fail
        self._peers: dict[str, dict[int, _Peer]] = {}  # by replica and epoch
        self._inbox: queue.SimpleQueue[control_pb2.Peer | ComputedPart | None] = queue.SimpleQueue()
        self._orders: dict[tuple[int, int], _Order] = {}  # by request and the chunk's end
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="handoff", daemon=True)
        self._thread.start()

    def connect(self, peer: control_pb2.Peer) -> None:
        """Makes a target replica known; chunks for it may follow. It takes the place of its earlier epochs."""
        self._inbox.put(peer)

    def send(self, part: ComputedPart) -> None:
        """Writes the KV that this rank holds of a part; every chunk is answered by one report, after its last part."""
        self._inbox.put(part)

    def close(self) -> None:
        """Ends the thread after what was ordered is written; idempotent. RuntimeError where it goes on writing."""
        self._inbox.put(None)
        end_thread(self._thread)

    def _run(self) -> None:
        try:
            while self._take():
                self._finish_orders()
                self._forget_replaced()
                self._transport.progress()
        except BaseException as error:  # the thread's edge: the rank must not go on without it
            self._fail(error)
        finally:
            self._transport.close()

    def _take(self) -> bool:
        """Waits a moment for an order and begins all that are there; False when closed and nothing is under way."""
        try:
            item = self._inbox.get(timeout=_POLL_S / 10 if self._orders else self._idle_wait_s)
        except queue.Empty:
            return bool(self._orders) or not self._is_closing
        if item is None:
            self._is_closing = True
        elif isinstance(item, control_pb2.Peer):
            self._add_peer(item)
        else:
            item.wait()
            self._begin(item)
        return bool(self._orders) or not self._is_closing

    def _add_peer(self, peer: control_pb2.Peer) -> None:
        planner = HandoffPlanner(self._source, peer=peer)
        self._peers.setdefault(peer.replica, {})[peer.epoch] = _Peer(planner=planner)

    def _forget_replaced(self) -> None:
        """Gives up epochs of a target that a later one has replaced, once nothing is being written to them."""
        for epochs in self._peers.values():
            for epoch in sorted(epochs)[:-1]:
                if not any(order.peer is epochs[epoch] for order in self._orders.values()):
                    for name in epochs.pop(epoch).names.values():
                        self._transport.disconnect(name)

    def _begin(self, part: ComputedPart) -> None:
        item, target = part.item, part.item.sequence.target
        assert target is not None
        key = (item.sequence.request_id, item.end)
        if key not in self._orders:
            self._orders[key] = self._order(item, target)
        # Before the writes: a transport over shared memory has copied when `write` returns.
        order, handles, started = self._orders[key], [], time.perf_counter()
        for planned in order.planned:
            assert order.peer is not None
            runs = order.peer.planner.runs(planned, layers=part.layers)
            if len(runs):
                handles.append(self._write(order.peer, planned.target_rank, runs))
                order.num_bytes += int(runs[:, 2].sum())
        order.parts.append(_Part(started=started, handles=handles))
        order.is_whole = part.is_last

    def _order(self, item: PlacedChunk, target: control_pb2.Target) -> _Order:
        """The order of a chunk; of an epoch that was replaced the memory is gone, so there is nothing to write."""
        epochs = self._peers[target.replica]
        if target.epoch not in epochs:
            assert target.epoch < max(epochs), f"{target.replica} is not known in epoch {target.epoch}"
            return _Order(peer=None, planned=[])
        peer = epochs[target.epoch]
        return _Order(peer=peer, planned=peer.planner.plan(item))

    def _write(self, peer: _Peer, rank: int, runs: WriteRuns) -> object:
        endpoint = peer.planner.endpoints[rank]
        if rank not in peer.names:
            peer.names[rank] = self._transport.connect(endpoint)
        return self._transport.write(peer.names[rank], runs, target_device=endpoint.device)

    def _finish_orders(self) -> None:
        for key, order in list(self._orders.items()):
            for part in list(order.parts):
                part.handles = [handle for handle in part.handles if not self._transport.is_done(handle)]
                if not part.handles:
                    order.parts.remove(part)
                    now = time.perf_counter()
                    order.seconds += now - max(part.started, order.last_end)
                    order.last_end = now
            if order.is_whole and not order.parts:
                del self._orders[key]
                self._report_done(key, order)

    def _report_done(self, key: tuple[int, int], order: _Order) -> None:
        request_id, end_position = key
        self._report(
            step_pb2.WritesDone(
                global_rank=self._source.share.coordinates.global_rank,
                request_id=request_id,
                end_position=end_position,
                bytes=order.num_bytes,
                seconds=order.seconds,
            )
        )
