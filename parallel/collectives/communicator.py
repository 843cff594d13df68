"""Collectives over one group: the contract, and the group of one rank, so that callers never ask for its size.

Those of more ranks are in `gloo.py` and `nccl.py`.
"""

import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Protocol

import torch

from parallel.link import Link


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

    @property
    def link(self) -> Link:
        """Over what its ranks meet: the same on all of them."""
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
    link = Link.SHARED_MEMORY  # its own

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
