"""What a launcher needs of a rank, be it a process or a mock."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from proto import control_pb2


@dataclass(frozen=True, kw_only=True)
class RankCallbacks:
    """Where a rank's messages go, and the sentence that says how it ended."""

    message: Callable[[control_pb2.FromRank], None]
    ended: Callable[[str], None]


class RankHandle(Protocol):
    """One rank of this host, alive from its start until `ended` was called back."""

    def send(self, message: control_pb2.ToRank) -> None:
        """Queues a message for the rank; one for a rank that has ended is dropped."""
        ...

    async def stop(self) -> None:
        """Ends the rank at once and waits until it is gone; idempotent."""
        ...


class StartRank(Protocol):
    """Starts the rank of a device."""

    def __call__(self, device: int, callbacks: RankCallbacks, *, num_threads: int) -> RankHandle:
        """The running rank. It is started with as many threads as its first assignment gives it."""
        ...
