"""The threads and cores of this process, which change with its assignments."""

import contextlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from proto import control_pb2

logger = logging.getLogger(__name__)

_TASKS = Path("/proc/self/task")


class ProcessCores:
    """What the process may use when this is made is what it goes back to where an assignment keeps it to nothing."""

    def __init__(self) -> None:
        self._all = os.sched_getaffinity(0)

    def take(self, given: control_pb2.Cores) -> None:
        """Threads of the calls that follow, of torch and of native kernels, and the cores of every thread there is.

        Memory is not asked for anywhere: the system gives it on the node of the thread that touches it first. Where the
        cores cannot be had, it is a warning, for what is near is only faster.
        """
        torch.set_num_threads(given.num_threads)
        logger.info("threads=%d cores=%s", given.num_threads, list(given.cores) or "any")
        wanted = set(given.cores) or self._all
        if wanted == os.sched_getaffinity(0):
            return
        try:
            _keep_to(wanted)
        except OSError as error:
            logger.warning("not kept to cores %s: %s", sorted(wanted), error.strerror)


def _keep_to(cores: Iterable[int]) -> None:
    """The calling thread first: threads that it starts meanwhile are kept too."""
    os.sched_setaffinity(0, cores)
    for task in list(_TASKS.iterdir()):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(task.name), cores)
