"""The contract of a hand-off transport: one-sided writes from this rank's KV memory into a peer's."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from proto import control_pb2

#: Rows of (source address, target address, bytes).
WriteRuns = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class MemoryRegion:
    """The KV memory that peers may write and that writes are read from. `device` is None for host memory."""

    address: int
    num_bytes: int
    layer_bytes: int
    device: int | None


class Transport(Protocol):
    """Belongs to one thread. A write is under way from `write` until `is_done` says that it is not."""

    def endpoint(self) -> control_pb2.Endpoint:
        """What a peer needs to write here."""
        ...

    def connect(self, endpoint: control_pb2.Endpoint) -> str:
        """Makes a peer known and returns the name that `write` takes."""
        ...

    def disconnect(self, peer: str) -> None:
        """Gives up a peer that no write is under way to."""
        ...

    def write(self, peer: str, runs: WriteRuns, *, target_device: int) -> object:
        """Begins to write every run into the peer's memory and returns a handle."""
        ...

    def is_done(self, handle: object) -> bool:
        """Whether every byte of the write is in the peer's memory; RuntimeError where the write failed."""
        ...

    def progress(self) -> None:
        """Lets writes that peers make into this memory go on; cheap, and called every few milliseconds."""
        ...

    def close(self) -> None:
        """Gives the memory and all peers up; idempotent."""
        ...
