"""Runs a router: its gRPC server, its cluster, and their common end."""

import asyncio
import logging
import signal
from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health as health_package
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from rich.console import Console

from parallel.process.address import parse_address
from parallel.process.cores import available_cores
from parallel.process.listening import ListenError, add_port
from parallel.process.undecodable import RefuseUndecodable
from proto import inference_pb2, inference_pb2_grpc
from router.capacity import capacity
from router.check import CheckedConfig
from router.cluster import Cluster
from router.dispatcher import Dispatcher
from router.errors import ClusterError
from router.plan_report import plan_report
from router.progress import start_progress
from router.reports import model_info, topology_message
from router.served_model import load_served_model
from router.service import InferenceService
from router.tokenising import Tokenising
from router.validation import RequestValidator

logger = logging.getLogger(__name__)

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
_STOP_GRACE_S = 1.0


class RouterServer:
    """One router. `address` is where clients reach it once `start` has returned."""

    def __init__(self, checked: CheckedConfig, *, launcher_arguments: Sequence[str] = ()) -> None:
        config = checked.config
        model = load_served_model(config.model)
        self._listen = parse_address(config.listen)
        self.dispatcher = Dispatcher(max_waiting=config.limits.max_waiting)
        self.cluster = Cluster(
            checked.topology,
            timeouts=config.timeouts,
            dispatcher=self.dispatcher,
            fingerprint=model.fingerprint,
            launcher_arguments=launcher_arguments,
        )
        self.address = config.listen
        self._health: Any = health_package.aio.HealthServicer()  # type: ignore[attr-defined]
        self._server = grpc.aio.server(
            interceptors=[RefuseUndecodable()], options=_server_options(config.limits.max_message_bytes)
        )
        # Half of the cores: the other requests' and the ranks' work goes on beside the long texts.
        self._tokenising = Tokenising(
            long_threads=max(available_cores() // 2, 1), max_waiting=config.limits.max_waiting
        )
        room = capacity(checked.topology, groups=model.description.cache_groups)
        service = InferenceService(
            dispatcher=self.dispatcher,
            validator=RequestValidator(description=model.description, text=model.text, capacity=room),
            tokenising=self._tokenising,
            model_info=model_info(
                model.description,
                model=config.model,
                text=model.text,
                fingerprint=model.fingerprint,
                capacity=room,
            ),
            topology=topology_message(plan_report(checked.topology, description=model.description)),
        )
        inference_pb2_grpc.add_InferenceServicer_to_server(service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (SERVICE, health_package.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )

    async def start(self, console: Console) -> None:
        """Opens the port, brings the cluster up, and says that it serves; ClusterError where it cannot."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            self.address = str(add_port(self._server, self._listen))
        except ListenError as error:
            raise ClusterError(str(error)) from None
        await self._server.start()
        with start_progress(console) as progress:
            await self.cluster.start(progress)
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, error: Exception) -> None:
        """Ends every stream with `error`, then the cluster, then the server; idempotent."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self.dispatcher.fail_all(error)
        await asyncio.gather(self.cluster.stop(), self._server.stop(grace=_STOP_GRACE_S))
        self._tokenising.close()

    async def _set_health(self, status: "health_pb2.HealthCheckResponse.ServingStatus") -> None:
        for service in ("", SERVICE):
            await self._health.set(service, status)


async def run_router(checked: CheckedConfig, *, console: Console, launcher_arguments: Sequence[str] = ()) -> None:
    """Serves until SIGINT or SIGTERM; ClusterError where the cluster cannot start or cannot go on."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    try:
        server = RouterServer(checked, launcher_arguments=launcher_arguments)
    except (ValueError, OSError) as failure:  # the model: a check has read its config alone
        raise ClusterError(f"model {checked.config.model}: {failure}") from failure
    told = asyncio.ensure_future(stop.wait())
    error: Exception = ClusterError("the router is shutting down")
    starting = asyncio.ensure_future(server.start(console))
    try:
        await asyncio.wait({starting, told}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            console.print(f"serving on {server.address}", highlight=False)
            either: set[asyncio.Future[Any]] = {server.cluster.failed, told}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if server.cluster.failed.done():
                raise ClusterError(server.cluster.failed.result())
    except ClusterError as failure:
        error = failure
        raise
    finally:
        starting.cancel()
        told.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await server.stop(error)


def _server_options(max_message_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.http2.min_ping_interval_without_data_ms", 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Two routers on one port would share its connections at random.
        ("grpc.so_reuseport", 0),
    ]
