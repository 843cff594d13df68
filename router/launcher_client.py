"""The router's view of one launcher: its channel, its lease, and the calls that a start-up makes."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import grpc

from parallel.process.address import parse_address
from parallel.topology import HostSpec
from proto import control_pb2, control_pb2_grpc
from router.errors import ClusterError

#: A host that vanishes without closing its connections is found by these pings.
CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.use_local_subchannel_pool", 1),
)
_CONNECT_TIMEOUT_S = 15.0
_HELLO_TIMEOUT_S = 120.0


class LauncherClient:
    """One host's launcher at `address`."""

    def __init__(self, host: HostSpec, *, address: str, router_id: int) -> None:
        self.host = host
        self.address = address
        self.ports: dict[int, int] = {}
        self._router_id = router_id
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = control_pb2_grpc.LauncherStub(self._channel)
        self._watch: asyncio.Task[None] | None = None

    @property
    def ip(self) -> str:
        """The address by which this host is reached, without its port."""
        return parse_address(self.address).host

    async def hello(self, model: str) -> control_pb2.HelloResponse:
        """What the launcher says of itself; ClusterError where it is not reached or refuses."""
        request = control_pb2.HelloRequest(
            router_id=self._router_id,
            model=model,
            device_kind=self.host.device,
            devices=self.host.devices,
        )
        try:
            await asyncio.wait_for(self._channel.channel_ready(), timeout=_CONNECT_TIMEOUT_S)
            response: control_pb2.HelloResponse = await self._stub.Hello(request, timeout=_HELLO_TIMEOUT_S)
        except TimeoutError:
            raise ClusterError(
                f"host {self.host.name}: no launcher answers at {self.address} within {_CONNECT_TIMEOUT_S:g} s; start "
                f"`worker --listen {self.address}` there"
            ) from None
        except grpc.aio.AioRpcError as error:
            raise ClusterError(f"host {self.host.name} at {self.address}: {error.details()}") from None
        self.ports = {device.index: device.rendezvous_port for device in response.devices}
        return response

    async def watch(
        self,
        *,
        heartbeat_timeout_s: float,
        on_lost: Callable[[control_pb2.RankLost], None],
        on_gone: Callable[[str], None],
    ) -> None:
        """Takes the launcher's lease; `on_lost` tells of a rank's end, `on_gone` of the launcher's own."""
        request = control_pb2.WatchRequest(router_id=self._router_id, heartbeat_timeout_s=heartbeat_timeout_s)
        call = self._stub.Watch(request)
        try:
            await asyncio.wait_for(call.read(), timeout=_HELLO_TIMEOUT_S)
        except (TimeoutError, grpc.aio.AioRpcError) as error:
            details = error.details() if isinstance(error, grpc.aio.AioRpcError) else "it does not answer"
            raise ClusterError(f"host {self.host.name} at {self.address}: {details}") from None
        self._watch = asyncio.create_task(
            self._read_watch(call, heartbeat_timeout_s=heartbeat_timeout_s, on_lost=on_lost, on_gone=on_gone)
        )

    async def assign(
        self, request: control_pb2.AssignRequest, *, on_event: Callable[[control_pb2.AssignEvent], None]
    ) -> None:
        """Waits until this host's ranks of a replica are built; ClusterError naming the rank where one cannot be."""
        try:
            async for event in self._stub.Assign(request):
                on_event(event)
        except grpc.aio.AioRpcError as error:
            raise ClusterError(f"host {self.host.name}, {request.replica}: {error.details()}") from None

    def attach(self) -> "grpc.aio.StreamStreamCall[control_pb2.ToReplica, control_pb2.FromReplica]":
        """The stream of a replica whose leader is on this host."""
        call: grpc.aio.StreamStreamCall[control_pb2.ToReplica, control_pb2.FromReplica] = self._stub.Attach()
        return call

    async def close(self) -> None:
        """Gives the lease up, which ends this router's ranks there; idempotent."""
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
            self._watch = None
        await self._channel.close(grace=None)

    async def _read_watch(
        self,
        call: Any,
        *,
        heartbeat_timeout_s: float,
        on_lost: Callable[[control_pb2.RankLost], None],
        on_gone: Callable[[str], None],
    ) -> None:
        while True:
            try:
                event = await asyncio.wait_for(call.read(), timeout=heartbeat_timeout_s)
            except TimeoutError:
                on_gone(f"its launcher has been silent for {heartbeat_timeout_s:g} s")
                return
            except grpc.aio.AioRpcError as error:
                on_gone(f"its launcher is gone ({error.details()})")
                return
            if not isinstance(event, control_pb2.HostEvent):  # the stream's end
                on_gone("its launcher ended the lease")
                return
            if event.WhichOneof("event") == "rank_lost":
                on_lost(event.rank_lost)
