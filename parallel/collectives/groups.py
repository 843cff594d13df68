"""Builds the communicators of one rank: one for each distinct set of ranks it is in, each from its own store prefix.

No default process group is made, so groups of an earlier epoch and of a neighbouring replica do not meet.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from native.library import NativeLibrary
from parallel.collectives.communicator import Channel, CollectiveClock, Communicator, LocalCommunicator
from parallel.collectives.gloo import GlooCommunicator
from parallel.collectives.nccl import NcclCommunicator
from parallel.collectives.shared_memory import SharedMemoryCommunicator, WaitLimits
from parallel.group_memory import GroupMemoryShape, memory_shape
from parallel.shape import MESSAGE_AXES, ReplicaShape

#: What travels point to point along each of MESSAGE_AXES.
_CHANNELS = dict(zip(MESSAGE_AXES, ((Channel.HIDDEN, Channel.TOKENS), (Channel.KV,)), strict=True))


@dataclass(frozen=True, kw_only=True)
class RankGroups:
    """The communicator of each axis of a replica, for one rank."""

    by_axis: Mapping[str, Communicator]

    def __getitem__(self, axis: str) -> Communicator:
        """The communicator along `axis`, one of ReplicaShape.axes."""
        return self.by_axis[axis]

    def close(self) -> None:
        """Ends every group for this rank; idempotent."""
        for communicator in self.by_axis.values():
            communicator.close()


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Where the ranks of a replica meet, and for how long each waits for the others.

    `host_address` is this rank's own host, as peers reach it. `build_timeout_s` bounds the wait for peers that are slow
    to start, `timeout_s` each collective after that.
    """

    store: Store
    device: torch.device
    host_address: str
    build_timeout_s: float
    timeout_s: float


@dataclass(frozen=True, kw_only=True)
class GroupMemories:
    """Of the sets of ranks that share memory, its paths; see SharedMemoryCommunicator.

    `spins` where the ranks that step together have a core each.
    """

    paths: Mapping[tuple[int, ...], str]
    library: NativeLibrary
    spins: bool


def build_groups(
    shape: ReplicaShape,
    *,
    global_rank: int,
    order: Sequence[tuple[int, ...]],
    rendezvous: Rendezvous,
    clock: CollectiveClock,
    memories: GroupMemories | None = None,
) -> RankGroups:
    """Blocking: builds the sets of ranks in `order`, as all their members do, and names them by axis.

    `clock` adds up the time in blocking collectives. Sets of ranks without memory use gloo, or NCCL on GPUs.
    """
    axes_of: dict[tuple[int, ...], list[str]] = {}
    for axis in shape.axes:
        axes_of.setdefault(shape.group_of(global_rank, axis).ranks, []).append(axis)
    by_axis: dict[str, Communicator] = dict.fromkeys(shape.axes, LocalCommunicator())
    for ranks in order:
        builder = _Builder(ranks=ranks, index=ranks.index(global_rank), rendezvous=rendezvous)
        axes = axes_of[ranks]
        if rendezvous.device.type == "cuda":
            channels = [channel for axis in axes for channel in _CHANNELS.get(axis, ())]
            communicator: Communicator = builder.nccl(channels)
        elif memories is not None and ranks in memories.paths:
            communicator = builder.shared_memory(clock, memories=memories, shape=memory_shape(ranks, shape=shape))
        else:
            communicator = builder.gloo(clock)
        by_axis |= dict.fromkeys(axes, communicator)
    return RankGroups(by_axis=by_axis)


@dataclass(frozen=True, kw_only=True)
class _Builder:
    """Makes the communicator of one set of ranks, for the rank at `index` of it."""

    ranks: tuple[int, ...]
    index: int
    rendezvous: Rendezvous

    def gloo(self, clock: CollectiveClock) -> GlooCommunicator:
        """Connects to all others as it is made."""
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        # Named by address: a host's own name may resolve to an interface that its peers cannot reach.
        options._devices = [gloo.create_device(hostname=self.rendezvous.host_address)]
        options._timeout = self._build_timeout
        group = gloo(self._store, self.index, len(self.ranks), options)
        self._bound(group)
        return GlooCommunicator(group, size=len(self.ranks), index=self.index, clock=clock)

    def shared_memory(
        self, clock: CollectiveClock, *, memories: GroupMemories, shape: GroupMemoryShape
    ) -> SharedMemoryCommunicator:
        """Returns when all others have joined."""
        rendezvous = self.rendezvous
        return SharedMemoryCommunicator(
            memories.paths[self.ranks],
            shape=shape,
            index=self.index,
            library=memories.library,
            limits=WaitLimits(
                build_timeout_s=rendezvous.build_timeout_s, timeout_s=rendezvous.timeout_s, spins=memories.spins
            ),
            clock=clock,
        )

    def nccl(self, channels: Sequence[Channel]) -> NcclCommunicator:
        """Collective over its ranks: it is connected when this returns."""
        collectives = self._nccl_group("collectives")
        by_channel = {channel: self._nccl_group(channel.name) for channel in channels}
        communicator = NcclCommunicator(collectives, channels=by_channel, size=len(self.ranks), index=self.index)
        communicator.connect(self.rendezvous.device)
        for group in (collectives, *by_channel.values()):
            self._bound(group)
        return communicator

    def _nccl_group(self, name: str) -> Any:
        nccl: Any = dist.ProcessGroupNCCL
        options = nccl.Options()
        options._timeout = self._build_timeout
        return nccl(PrefixStore(name, self._store), self.index, len(self.ranks), options)

    @property
    def _store(self) -> Store:
        return PrefixStore("-".join(map(str, self.ranks)), self.rendezvous.store)

    @property
    def _build_timeout(self) -> timedelta:
        return timedelta(seconds=self.rendezvous.build_timeout_s)

    def _bound(self, group: Any) -> None:
        """Bounds each collective from now on; the method lost its underscore after torch 2.11."""
        set_timeout = getattr(group, "set_timeout", None) or group._set_default_timeout
        set_timeout(timedelta(seconds=self.rendezvous.timeout_s))
