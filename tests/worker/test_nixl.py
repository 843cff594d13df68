"""NIXL between processes over tcp: a target that stands still, one that dies, and a writer that dies in the middle.

Over tcp a write needs its target to progress, and what a writer sent waits in a socket of the target: these are the
cases in which late bytes could land.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest

from proto import control_pb2
from worker.handoff.transport.interface import MemoryRegion, PeerEpoch, WriteFailedError
from worker.handoff.transport.nixl import NixlSource, NixlTarget, choose_transports

SIZE = 64 << 20
MET = 1000
WRITER = PeerEpoch("prefill/0", 1)


class Memory:
    """A region of SIZE bytes, all `value`."""

    def __init__(self, value: int) -> None:
        self.bytes = np.full(SIZE, value, dtype=np.uint8)
        self.region = MemoryRegion(address=self.bytes.ctypes.data, num_bytes=SIZE, device=None)


class Target:
    """A target whose memory is zeros."""

    def __init__(self) -> None:
        self._memory = Memory(0)
        self._target = NixlTarget(self._memory.region)

    def open(self) -> bytes:
        return self._target.open(WRITER).SerializeToString()

    def close_writer(self) -> None:
        self._target.close_writer(WRITER)

    def progress(self) -> int:
        """Progresses for a while and says how many bytes have landed."""
        for _ in range(200):
            self._target.progress()
            time.sleep(0.001)
        return self.num_landed()

    def num_landed(self) -> int:
        return int(np.count_nonzero(self._memory.bytes))


class Source:
    """A writer whose memory is ones."""

    def __init__(self) -> None:
        self._memory = Memory(1)
        self._source = NixlSource(self._memory.region)
        self._handle: object = None

    def write(self, endpoint: bytes, size: int) -> str:
        """Begins to write the first `size` bytes; returns why it could not."""
        target = control_pb2.Endpoint.FromString(endpoint)
        runs = np.array([[self._memory.region.address, target.base_address, size]], dtype=np.uint64)
        try:
            self._handle = self._source.write(self._source.connect(target), runs, target_device=0)
        except WriteFailedError as error:
            return f"it failed: {error}"
        return ""

    def end(self, within_s: float) -> str:
        """How the write ended: done, a reason, or '' where it has not within that time."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            try:
                if self._source.is_done(self._handle):
                    return "done"
            except WriteFailedError as error:
                return str(error)
            time.sleep(0.001)
        return ""

    def close(self) -> None:
        self._handle = None
        self._source.close()


class Remote:
    """An object in a process of its own; its methods are called by name."""

    def __init__(self, kind: Callable[[], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(kind, theirs), daemon=True)
        self._process.start()

    def __call__(self, method: str, *arguments: object) -> Any:
        self.begin(method, *arguments)
        return self.result()

    def begin(self, method: str, *arguments: object) -> None:
        """Calls without waiting."""
        self._connection.send((method, arguments))

    def result(self) -> Any:
        """Waits for what was begun."""
        assert self._connection.poll(60), "it has not returned"
        return self._connection.recv()

    def kill(self) -> None:
        """SIGKILL, and reaped; idempotent."""
        self._process.kill()
        self._process.join(timeout=10)


def _serve(kind: Callable[[], Any], connection: Connection) -> None:
    served = kind()
    while True:
        method, arguments = connection.recv()
        connection.send(getattr(served, method)(*arguments))


@contextmanager
def processes() -> Iterator[tuple[Remote, Remote]]:
    """A target and a writer."""
    started = [Remote(kind) for kind in (Target, Source)]
    try:
        yield started[0], started[1]
    finally:
        for remote in started:
            remote.kill()


def meet(target: Remote, source: Remote) -> bytes:
    """A first small write, so that both are connected; returns the endpoint."""
    endpoint: bytes = target("open")
    assert source("write", endpoint, MET) == ""
    while source("end", 0.05) == "":
        target("progress")
    assert target("num_landed") == MET
    return endpoint


def begin_in_the_middle(target: Remote, source: Remote) -> bytes:
    """A large write whose target does not progress; returns the endpoint."""
    endpoint = meet(target, source)
    assert source("write", endpoint, SIZE) == ""
    assert source("end", 0.3) == ""
    assert target("num_landed") == MET
    return endpoint


@pytest.fixture(autouse=True)
def over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"UCX_TLS": "tcp,self", "UCX_LOG_LEVEL": "fatal", "NIXL_LOG_LEVEL": "FATAL"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.timeout(120)
def test_a_write_to_a_target_that_stands_still_has_not_ended_and_ends_when_it_goes_on() -> None:
    with processes() as (target, source):
        begin_in_the_middle(target, source)
        ended = ""
        while not ended:
            target.begin("progress")
            ended = source("end", 0.2)
            target.result()
        assert ended == "done"
        assert target("num_landed") == SIZE


@pytest.mark.timeout(120)
@pytest.mark.parametrize("closes", [False, True])
def test_what_a_dead_writer_left_in_a_socket_lands_unless_the_writer_is_closed(closes: bool) -> None:
    with processes() as (target, source):
        begin_in_the_middle(target, source)
        source.kill()
        if closes:
            target("close_writer")
        # Unclosed it does land: without that case the other would prove nothing.
        assert (target("progress") > MET) is not closes


@pytest.mark.timeout(120)
@pytest.mark.parametrize("closes", [False, True])
def test_what_a_writer_left_that_has_closed_lands_unless_its_endpoint_is_closed_too(closes: bool) -> None:
    with processes() as (target, source):
        begin_in_the_middle(target, source)
        source("close")
        if closes:
            target("close_writer")
        assert (target("progress") > MET) is not closes


@pytest.mark.timeout(120)
def test_a_write_to_a_target_that_dies_fails_and_so_does_each_one_after_it() -> None:
    with processes() as (target, source):
        endpoint = begin_in_the_middle(target, source)
        target.kill()
        assert "failed" in source("end", 20.0)
        assert "failed" in (source("write", endpoint, MET) or source("end", 20.0))


@pytest.mark.timeout(120)
def test_a_target_that_is_dead_before_the_first_contact_is_a_write_that_fails() -> None:
    with processes() as (target, source):
        endpoint = target("open")
        target.kill()
        assert "failed" in (source("write", endpoint, MET) or source("end", 20.0))


@pytest.mark.timeout(120)
def test_an_endpoint_is_made_anew_for_a_writer_that_comes_again() -> None:
    with processes() as (target, source):
        assert target("open") != meet(target, source)


def test_no_transport_is_shut_out_for_gpu_memory_nor_rdma_for_host_memory() -> None:
    for given, on_host, wanted in (
        ({}, False, None),
        ({"UCX_TLS": "tcp"}, False, "tcp"),
        ({"UCX_TLS": "tcp"}, True, "tcp"),
    ):
        environment = dict(given)
        choose_transports(environment, on_host=on_host)
        assert environment.get("UCX_TLS") == wanted
    environment = {}
    choose_transports(environment, on_host=True)
    assert {"shm", "tcp", "ib"} <= set(environment["UCX_TLS"].split(","))
