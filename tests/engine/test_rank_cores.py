"""Threads and cores of a living rank: each epoch's are its own, and no thread is made that is not one of them."""

import os
import re
from pathlib import Path

import pytest

from parallel.cores import RankCores
from tests.harness.checkpoints import Oracle
from tests.harness.epochs import PROMPT, Replica, assign, running_launcher
from tests.harness.process_usage import openmp_runtimes
from tests.harness.router_process import rank_pids

NUM_TOKENS = 6
ONE_CORE = min(os.sched_getaffinity(0))
EPOCHS = (
    RankCores(num_threads=1),
    RankCores(num_threads=2, nodes=(0,), cores=(ONE_CORE,)),
    RankCores(num_threads=1),
    RankCores(num_threads=2),
)


def cores_of_threads(pid: int) -> set[str]:
    """The lists of cores that the threads of a process may use."""
    status = [(task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return {line.split()[1] for text in status for line in text.splitlines() if line.startswith("Cpus_allowed_list:")}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_every_thread_of_a_rank_follows_its_epoch_and_one_team_is_all_that_is_made(
    kernels: str, mixtral: Oracle
) -> None:
    """A second runtime, or a native call from a second thread, would make a second team of two."""
    wanted = list(mixtral.answer(PROMPT, 64).token_ids[:NUM_TOKENS])
    (anywhere,) = cores_of_threads(os.getpid())
    counts: list[int] = []
    with running_launcher(mixtral) as (stub, ports, command):
        for epoch, cores in enumerate(EPOCHS, 1):
            assign(stub, ports, mixtral, epoch=epoch, dp=1, cores={0: cores}, kernels=kernels)
            replica = Replica(stub, epoch=epoch)
            replica.submit(epoch, count=NUM_TOKENS)
            assert replica.tokens(epoch) == wanted
            (pid,) = rank_pids(command.pid)
            assert cores_of_threads(pid) == {str(ONE_CORE) if cores.cores else anywhere}
            assert re.findall(r"threads=(\d+) cores=", command.output)[-1] == str(cores.num_threads)
            counts.append(len(list(Path(f"/proc/{pid}/task").iterdir())))
            assert len(openmp_runtimes(pid)) == 1
            replica.close()
    alone, first_team, _, second_team = counts
    assert (first_team, second_team) == (alone + 1, alone + 1), counts
