"""The thread that owns a rank's transport: it makes writes, sees them done, and lets peers' writes progress.

```
main thread ── order (chunk) ──> queue ──> this thread ── write ──> peers' memory
leader      <── WritesDone ──────────────────┘ when all of the chunk's bytes have landed
```
"""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from parallel.handoff import CacheLayout, cache_layout
from parallel.models.description import ModelDescription
from parallel.shape import RankCoordinates
from parallel.wire import shape_from_wire
from proto import control_pb2, step_pb2
from worker.handoff_plan import HandoffPlanner, SourceMemory
from worker.step_rows import PlacedChunk
from worker.transport.interface import Transport

#: How long a write of a peer over TCP may wait for this side, and a finished write for its report.
_POLL_S = 0.002


#: A chunk, and what blocks until its KV is computed.
_Ordered = tuple[PlacedChunk, Callable[[], None]]


@dataclass(kw_only=True)
class _Order:
    """The writes of one chunk: those under way, and what is to be reported."""

    request_id: int
    end_position: int
    started: float
    handles: list[object] = field(default_factory=list)
    num_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class _Peer:
    planner: HandoffPlanner
    endpoints: list[control_pb2.Endpoint]
    names: dict[int, str] = field(default_factory=dict)


class HandoffThread:
    """Sends the KV of this rank's chunks to their targets, in the order of `send`."""

    def __init__(
        self,
        transport: Transport,
        *,
        description: ModelDescription,
        layout: CacheLayout,
        coordinates: RankCoordinates,
        memory: SourceMemory,
        receives: bool,
        report: Callable[[step_pb2.WritesDone], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        self._transport = transport
        self._description = description
        self._layout = layout
        self._coordinates = coordinates
        self._memory = memory
        # A rank that only sends has nothing to look after while it sends nothing.
        self._idle_wait_s = _POLL_S if receives else None
        self._report = report
        self._fail = fail
        self._peers: dict[tuple[str, int], _Peer] = {}
        self._inbox: queue.SimpleQueue[control_pb2.Peer | _Ordered | None] = queue.SimpleQueue()
        self._orders: list[_Order] = []
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="handoff", daemon=True)
        self._thread.start()

    def connect(self, peer: control_pb2.Peer) -> None:
        """Makes a target replica known; chunks for it may follow."""
        self._inbox.put(peer)

    def send(self, item: PlacedChunk, *, wait: Callable[[], None]) -> None:
        """Writes the KV that this rank holds of the chunk's positions; every order is answered by one report.

        `wait` blocks until the device has computed that KV.
        """
        self._inbox.put((item, wait))

    def close(self) -> None:
        """Ends the thread after what was ordered is written; idempotent."""
        self._inbox.put(None)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        try:
            while self._take():
                self._finish_orders()
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
            chunk, wait = item
            wait()
            self._begin(chunk)
        return bool(self._orders) or not self._is_closing

    def _add_peer(self, peer: control_pb2.Peer) -> None:
        endpoints = [control_pb2.Endpoint.FromString(endpoint) for endpoint in peer.endpoints]
        target = cache_layout(self._description, shape=shape_from_wire(peer.sizes), page_size=peer.page_size)
        planner = HandoffPlanner(
            source=self._layout,
            target=target,
            coordinates=self._coordinates,
            memory=self._memory,
            endpoints=endpoints,
        )
        self._peers[peer.replica, peer.epoch] = _Peer(planner=planner, endpoints=endpoints)

    def _begin(self, item: PlacedChunk) -> None:
        target = item.sequence.target
        assert target is not None
        peer = self._peers[target.replica, target.epoch]
        order = _Order(request_id=item.sequence.request_id, end_position=item.end, started=time.perf_counter())
        for writes in peer.planner.writes(item):
            rank = writes.target_rank
            endpoint = peer.endpoints[rank]
            if rank not in peer.names:
                peer.names[rank] = self._transport.connect(endpoint)
            order.handles.append(self._transport.write(peer.names[rank], writes.runs, target_device=endpoint.device))
            order.num_bytes += int(writes.runs[:, 2].sum())
        self._orders.append(order)

    def _finish_orders(self) -> None:
        for order in list(self._orders):
            order.handles = [handle for handle in order.handles if not self._transport.is_done(handle)]
            if not order.handles:
                self._orders.remove(order)
                self._report(
                    step_pb2.WritesDone(
                        global_rank=self._coordinates.global_rank,
                        request_id=order.request_id,
                        end_position=order.end_position,
                        bytes=order.num_bytes,
                        seconds=time.perf_counter() - order.started,
                    )
                )
