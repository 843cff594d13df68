"""The memory that the ranks of a group on one host share: who has some, its size, and the file that holds it.

Pure but for the file. What lies where in it is in `native/src/group_memory.h`.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from parallel.link import Link
from parallel.shape import MESSAGE_AXES, ReplicaShape

_LINE = 128
_CHANNELS = 3
#: Of a group that shares memory.
MAX_RANKS = 64


@dataclass(frozen=True, kw_only=True)
class GroupMemoryShape:
    """The memory of a group of `size` ranks, for collectives and, where it `has_messages`, for those of two ranks.

    A collective goes in rounds of `outbox_bytes` a rank; each rank has two outboxes. A message between two ranks goes
    in pieces of `slot_bytes`; each rank has `num_slots` of them under way. ValueError where a size cannot be.
    """

    size: int
    has_messages: bool = True
    outbox_bytes: int = 512 << 10
    slot_bytes: int = 128 << 10

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MAX_RANKS:
            raise ValueError(f"a group of {self.size} ranks shares no memory: 1 to {MAX_RANKS} can")
        if self.outbox_bytes % _LINE or self.outbox_bytes < self.size * _LINE:
            raise ValueError(
                f"outbox_bytes {self.outbox_bytes} of {self.size} ranks: it is a multiple of {_LINE}, "
                f"{self.size * _LINE} at least"
            )
        if self.slot_bytes % _LINE or self.slot_bytes < _LINE:
            raise ValueError(f"slot_bytes {self.slot_bytes}: it is a multiple of {_LINE}, and not 0")

    @property
    def num_slots(self) -> int:
        """One for each kind of message to each other rank, and as many as may be under way before a send waits."""
        if not self.has_messages:
            return 0
        return _CHANNELS * (self.size - 1) + max_sends(self.size)

    @property
    def num_bytes(self) -> int:
        """Of the whole memory."""
        members = self.size * 3 * _LINE
        pipe = 2 * _LINE + _rounded(16 * self.num_slots)
        outbox = _rounded(8 * (MAX_RANKS + 1)) + self.outbox_bytes
        pipes = _CHANNELS * self.size**2 * pipe
        return members + pipes + self.size * (2 * outbox + self.num_slots * self.slot_bytes)


def memory_shape(ranks: tuple[int, ...], *, shape: ReplicaShape) -> GroupMemoryShape:
    """That of a set of a replica's ranks. Messages grow with the square of its size, and few axes have any."""
    has_messages = any(shape.group_of(ranks[0], axis).ranks == ranks for axis in MESSAGE_AXES)
    return GroupMemoryShape(size=len(ranks), has_messages=has_messages)


def max_sends(size: int) -> int:
    """Sends of a rank that may be under way: more than a pipeline of `size` stages leaves unreceived while it idles."""
    return 4 * size + 8


def local_groups(groups: Iterable[tuple[int, ...]], *, hosts: Mapping[int, str]) -> list[tuple[int, ...]]:
    """The sets of ranks among `groups` that share memory, each once: those whose ranks all have one host in `hosts`."""
    return sorted({ranks for ranks in groups if 1 < len(ranks) <= MAX_RANKS and _has_one_host(ranks, hosts)})


def may_share(*, device: str, kernels: str) -> bool:
    """Whether ranks on devices of that kind may meet in their host's memory, where its launcher has native kernels."""
    return device == "cpu" and kernels != "torch"


def link_of(ranks: tuple[int, ...], *, hosts: Mapping[int, str], device: str, kernels: str) -> Link:
    """Over what the ranks of a group meet, where the launchers have native kernels: what each of its ranks is told by
    its own launcher, which holds all of them or not.
    """
    if device != "cpu":
        return Link.NCCL
    is_shared = may_share(device=device, kernels=kernels) and bool(local_groups([ranks], hosts=hosts))
    return Link.SHARED_MEMORY if is_shared else Link.GLOO


def _has_one_host(ranks: tuple[int, ...], hosts: Mapping[int, str]) -> bool:
    host = hosts.get(ranks[0])
    return host is not None and all(hosts.get(rank) == host for rank in ranks)


def allocate_group_memory(shape: GroupMemoryShape) -> int:
    """A file descriptor of memory for `shape`, without a name, closed when a program is started. OSError where the
    system has not as much: now, and not by a signal in the middle of a step.
    """
    descriptor = os.memfd_create("muster-group", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(descriptor, 0, shape.num_bytes)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // _LINE) * _LINE
