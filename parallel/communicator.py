"""Collectives over one group. A group of one rank has a communicator of its own kind, so that callers never ask.

The groups are c10d backends without a default process group around them; their `_base` collectives on whole tensors
are named alike in torch 2.11 and 2.13, which torch.distributed's own functions are not.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch


class PeerLostError(RuntimeError):
    """A collective failed because another rank is gone or silent: that rank's end is the cause, not this one's."""


class Communicator(Protocol):
    """Collectives over the ranks of one group; all ranks call them in the same order with the same shapes."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    @property
    def index(self) -> int:
        """This rank's place in the group."""
        ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Collective: every rank's x [...] as [size, ...], in order of index."""
        ...

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Collective: x [size, ...]; returns the sum over ranks of their x[index], added in order of index."""
        ...

    def close(self) -> None:
        """Ends the group for this rank; a peer that waits in a collective gets PeerLostError. Idempotent."""
        ...


class CollectiveClock:
    """Adds up the time that a rank spends inside blocking collectives, waiting included, and tells if it is in one."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.is_inside = False
        self._start = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()
        self.is_inside = True

    def __exit__(self, *exc: object) -> None:
        self.seconds += time.perf_counter() - self._start
        self.is_inside = False


class LocalCommunicator:
    """The group of one rank: every collective is a view."""

    size = 1
    index = 0

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """x as [1, ...]."""
        return x.unsqueeze(0)

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """x[0]."""
        return x[0]

    def close(self) -> None:
        """Nothing to end."""


class GlooCommunicator:
    """Collectives on host memory. A reduce-scatter is an all-to-all and a sum: faster than gloo's, in fixed order."""

    def __init__(self, group: Any, *, size: int, index: int, clock: CollectiveClock) -> None:
        self._group = group
        self._clock = clock
        self.size = size
        self.index = index

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Collective: see Communicator."""
        out = x.new_empty((self.size, *x.shape))
        if x.numel():
            with self._clock:
                _run(self._group._allgather_base, out.view(-1), x.reshape(-1))
        return out

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Collective: see Communicator."""
        received = torch.empty_like(x)
        if x.numel():
            with self._clock:
                _run(self._group.alltoall_base, received, x.contiguous(), [], [])
        return received.sum(0)

    def close(self) -> None:
        """See Communicator. A gloo group ends with its last reference: its connections are closed then."""
        self._group = None


class NcclCommunicator:
    """Collectives on device memory."""

    def __init__(self, group: Any, *, size: int, index: int) -> None:
        self._group = group
        self.size = size
        self.index = index

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Collective: see Communicator."""
        out = x.new_empty((self.size, *x.shape))
        _run(self._group._allgather_base, out.view(-1), x.reshape(-1))
        return out

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Collective: see Communicator. NCCL's ring adds in an order fixed by the group's size."""
        out = torch.empty_like(x[0])
        _run(self._group._reduce_scatter_base, out, x.contiguous())
        return out

    def close(self) -> None:
        """See Communicator."""
        if self._group is not None:
            self._group.abort()
            self._group = None


def _run(collective: Callable[..., Any], *arguments: object) -> None:
    """Runs a collective and waits for it: on the host for gloo, on the device's stream for NCCL."""
    try:
        collective(*arguments).wait()
    except RuntimeError as error:
        raise PeerLostError(str(error).splitlines()[0]) from error
