"""How a rank's process is started, and what is sent to one that has ended."""

import asyncio
import os
import signal
from pathlib import Path

import pytest
import uvloop

from parallel.process.address import Address
from proto import control_pb2
from worker.launcher.rank_child import OPENMP_WAITS, RankChild
from worker.launcher.rank_handle import RankCallbacks
from worker.launcher.rendezvous import RendezvousPorts
from worker.launcher.server import LauncherOptions, RankStarter


async def environment_of_a_rank(*, num_threads: int = 1, host: str = "127.0.0.1") -> dict[str, str]:
    """What the process of a rank was started with; it is ended at once."""
    ports = RendezvousPorts("127.0.0.1")
    options = LauncherOptions(listen=Address(host=host, port=0))
    callbacks = RankCallbacks(message=lambda message: None, ended=lambda reason: None)
    rank = RankStarter(options, ports)(0, callbacks, num_threads=num_threads)
    assert isinstance(rank, RankChild)
    try:
        # Empty for a moment: the kernel lays it out after the parent has heard that the program was found.
        while not (text := Path(f"/proc/{rank.pid}/environ").read_text()):
            await asyncio.sleep(0.01)
    finally:
        await rank.stop()
        ports.close()
    return dict(item.split("=", 1) for item in text.split("\0") if item)


def test_a_rank_is_started_with_the_threads_of_its_assignment_whatever_its_launchers_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # the router has heard of it, and has dealt as it says or otherwise
    assert asyncio.run(environment_of_a_rank(num_threads=2))["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize(("host", "devices"), [("127.0.0.1", "lo"), ("::1", "lo"), ("10.0.0.1", None)])
def test_hand_offs_stay_on_the_machine_where_their_launcher_does(
    host: str, devices: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
    assert asyncio.run(environment_of_a_rank(host=host)).get("UCX_NET_DEVICES") == devices


def test_compiled_products_are_bounded_unless_the_operator_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    found = asyncio.run(environment_of_a_rank())
    assert (found["LRU_CACHE_CAPACITY"], found["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) == ("256", "7")


@pytest.mark.parametrize(("inherited", "looks"), [(None, OPENMP_WAITS["GOMP_SPINCOUNT"]), ("7", "7")])
def test_threads_that_wait_sleep_soon_unless_the_operator_says_otherwise(
    inherited: str | None, looks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if inherited is not None:
        monkeypatch.setenv("GOMP_SPINCOUNT", inherited)
    assert asyncio.run(environment_of_a_rank())["GOMP_SPINCOUNT"] == looks


def test_what_is_sent_to_a_rank_that_has_ended_is_dropped() -> None:
    async def work() -> None:
        ports, ended = RendezvousPorts("127.0.0.1"), asyncio.Event()
        callbacks = RankCallbacks(message=lambda message: None, ended=lambda reason: ended.set())
        options = LauncherOptions(listen=Address(host="127.0.0.1", port=0))
        rank = RankStarter(options, ports)(0, callbacks, num_threads=1)
        assert isinstance(rank, RankChild)
        await asyncio.sleep(0.05)
        os.kill(rank.pid, signal.SIGKILL)
        # Before, while and after its end is noticed.
        while not ended.is_set():
            rank.send(control_pb2.ToRank(ping=control_pb2.Ping()))
            await asyncio.sleep(0)
        rank.send(control_pb2.ToRank(ping=control_pb2.Ping()))
        ports.close()

    uvloop.run(work())  # as launchers do; its streams refuse what asyncio's own let pass
