"""The router's view of one replica: the stream to its leader, and what the leader last said of its load."""

import asyncio
import logging
from collections.abc import Callable

import grpc

from parallel.topology import ReplicaPlan
from proto import control_pb2
from router.errors import ClusterError
from router.launcher_client import LauncherClient
from router.peer_orders import PeerOrders

logger = logging.getLogger(__name__)


class ReplicaClient:
    """Messages to the leader go out in the order of `send`; events come to `on_events` in the order of the leader."""

    def __init__(self, plan: ReplicaPlan, *, epoch: int, launcher: LauncherClient) -> None:
        self.plan = plan
        self.epoch = epoch
        self.peers = PeerOrders(self.send)
        self.load = control_pb2.Load()
        self._launcher = launcher
        self._outbox: asyncio.Queue[control_pb2.ToReplica] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._is_closed = False

    @property
    def name(self) -> str:
        """pool/index."""
        return self.plan.name

    def attach(
        self,
        *,
        on_events: Callable[["ReplicaClient", control_pb2.FromReplica], None],
        on_gone: Callable[[str], None],
    ) -> None:
        """Opens the stream; `on_gone` is told why it ended, however that came, unless `close` ended it."""
        call = self._launcher.attach()
        self.send(control_pb2.ToReplica(replica=self.name, epoch=self.epoch))
        self._tasks = [
            asyncio.create_task(self._write(call)),
            asyncio.create_task(self._read(call, on_events=on_events)),
        ]
        for task in self._tasks:
            task.add_done_callback(lambda task: self._tell_end(task, on_gone=on_gone))

    def send(self, message: control_pb2.ToReplica) -> None:
        """Queues a message for the leader."""
        self._outbox.put_nowait(message)

    async def close(self) -> None:
        """Ends the stream; idempotent."""
        self._is_closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        self.peers.fail(ClusterError(f"{self.name}: its stream is closed"))

    async def _write(self, call: "grpc.aio.StreamStreamCall[control_pb2.ToReplica, control_pb2.FromReplica]") -> None:
        while True:
            await call.write(await self._outbox.get())

    async def _read(
        self,
        call: "grpc.aio.StreamStreamCall[control_pb2.ToReplica, control_pb2.FromReplica]",
        *,
        on_events: Callable[["ReplicaClient", control_pb2.FromReplica], None],
    ) -> None:
        async for message in call:
            for event in message.events:
                if event.WhichOneof("event") == "peer_answered":
                    self.peers.take(event.peer_answered)
            on_events(self, message)

    def _tell_end(self, task: "asyncio.Task[None]", *, on_gone: Callable[[str], None]) -> None:
        if self._is_closed or task.cancelled():
            return
        error = task.exception()
        if error is not None and not isinstance(error, grpc.aio.AioRpcError):
            logger.error("replica stream failed: replica=%s", self.name, exc_info=error)
        reason = error.details() if isinstance(error, grpc.aio.AioRpcError) else error
        sentence = f"the stream to its leader ended ({reason or 'closed by the launcher'})"
        self.peers.fail(ClusterError(f"{self.name}: {sentence}"))
        on_gone(sentence)
