"""Memory for the groups of a replica whose ranks this launcher all holds, from assignment to the end of the epoch.

A rank opens it by the launcher's process and descriptor, so it has no name that could be left behind.
"""

import logging
import os

from native.build import Build
from native.library import NativeLibrary
from parallel.group_memory import allocate_group_memory, local_groups, memory_shape
from parallel.wire import shape_from_wire
from proto import control_pb2
from worker.launcher.native_build import may_load_native

logger = logging.getLogger(__name__)


def find_local_groups(request: control_pb2.AssignRequest) -> list[tuple[int, ...]]:
    """The groups all of whose ranks `request` names, each once."""
    groups = (tuple(group.ranks) for given in request.ranks for group in given.groups)
    return local_groups(groups, hosts={given.global_rank: "here" for given in request.ranks})


class GroupMemories:
    """The memories of one epoch of a replica; none where its ranks use other groups."""

    def __init__(self, request: control_pb2.AssignRequest) -> None:
        """Without memory the ranks meet over gloo: where there is none it is a warning. ValueError where the sizes of
        `request` are no shape.
        """
        self._descriptors: dict[tuple[int, ...], int] = {}
        if not _can_share(request):
            return
        try:
            shape = shape_from_wire(request.sizes)
            for ranks in find_local_groups(request):
                self._descriptors[ranks] = allocate_group_memory(memory_shape(ranks, shape=shape))
        except OSError as error:
            logger.warning("no memory for the groups of %s, they use gloo: %s", request.replica, error.strerror)
            self.close()

    def of_rank(self, global_rank: int) -> list[control_pb2.SharedGroup]:
        """The groups with memory that a rank is in."""
        return [
            control_pb2.SharedGroup(ranks=ranks, path=f"/proc/{os.getpid()}/fd/{descriptor}")
            for ranks, descriptor in self._descriptors.items()
            if global_rank in ranks
        ]

    def close(self) -> None:
        """Ranks that have opened their memory keep it; idempotent."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


def _can_share(request: control_pb2.AssignRequest) -> bool:
    """On a GPU nothing is shared through the host's memory, and without the library nobody could."""
    if not may_load_native(request):
        return False
    path = Build().find()
    try:
        return path is not None and NativeLibrary(path).lanes() > 0
    except OSError as error:  # built, but in a folder that nothing may run from, say: ranks find the same
        logger.warning("no memory for the groups of %s, they use gloo: %s", request.replica, error)
        return False
