"""Orders to one replica about replicas of the other pool: sent on its stream, awaited until every rank has obeyed."""

import asyncio
from collections.abc import Callable

from parallel.topology import ReplicaPlan
from parallel.wire import sizes_to_wire
from proto import control_pb2
from router.errors import ClusterError


class PeerOrders:
    """The orders to one replica that are not answered yet."""

    def __init__(self, send: Callable[[control_pb2.ToReplica], None]) -> None:
        self._send = send
        self._waiting: dict[int, asyncio.Future[list[bytes]]] = {}
        self._last_id = 0
        self._error: Exception | None = None

    async def open_writer(self, replica: str, *, epoch: int) -> list[bytes]:
        """Decode: `replica` will write here. Returns the endpoints that its ranks connect to, by this one's ranks."""
        order = control_pb2.PeerOrder(replica=replica, epoch=epoch, open_writer=control_pb2.OpenWriter())
        return await self._ask(order)

    async def close_writer(self, replica: str, *, epoch: int) -> None:
        """Decode: when this returns, nothing that `replica` wrote lands here any more."""
        order = control_pb2.PeerOrder(replica=replica, epoch=epoch, close_writer=control_pb2.CloseWriter())
        await self._ask(order)

    async def connect_target(self, plan: ReplicaPlan, *, epoch: int, endpoints: list[bytes]) -> None:
        """Prefill: hand-offs may go to the decode replica of `plan`."""
        target = control_pb2.ConnectTarget(sizes=sizes_to_wire(plan.shape), endpoints=endpoints)
        await self._ask(control_pb2.PeerOrder(replica=plan.name, epoch=epoch, connect_target=target))

    async def forget_target(self, replica: str, *, epoch: int, is_dead: bool = False) -> None:
        """Prefill: when this returns, nothing is written to `replica` any more. A target that stands still keeps it
        waiting, unless it `is_dead`: its processes are known to have ended.
        """
        order = control_pb2.PeerOrder(
            replica=replica, epoch=epoch, forget_target=control_pb2.ForgetTarget(is_dead=is_dead)
        )
        await self._ask(order)

    def take(self, answered: control_pb2.PeerAnswered) -> None:
        """What the replica's leader answers; one that nobody waits for changes nothing."""
        future = self._waiting.pop(answered.order_id, None)
        if future is None or future.done():
            return
        if answered.refusal:
            future.set_exception(ClusterError(answered.refusal))
        else:
            future.set_result(list(answered.endpoints))

    def fail(self, error: Exception) -> None:
        """The stream has ended: nothing is answered any more, and every order from now on fails with `error`."""
        self._error = error
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # seen: whoever asked may have gone

    async def _ask(self, order: control_pb2.PeerOrder) -> list[bytes]:
        if self._error is not None:
            raise self._error
        self._last_id += 1
        order.order_id = self._last_id
        future: asyncio.Future[list[bytes]] = asyncio.get_running_loop().create_future()
        self._waiting[order.order_id] = future
        self._send(control_pb2.ToReplica(peer_order=order))
        return await future
