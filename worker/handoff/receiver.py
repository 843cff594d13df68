"""The thread of a decode rank that is written to: it gives each writer an endpoint, and lets its writes go on."""

import queue
import threading
from collections.abc import Callable

import torch

from proto import control_pb2, step_pb2
from worker.device import use_device
from worker.handoff.orders import PeerAnswers
from worker.handoff.transport.interface import PeerEpoch, TargetTransport
from worker.thread_end import end_thread

#: How long a write over TCP may wait for this side.
_POLL_S = 0.002


class HandoffReceiver:
    """Owns the side of a transport that is written to."""

    def __init__(
        self,
        transport: TargetTransport,
        *,
        global_rank: int,
        device: torch.device,
        report: Callable[[step_pb2.FromMember], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        self._transport = transport
        self._device = device
        self._answers = PeerAnswers(global_rank=global_rank, report=report)
        self._fail = fail
        self._inbox: queue.SimpleQueue[control_pb2.PeerOrder | None] = queue.SimpleQueue()
        self._writers: set[PeerEpoch] = set()
        self._thread = threading.Thread(target=self._run, name="handoff", daemon=True)
        self._thread.start()

    def take(self, order: control_pb2.PeerOrder) -> None:
        """open_writer: that replica will write here. close_writer: nothing of it may land from now on. Each is answered
        when it is carried out.
        """
        self._inbox.put(order)

    def close(self) -> None:
        """Ends the thread and every connection; idempotent."""
        self._inbox.put(None)
        end_thread(self._thread)

    def _run(self) -> None:
        try:
            use_device(self._device)
            while self._take():
                self._transport.progress()
        except BaseException as error:  # the thread's edge: the rank must not go on without it
            self._fail(error)
        finally:
            self._transport.close()

    def _take(self) -> bool:
        """Waits a moment for an order; False when closed."""
        try:
            order = self._inbox.get(timeout=_POLL_S if self._writers else None)
        except queue.Empty:
            return True
        if order is None:
            return False
        writer = PeerEpoch(order.replica, order.epoch)
        if order.WhichOneof("order") == "open_writer":
            self._writers.add(writer)
            self._answers.give(order, endpoint=self._transport.open(writer).SerializeToString())
        else:
            self._writers.discard(writer)
            self._transport.close_writer(writer)
            self._answers.give(order)
        return True
