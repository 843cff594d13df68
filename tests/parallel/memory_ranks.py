"""Ranks as processes that meet in shared memory: what each of them runs is a function of a test's module.

They are forked from a server that has imported torch and nothing else, so that many start in little time.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from native.build import Build
from native.library import NativeLibrary
from parallel.collectives.communicator import CollectiveClock
from parallel.collectives.shared_memory import SharedMemoryCommunicator, WaitLimits
from parallel.group_memory import GroupMemoryShape, allocate_group_memory

#: So little that most of what tests send goes in pieces.
SMALL = {"outbox_bytes": 2048, "slot_bytes": 512}


@dataclass(frozen=True, kw_only=True)
class Seat:
    """One rank's way into a group: picklable."""

    shape: GroupMemoryShape
    index: int
    memory: str
    timeout_s: float
    spins: bool = False

    def join(self, clock: CollectiveClock | None = None, *, build_timeout_s: float = 30) -> SharedMemoryCommunicator:
        """Collective."""
        path = Build().find()
        assert path is not None, "built by whoever made the seat"
        return SharedMemoryCommunicator(
            self.memory,
            shape=self.shape,
            index=self.index,
            library=NativeLibrary(path),
            limits=WaitLimits(build_timeout_s=build_timeout_s, timeout_s=self.timeout_s, spins=self.spins),
            clock=clock or CollectiveClock(),
        )


class Ranks:
    """The processes of one group, started; each sends what its function returns."""

    def __init__(self, work: Callable[..., Any], seats: list[Seat], arguments: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "numpy"])
        self.processes = []
        self._answers: list[Connection] = []
        for seat in seats:
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(work, seat, theirs, arguments), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self._answers.append(mine)

    def answer(self, index: int, *, within_s: float = 60) -> Any:
        """Blocking: what the rank's function sends next, or returns at last."""
        assert self._answers[index].poll(within_s), f"rank {index} has said nothing for {within_s} s"
        return self._answers[index].recv()

    def end(self) -> None:
        """Ends and reaps every process."""
        for process in self.processes:
            process.kill()
            process.join(30)
            assert process.exitcode is not None


@contextmanager
def seats(size: int, *, timeout_s: float = 60, spins: bool = False, **sizes: Any) -> Iterator[list[Seat]]:
    """Memory for a group, and the seats of its ranks."""
    Build().make()
    shape = GroupMemoryShape(size=size, **sizes)
    descriptor = allocate_group_memory(shape)
    memory = f"/proc/{os.getpid()}/fd/{descriptor}"
    try:
        yield [Seat(shape=shape, index=index, memory=memory, timeout_s=timeout_s, spins=spins) for index in range(size)]
    finally:
        os.close(descriptor)


@contextmanager
def ranks(work: Callable[..., Any], size: int, *arguments: Any, **options: Any) -> Iterator[Ranks]:
    """Runs work(seat, say, *arguments) on each of `size` ranks; `say` sends an answer. For `options` see `seats`."""
    with seats(size, **options) as places:
        started = Ranks(work, places, arguments)
        try:
            yield started
        finally:
            started.end()


def on_ranks(work: Callable[..., Any], size: int, *arguments: Any, **options: Any) -> list[Any]:
    """What work(seat, say, *arguments) returns on each of `size` ranks."""
    with ranks(work, size, *arguments, **options) as started:
        return [started.answer(index) for index in range(size)]


def pattern(num_bytes: int, *, seed: int) -> torch.Tensor:
    """Random bytes, the same in every process."""
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def _run(work: Callable[..., Any], seat: Seat, answers: Connection, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    answers.send(work(seat, answers.send, *arguments))
    time.sleep(60)  # until it is ended: a rank that has gone is another matter
