"""The contract of a hand-off transport: one-sided writes from a source rank's KV memory into a target's."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from proto import control_pb2

#: Rows of (source address, target address, bytes).
WriteRuns = npt.NDArray[np.uint64]


class WriteFailedError(RuntimeError):
    """A write that has ended without being whole, or could not begin; the text says why. Nobody's end by itself."""


@dataclass(frozen=True, kw_only=True)
class MemoryRegion:
    """The KV memory that peers may write, or that writes are read from. `device` is None for host memory; `groups` say
    what lies where in it.
    """

    address: int
    num_bytes: int
    device: int | None
    groups: tuple[control_pb2.GroupMemory, ...] = ()


class PeerEpoch(NamedTuple):
    """A replica of the other pool in one epoch."""

    replica: str
    epoch: int


class SourceTransport(Protocol):
    """The writing side. Belongs to one thread. A write is under way from `write` until `is_done` has told its end."""

    def connect(self, endpoint: control_pb2.Endpoint) -> str:
        """Makes a target rank known and returns the name that `write` takes; WriteFailedError where it is none."""
        ...

    def disconnect(self, peer: str) -> None:
        """Gives up a target; writes to it that are under way are given up with it."""
        ...

    def write(self, peer: str, runs: WriteRuns, *, target_device: int) -> object:
        """Begins to write every run into the target's memory and returns a handle; WriteFailedError where it cannot."""
        ...

    def is_done(self, handle: object) -> bool:
        """Whether every byte of the write is in the target's memory; WriteFailedError, once, where it has failed: its
        source is not read any more, but what has left may still land.
        """
        ...

    def close(self) -> None:
        """Gives up all targets: nothing reads the memory any more. Idempotent."""
        ...


class TargetTransport(Protocol):
    """The side that is written to: one endpoint for each writer. Belongs to one thread."""

    def open(self, writer: PeerEpoch) -> control_pb2.Endpoint:
        """What the ranks of `writer`, and nobody else, need to write here; made anew where there was one."""
        ...

    def close_writer(self, writer: PeerEpoch) -> None:
        """Tears down what `writer` was connected to: when this returns nothing of it lands any more. Idempotent."""
        ...

    def progress(self) -> None:
        """Lets writes into this memory go on; cheap, and called every few milliseconds."""
        ...

    def close(self) -> None:
        """Closes every writer; idempotent."""
        ...
