"""How a rank's process is started: the threads that it may use."""

import asyncio
import os
from pathlib import Path

import pytest

from parallel.process.address import Address
from worker.launcher.rank_child import RankChild
from worker.launcher.rank_handle import RankCallbacks
from worker.launcher.rendezvous import RendezvousPorts
from worker.launcher.server import LauncherOptions, RankStarter


async def environment_of_a_rank(*, num_threads: int | None, machine_ranks: int) -> dict[str, str]:
    """What the process of a rank was started with; it is ended at once."""
    ports = RendezvousPorts("127.0.0.1")
    options = LauncherOptions(listen=Address(host="127.0.0.1", port=0), num_threads=num_threads)
    callbacks = RankCallbacks(message=lambda message: None, ended=lambda reason: None)
    rank = RankStarter(options, ports, machine_ranks=machine_ranks)(0, callbacks)
    assert isinstance(rank, RankChild)
    try:
        # Empty for a moment: the kernel lays it out after the parent has heard that the program was found.
        while not (text := Path(f"/proc/{rank.pid}/environ").read_text()):
            await asyncio.sleep(0.01)
    finally:
        await rank.stop()
        ports.close()
    return dict(item.split("=", 1) for item in text.split("\0") if item)


@pytest.mark.parametrize(
    ("given", "machine_ranks", "inherited", "threads"),
    [
        (None, 1, None, 5),
        (None, 2, None, 2),
        (None, 9, None, 1),
        (None, 2, "7", 7),  # the operator's own word for every program
        (3, 2, "7", 3),  # and for this one
    ],
)
def test_a_ranks_threads_are_its_share_of_the_cores_that_its_launcher_may_use(
    given: int | None, machine_ranks: int, inherited: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(5)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if inherited is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", inherited)
    found = asyncio.run(environment_of_a_rank(num_threads=given, machine_ranks=machine_ranks))
    assert found["OMP_NUM_THREADS"] == str(threads)
