"""The launcher's gRPC service: checks who calls, and turns HostRanks' errors into status codes."""

import asyncio
import importlib.metadata
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from parallel.checkpoint.contents import require_sound
from parallel.checkpoint.fingerprint import fingerprint
from parallel.checkpoint.location import resolve_model
from parallel.cores import Machine
from parallel.wire import machine_to_wire
from proto import control_pb2, control_pb2_grpc
from worker.launcher.host_ranks import AssignmentError, HostRanks
from worker.launcher.native_build import build_native
from worker.launcher.rank_handle import StartRank
from worker.launcher.rendezvous import RendezvousPorts

logger = logging.getLogger(__name__)

_HEARTBEAT_S = 1.0
_BEATS_PER_TIMEOUT = 4
_NVIDIA_DEVICES = Path("/proc/driver/nvidia/gpus")


@dataclass(kw_only=True)
class _Lease:
    """The router that this host serves now."""

    router_id: int
    ranks: HostRanks


class LauncherService(control_pb2_grpc.LauncherServicer):
    """Serves one router at a time: the one whose Watch stream is open. Its end ends the ranks."""

    def __init__(self, *, start_rank: StartRank, machine: Machine, ports: RendezvousPorts, mock: bool) -> None:
        self._start_rank = start_rank
        self._machine = machine
        self._ports = ports
        self._mock = mock
        self._lease: _Lease | None = None

    async def Hello(
        self,
        request: control_pb2.HelloRequest,
        context: "grpc.aio.ServicerContext[control_pb2.HelloRequest, control_pb2.HelloResponse]",
    ) -> control_pb2.HelloResponse:
        """Versions, the checkpoint's fingerprint, the machine, and a reserved port for each device asked for."""
        if self._lease is not None and self._lease.router_id != request.router_id:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"this launcher serves router {self._lease.router_id:016x}"
            )
        try:
            _check_devices(request.device_kind, list(request.devices), mock=self._mock)
            digest = await asyncio.to_thread(_checked_fingerprint, request.model)
        except (ValueError, OSError) as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        try:
            reserved = {index: self._ports.port(index) for index in request.devices}
        except OSError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"no port can be reserved: {error.strerror}")
        return control_pb2.HelloResponse(
            muster_version=_version("muster"),
            torch_version="" if self._mock else _version("torch"),
            checkpoint_fingerprint=digest,
            devices=[control_pb2.Device(index=index, rendezvous_port=port) for index, port in reserved.items()],
            mock=self._mock,
            machine=machine_to_wire(self._machine),
        )

    async def Watch(
        self,
        request: control_pb2.WatchRequest,
        context: "grpc.aio.ServicerContext[control_pb2.WatchRequest, control_pb2.HostEvent]",
    ) -> AsyncIterator[control_pb2.HostEvent]:
        """Holds the lease for as long as the stream is open."""
        if self._lease is not None:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"this launcher serves router {self._lease.router_id:016x}"
            )
        ranks = HostRanks(self._start_rank, heartbeat_timeout_s=request.heartbeat_timeout_s)
        self._lease = _Lease(router_id=request.router_id, ranks=ranks)
        interval_s = min(_HEARTBEAT_S, request.heartbeat_timeout_s / _BEATS_PER_TIMEOUT)
        logger.info("lease taken: router=%016x", request.router_id)
        try:
            yield control_pb2.HostEvent(heartbeat=control_pb2.Heartbeat())
            while True:
                try:
                    yield await asyncio.wait_for(ranks.host_events.get(), timeout=interval_s)
                except TimeoutError:
                    yield control_pb2.HostEvent(heartbeat=control_pb2.Heartbeat())
        finally:
            await asyncio.shield(self._end_lease(ranks))
            logger.info("lease ended: router=%016x", request.router_id)

    async def Assign(
        self,
        request: control_pb2.AssignRequest,
        context: "grpc.aio.ServicerContext[control_pb2.AssignRequest, control_pb2.AssignEvent]",
    ) -> AsyncIterator[control_pb2.AssignEvent]:
        """Streams what happens until every rank named is built."""
        if not self._mock:
            await build_native(request)
        ranks = await self._ranks_of(request.router_id, context)
        try:
            async for event in ranks.assign(request):
                yield event
        except AssignmentError as error:
            await context.abort(grpc.StatusCode[error.status], str(error))

    async def Attach(
        self,
        request_iterator: AsyncIterator[control_pb2.ToReplica],
        context: "grpc.aio.ServicerContext[control_pb2.ToReplica, control_pb2.FromReplica]",
    ) -> AsyncIterator[control_pb2.FromReplica]:
        """Relays between the router and the leader of the replica that the first message names."""
        first = await anext(request_iterator, None)
        if first is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the stream names no replica: its first message does")
        assert first is not None
        if self._lease is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no router watches this launcher")
        ranks = self._lease.ranks
        try:
            events = ranks.attach(first.replica, epoch=first.epoch)
        except AssignmentError as error:
            await context.abort(grpc.StatusCode[error.status], str(error))
        relay = asyncio.create_task(_relay(request_iterator, ranks=ranks, first=first))
        try:
            while True:
                yield await events.get()
        finally:
            relay.cancel()
            ranks.detach(first.replica, epoch=first.epoch)

    async def stop(self) -> None:
        """Ends all ranks; idempotent."""
        if self._lease is not None:
            await self._end_lease(self._lease.ranks)
        self._ports.close()

    async def _end_lease(self, ranks: HostRanks) -> None:
        await ranks.stop()
        if self._lease is not None and self._lease.ranks is ranks:
            self._lease = None

    async def _ranks_of(self, router_id: int, context: "grpc.aio.ServicerContext[Any, Any]") -> HostRanks:
        if self._lease is None or self._lease.router_id != router_id:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"router {router_id:016x} does not hold this launcher's lease"
            )
        assert self._lease is not None
        return self._lease.ranks


async def _relay(
    messages: AsyncIterator[control_pb2.ToReplica], *, ranks: HostRanks, first: control_pb2.ToReplica
) -> None:
    async for message in messages:
        ranks.to_leader(first.replica, message, epoch=first.epoch)


def _find_model(model: str) -> Path:
    try:
        return resolve_model(model)
    except ValueError as error:
        raise ValueError(f"{error} on this host: every host has the model at the same path") from None


def _check_devices(kind: str, devices: list[int], *, mock: bool) -> None:
    """ValueError where this host does not have the devices that the topology names."""
    if kind != "cuda" or mock:
        return
    present = len(list(_NVIDIA_DEVICES.iterdir())) if _NVIDIA_DEVICES.exists() else 0
    missing = [index for index in devices if index >= present]
    if missing:
        raise ValueError(f"this host has {present} NVIDIA devices, but the topology names device {missing[0]}")


def _checked_fingerprint(model: str) -> str:
    """Blocking: the fingerprint of the checkpoint on this host; ValueError with every fault of its weight files."""
    folder = _find_model(model)
    require_sound(folder)
    return fingerprint(folder)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
