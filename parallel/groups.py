"""Builds the communicators of one rank: one for each distinct set of ranks it is in, each from its own store prefix.

No default process group is made, so groups of an earlier epoch and of a neighbouring replica do not meet.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from parallel.communicator import CollectiveClock, Communicator, LocalCommunicator
from parallel.gloo import GlooCommunicator
from parallel.nccl import NcclCommunicator
from parallel.shape import ReplicaShape


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


def build_groups(
    shape: ReplicaShape,
    *,
    global_rank: int,
    order: Sequence[tuple[int, ...]],
    store: Store,
    device_kind: str,
    host_address: str,
    build_timeout_s: float,
    timeout_s: float,
    clock: CollectiveClock,
) -> RankGroups:
    """Blocking: builds the sets of ranks in `order`, as all their members do, and names them by axis.

    `build_timeout_s` bounds the wait for peers that are slow to start, `timeout_s` each collective; `clock` adds up
    the time in blocking collectives.
    """
    built: dict[tuple[int, ...], Communicator] = {}
    for ranks in order:
        prefix = PrefixStore("-".join(map(str, ranks)), store)
        index = ranks.index(global_rank)
        timeout = timedelta(seconds=build_timeout_s)
        if device_kind == "cuda":
            make_group = partial(_nccl, prefix, size=len(ranks), index=index, timeout=timeout, timeout_s=timeout_s)
            built[ranks] = NcclCommunicator(make_group, size=len(ranks), index=index)
        else:
            group = _gloo(prefix, size=len(ranks), index=index, timeout=timeout, host_address=host_address)
            _set_timeout(group, timeout_s)
            built[ranks] = GlooCommunicator(group, size=len(ranks), index=index, clock=clock)
    by_axis = {}
    for axis in shape.axes:
        ranks = shape.group_of(global_rank, axis).ranks
        by_axis[axis] = built[ranks] if len(ranks) > 1 else LocalCommunicator()
    return RankGroups(by_axis=by_axis)


def _gloo(store: Store, *, size: int, index: int, timeout: timedelta, host_address: str) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    # Named by address: a host's own name may resolve to an interface that its peers cannot reach.
    options._devices = [gloo.create_device(hostname=host_address)]
    options._timeout = timeout
    return gloo(store, index, size, options)


def _nccl(store: Store, name: str, *, size: int, index: int, timeout: timedelta, timeout_s: float) -> Any:
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timeout
    group = nccl(PrefixStore(name, store), index, size, options)
    _set_timeout(group, timeout_s)
    return group


def _set_timeout(group: Any, timeout_s: float) -> None:
    """Bounds each collective from now on; the method lost its underscore after torch 2.11."""
    set_timeout = getattr(group, "set_timeout", None) or group._set_default_timeout
    set_timeout(timedelta(seconds=timeout_s))
