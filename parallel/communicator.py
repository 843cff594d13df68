"""Collectives over one group. A group of one rank has a communicator of its own kind, so that callers never ask.

The groups are c10d backends without a default process group around them; their `_base` collectives on whole tensors
are named alike in torch 2.11 and 2.13, which torch.distributed's own functions are not.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import partial
from typing import Any, Protocol

import torch


class PeerLostError(RuntimeError):
    """A collective failed because another rank is gone or silent: that rank's end is the cause, not this one's."""


class Channel(IntEnum):
    """What travels point to point. Each kind has an order of its own: a message waits only for those of its kind."""

    HIDDEN = 0
    TOKENS = 1
    KV = 2


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

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """Collective: x [size, ...], x[i] for rank i; returns [size, ...], entry i from rank i."""
        ...

    def all_to_all_uneven(self, x: torch.Tensor, *, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """Collective: the rows of x [N, ...] part by part, sent[i] of them to rank i; received[i] come from rank i."""
        ...

    def send(self, x: torch.Tensor, *, to: int, channel: Channel) -> None:
        """Sends x to the rank at index `to`; returns before it has arrived, x must not change until it has."""
        ...

    def receive(self, out: torch.Tensor, *, source: int, channel: Channel) -> torch.Tensor:
        """Fills `out`, contiguous, with what the rank at index `source` sends next on `channel`, and returns it."""
        ...

    def begin_shift(self, x: torch.Tensor, out: torch.Tensor, *, distance: int) -> Callable[[], torch.Tensor]:
        """Begins to send x to the rank `distance` further round the group and to fill `out` from the one before.

        Collective: shifts run in the order of their begin. Returns what waits until `out` is there, and gives it.
        """
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

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """x."""
        return x

    def all_to_all_uneven(self, x: torch.Tensor, *, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """x."""
        del sent, received
        return x

    def send(self, x: torch.Tensor, *, to: int, channel: Channel) -> None:
        """Nobody to send to."""
        raise AssertionError(f"a group of one rank has no rank {to}")

    def receive(self, out: torch.Tensor, *, source: int, channel: Channel) -> torch.Tensor:
        """Nobody to receive from."""
        raise AssertionError(f"a group of one rank has no rank {source}")

    def begin_shift(self, x: torch.Tensor, out: torch.Tensor, *, distance: int) -> Callable[[], torch.Tensor]:
        """x."""
        del out, distance
        return lambda: x

    def close(self) -> None:
        """Nothing to end."""


#: Sends that may be under way: more than a pipeline's steps in flight, so that waiting for the oldest is no wait.
_MAX_SENDS = 16


class GlooCommunicator:
    """Collectives on host memory. A reduce-scatter is an all-to-all and a sum: faster than gloo's, in fixed order."""

    def __init__(self, group: Any, *, size: int, index: int, clock: CollectiveClock) -> None:
        self._group = group
        self._clock = clock
        self._sends: deque[tuple[Any, torch.Tensor]] = deque()
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
        return self.all_to_all(x).sum(0)

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """Collective: see Communicator."""
        received = x.new_empty(x.shape)
        if x.numel():
            with self._clock:
                _run(self._group.alltoall_base, received, x.contiguous(), [], [])
        return received

    def all_to_all_uneven(self, x: torch.Tensor, *, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """Collective: see Communicator."""
        out = x.new_empty((sum(received), *x.shape[1:]))
        with self._clock:
            _run(self._group.alltoall_base, out, x.contiguous(), list(received), list(sent))
        return out

    def send(self, x: torch.Tensor, *, to: int, channel: Channel) -> None:
        """See Communicator."""
        if not x.numel():
            return
        while len(self._sends) >= _MAX_SENDS:
            self._wait(self._sends.popleft()[0])
        x = x.contiguous()
        self._sends.append((_begin(self._group.send, [x], to, channel), x))

    def receive(self, out: torch.Tensor, *, source: int, channel: Channel) -> torch.Tensor:
        """See Communicator."""
        if out.numel():
            self._wait(_begin(self._group.recv, [out], source, channel))
        return out

    def begin_shift(self, x: torch.Tensor, out: torch.Tensor, *, distance: int) -> Callable[[], torch.Tensor]:
        """See Communicator."""
        x, works = x.contiguous(), []
        if out.numel():
            works.append(_begin(self._group.recv, [out], (self.index - distance) % self.size, Channel.KV))
        if x.numel():
            works.append(_begin(self._group.send, [x], (self.index + distance) % self.size, Channel.KV))
        return partial(self._finish_shift, works, x, out)

    def _finish_shift(self, works: list[Any], x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        del x  # was held until here: it must not be freed before it has left
        for work in works:
            self._wait(work)
        return out

    def _wait(self, work: Any) -> None:
        with self._clock:
            _finish(work)

    def close(self) -> None:
        """See Communicator. A gloo group ends with its last reference: its connections are closed then."""
        self._sends.clear()
        self._group = None


class NcclCommunicator:
    """Collectives on device memory. `make_group(name)` makes a group of the same ranks.

    NCCL runs what one group is asked for in order, so messages that may overtake each other have groups of their own,
    made when first used.
    """

    def __init__(self, make_group: Callable[[str], Any], *, size: int, index: int) -> None:
        self._make_group = make_group
        self._groups: dict[str, Any] = {"collectives": make_group("collectives")}
        self.size = size
        self.index = index

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Collective: see Communicator."""
        out = x.new_empty((self.size, *x.shape))
        _run(self._group()._allgather_base, out.view(-1), x.reshape(-1))
        return out

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Collective: see Communicator. NCCL's ring adds in an order fixed by the group's size."""
        out = torch.empty_like(x[0])
        _run(self._group()._reduce_scatter_base, out, x.contiguous())
        return out

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """Collective: see Communicator."""
        received = x.new_empty(x.shape)
        _run(self._group().alltoall_base, received, x.contiguous(), [], [])
        return received

    def all_to_all_uneven(self, x: torch.Tensor, *, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """Collective: see Communicator."""
        out = x.new_empty((sum(received), *x.shape[1:]))
        _run(self._group().alltoall_base, out, x.contiguous(), list(received), list(sent))
        return out

    def send(self, x: torch.Tensor, *, to: int, channel: Channel) -> None:
        """See Communicator: ordered on the group's own stream, which keeps x until it has left."""
        _begin(self._group(channel.name).send, [x.contiguous()], to, 0)

    def receive(self, out: torch.Tensor, *, source: int, channel: Channel) -> torch.Tensor:
        """See Communicator: the current stream waits, not the host."""
        _run(self._group(channel.name).recv, [out], source, 0)
        return out

    def begin_shift(self, x: torch.Tensor, out: torch.Tensor, *, distance: int) -> Callable[[], torch.Tensor]:
        """See Communicator. Both halves are one NCCL call: apart, ranks in a circle would wait for each other."""
        group, x = self._group(Channel.KV.name), x.contiguous()
        group._start_coalescing(x.device)
        if x.numel():
            _begin(group.send, [x], (self.index + distance) % self.size, 0)
        if out.numel():
            _begin(group.recv, [out], (self.index - distance) % self.size, 0)
        return partial(_finish_shift, group._end_coalescing(x.device), x, out)

    def _group(self, name: str = "collectives") -> Any:
        if name not in self._groups:
            self._groups[name] = self._make_group(name)
        return self._groups[name]

    def close(self) -> None:
        """See Communicator."""
        for group in self._groups.values():
            group.abort()
        self._groups = {}


def _finish_shift(work: Any, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    del x  # was held until here: it must not be freed before it has left
    _finish(work)
    return out


def _run(collective: Callable[..., Any], *arguments: object) -> None:
    """Runs a collective and waits for it: on the host for gloo, on the device's stream for NCCL."""
    _finish(_begin(collective, *arguments))


def _begin(collective: Callable[..., Any], *arguments: object) -> Any:
    try:
        return collective(*arguments)
    except RuntimeError as error:
        raise PeerLostError(str(error).splitlines()[0]) from error


def _finish(work: Any) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        raise PeerLostError(str(error).splitlines()[0]) from error
