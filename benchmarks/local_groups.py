"""Processes of this machine that meet twice: over gloo and in shared memory, so that both are measured in turn."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from native.build import Build
from native.library import NativeLibrary
from parallel.collectives.communicator import CollectiveClock, Communicator
from parallel.collectives.gloo import GlooCommunicator
from parallel.collectives.shared_memory import SharedMemoryCommunicator, WaitLimits
from parallel.group_memory import GroupMemoryShape, allocate_group_memory
from parallel.link import Link
from parallel.process.cores import available_cores
from worker.launcher.rank_child import KEPT_MEMORY

TIMEOUT_S = 120.0

#: What a rank runs: its group over each link; what it returns goes home.
Work = Callable[[Mapping[Link, Communicator]], Any]


def run_ranks(size: int, work: Work) -> list[Any]:
    """What each of `size` processes of one thread returns, in order of index. `work` must be picklable."""
    Build().make()
    os.environ.update(KEPT_MEMORY)  # as ranks have it: what a call frees is not given back and faulted in again
    context = multiprocessing.get_context("spawn")
    descriptor = allocate_group_memory(GroupMemoryShape(size=size))
    memory = f"/proc/{os.getpid()}/fd/{descriptor}"
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        processes = [
            context.Process(target=_run_rank, args=(work, size, index, memory, folder, there), daemon=True)
            for index, (_, there) in enumerate(pipes)
        ]
        try:
            for process, (_, there) in zip(processes, pipes, strict=True):
                process.start()
                there.close()
            return [here.recv() for here, _ in pipes]
        finally:
            for process in processes:
                process.join(10)
                process.kill()
            os.close(descriptor)


def load_native() -> NativeLibrary:
    """The library that was built before the ranks were started, for one thread."""
    path = Build().find()
    assert path is not None, "the native library is not built"
    return NativeLibrary(path)


def _run_rank(work: Work, size: int, index: int, memory: str, folder: str, results: Connection) -> None:
    torch.set_num_threads(1)
    groups: dict[Link, Communicator] = {
        Link.GLOO: _join_gloo(size, index, str(Path(folder) / "store")),
        Link.SHARED_MEMORY: _join_memory(size, index, memory),
    }
    found = work(groups)
    groups[Link.SHARED_MEMORY].all_gather(torch.zeros(1))  # nobody leaves while another still measures
    results.send(found)


def _join_gloo(size: int, index: int, store: str) -> Communicator:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=TIMEOUT_S)
    group = gloo(FileStore(store, size), index, size, options)
    return GlooCommunicator(group, size=size, index=index, clock=CollectiveClock())


def _join_memory(size: int, index: int, memory: str) -> Communicator:
    return SharedMemoryCommunicator(
        memory,
        shape=GroupMemoryShape(size=size),
        index=index,
        library=load_native(),
        limits=WaitLimits(build_timeout_s=TIMEOUT_S, timeout_s=TIMEOUT_S, spins=size <= available_cores()),
        clock=CollectiveClock(),
    )
