"""Runs a launcher: its gRPC server, from the first address line to the last rank's end."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from dataclasses import dataclass

import grpc

from parallel.process.address import Address
from parallel.process.cores import this_machine, threads_of
from parallel.process.listening import add_port
from parallel.process.logs import LogLevel
from parallel.process.undecodable import RefuseUndecodable
from proto import control_pb2_grpc
from worker.launcher.mock_rank import MockRank
from worker.launcher.rank_child import ChildSettings, RankChild
from worker.launcher.rank_handle import RankCallbacks, RankHandle
from worker.launcher.rendezvous import RendezvousPorts
from worker.launcher.service import LauncherService

logger = logging.getLogger(__name__)

#: The router pings idle connections to find a host that vanished; a default server would refuse that.
SERVER_OPTIONS = (
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.so_reuseport", 0),
)


@dataclass(frozen=True, kw_only=True)
class LauncherOptions:
    """`num_threads` is for each rank, None leaves it to the environment, and that to the router; `exit_with_stdin` ends
    the launcher with its parent.
    """

    listen: Address
    mock: bool = False
    mock_step_s: float = 0.0
    num_threads: int | None = None
    exit_with_stdin: bool = False
    log_level: LogLevel = LogLevel.WARNING


async def run_launcher(options: LauncherOptions) -> None:
    """Serves until SIGINT, SIGTERM or, where asked for, the end of standard input. Prints its address once.

    ListenError where it cannot listen.
    """
    ports = RendezvousPorts(options.listen.host)
    machine = this_machine(threads_per_rank=options.num_threads or threads_of(os.environ))
    service = LauncherService(start_rank=RankStarter(options, ports), machine=machine, ports=ports, mock=options.mock)
    server = grpc.aio.server(interceptors=[RefuseUndecodable()], options=SERVER_OPTIONS)
    control_pb2_grpc.add_LauncherServicer_to_server(service, server)
    address = add_port(server, options.listen)
    await server.start()
    print(address, flush=True)
    try:
        await _until_told(exit_with_stdin=options.exit_with_stdin)
    finally:
        await service.stop()
        await server.stop(grace=0.5)


class RankStarter:
    """Starts the rank of a device, real or mocked."""

    def __init__(self, options: LauncherOptions, ports: RendezvousPorts) -> None:
        self._options = options
        self._ports = ports

    def __call__(self, device: int, callbacks: RankCallbacks, *, num_threads: int) -> RankHandle:
        """The running rank."""
        if self._options.mock:
            return MockRank(callbacks, step_s=self._options.mock_step_s)
        return RankChild(
            device=device,
            num_threads=num_threads,
            rendezvous=self._ports.socket(device),
            settings=ChildSettings(is_loopback=self._options.listen.is_loopback, log_level=self._options.log_level),
            callbacks=callbacks,
        )


async def _until_told(*, exit_with_stdin: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    if exit_with_stdin:
        loop.add_reader(sys.stdin, stop.set)
    await stop.wait()
    if exit_with_stdin:
        with contextlib.suppress(ValueError):
            loop.remove_reader(sys.stdin)
