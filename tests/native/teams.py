"""`python -m tests.native.teams LIBRARY`: the threads and OpenMP libraries of a process that has called every verb.

Prints how many threads there are beside the first, after all verbs and torch's products on one thread, on two, then
on two again from a second thread of the process; and how many OpenMP libraries are loaded.
"""

import os
import sys
import threading
from pathlib import Path

import torch

from native.library import NativeLibrary
from tests.harness.process_usage import openmp_runtimes
from tests.native.sanitized import VERBS
from worker.kernels.torch_kernels import TorchKernels


def num_others() -> int:
    """Threads of this process beside the first."""
    return len(list(Path("/proc/self/task").iterdir())) - 1


def compute(num_threads: int) -> None:
    """Every verb, and what torch has of its own, MKL's and oneDNN's."""
    torch.set_num_threads(num_threads)
    library = NativeLibrary(Path(sys.argv[1]), num_threads=num_threads)
    for verbs in VERBS:
        verbs(library)
    x, weight = torch.ones(300, 400), torch.ones(500, 400)
    assert torch.equal(TorchKernels().linear([weight])(x), x @ weight.T)
    assert float((x + x).sum()) == 2 * x.numel()


def main() -> None:
    compute(1)
    alone = num_others()
    compute(2)
    team = num_others()
    counts = []

    def compute_and_count() -> None:
        compute(2)
        counts.append(num_others() - 1)  # less the thread itself

    second = threading.Thread(target=compute_and_count)
    second.start()
    second.join()
    print(alone, team, *counts, len(openmp_runtimes(os.getpid())))


if __name__ == "__main__":
    main()
