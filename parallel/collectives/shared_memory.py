"""Collectives over memory that the ranks of one host share, on host memory: copies, and no calls of the system.

The memory is made before the ranks meet in it (`parallel/group_memory.py`); what happens in it is C++
(`native/src/collectives.cpp`).
"""

import ctypes
import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from native.library import GroupShape, NativeLibrary, WaitEnd, wait_end
from parallel.collectives.communicator import Channel, CollectiveClock, PeerLostError
from parallel.group_memory import GroupMemoryShape, max_sends
from parallel.link import Link

#: How long a wait keeps its core where there is one for each rank that steps together.
_SPIN_US = 30


@dataclass(frozen=True, kw_only=True)
class WaitLimits:
    """For how long a rank waits for others: `build_timeout_s` until all have joined, `timeout_s` after that.

    `spins` where the ranks that step together have a core each: a wait then keeps its own for a moment.
    """

    build_timeout_s: float
    timeout_s: float
    spins: bool


@dataclass(eq=False)
class _Sent:
    """A message that may not have left yet: the tensor is held until it has."""

    x: torch.Tensor
    to: int
    is_moved: ctypes.c_int32 = field(default_factory=ctypes.c_int32)


@dataclass(eq=False)
class _Shift:
    """What a shift still has to fill."""

    out: torch.Tensor
    source: int
    is_done: bool = False


class SharedMemoryCommunicator:
    """Collectives on host memory between processes of one host. Its results have the bits of GlooCommunicator's."""

    link = Link.SHARED_MEMORY

    def __init__(
        self,
        memory: int | str,
        *,
        shape: GroupMemoryShape,
        index: int,
        library: NativeLibrary,
        limits: WaitLimits,
        clock: CollectiveClock,
    ) -> None:
        """Collective: returns when all ranks have joined, PeerLostError where one does not.

        `memory` is a file descriptor or a path of what `allocate_group_memory(shape)` gave, and needed no longer.
        """
        self._calls = library.group
        self._clock = clock
        self._shifts: deque[_Shift] = deque()
        self._has_messages = shape.has_messages
        self.size = shape.size
        self.index = index
        self._member: _Member | None = _Member(memory, shape=shape, index=index, library=library, limits=limits)
        try:
            self._run(self._calls.meet, limits.build_timeout_s)
        except PeerLostError:
            self.close()
            raise

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Collective: see Communicator."""
        x = x.contiguous()
        out = x.new_empty((self.size, *x.shape))
        self._run(self._calls.all_gather, x.data_ptr(), out.data_ptr(), x.nbytes)
        return out

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Collective: see Communicator."""
        if x.dtype != torch.float32:
            return self.all_to_all(x).sum(0)
        x = x.contiguous()
        out = x.new_empty(x.shape[1:])
        self._run(self._calls.reduce_scatter, x.data_ptr(), out.data_ptr(), out.numel())
        return out

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """Collective: see Communicator."""
        x = x.contiguous()
        out = x.new_empty(x.shape)
        self._run(self._calls.all_to_all, x.data_ptr(), out.data_ptr(), x.nbytes // self.size)
        return out

    def all_to_all_uneven(self, x: torch.Tensor, *, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """Collective: see Communicator."""
        x = x.contiguous()
        out = x.new_empty((sum(received), *x.shape[1:]))
        row_bytes = x.shape[1:].numel() * x.element_size()
        counts = (self._bytes(rows, row_bytes) for rows in (sent, received))
        self._run(self._calls.all_to_all_uneven, x.data_ptr(), out.data_ptr(), *counts)
        return out

    def send(self, x: torch.Tensor, *, to: int, channel: Channel) -> None:
        """See Communicator."""
        if not x.numel():
            return
        while len(kept := self._present.kept()) >= max_sends(self.size):
            self._run(self._calls.await_moved, kept[0].is_moved, kept[0].to)
        self._send(x, to=to, channel=channel)

    def receive(self, out: torch.Tensor, *, source: int, channel: Channel) -> torch.Tensor:
        """See Communicator."""
        while channel is Channel.KV and self._shifts:
            self._fill(self._shifts.popleft())
        if out.numel():
            self._run(self._calls.receive, out.data_ptr(), out.nbytes, source, int(channel))
        return out

    def begin_shift(self, x: torch.Tensor, out: torch.Tensor, *, distance: int) -> Callable[[], torch.Tensor]:
        """See Communicator."""
        if x.numel():
            self._send(x, to=(self.index + distance) % self.size, channel=Channel.KV)
        shift = _Shift(out, (self.index - distance) % self.size)
        self._shifts.append(shift)
        return partial(self._finish_shift, shift)

    def close(self) -> None:
        """See Communicator. From another thread it ends this rank's own wait too."""
        member, self._member = self._member, None
        if member is not None:
            self._calls.leave(member.handle)

    @property
    def _present(self) -> "_Member":
        member = self._member
        if member is None:
            raise PeerLostError("this rank has closed the group")
        return member

    def _finish_shift(self, shift: _Shift) -> torch.Tensor:
        while not shift.is_done:
            self._fill(self._shifts.popleft())
        return shift.out

    def _fill(self, shift: _Shift) -> None:
        if shift.out.numel():
            out = shift.out
            self._run(self._calls.receive, out.data_ptr(), out.nbytes, shift.source, int(Channel.KV))
        shift.is_done = True

    def _send(self, x: torch.Tensor, *, to: int, channel: Channel) -> None:
        assert self._has_messages, "nothing is sent along the axes of this group: its memory has no room for it"
        member = self._present
        sent = member.hold(x.contiguous(), to=to)
        address, num_bytes = sent.x.data_ptr(), sent.x.nbytes
        self._check(self._calls.send(member.handle, address, num_bytes, to, int(channel), sent.is_moved))

    def _bytes(self, rows: Sequence[int], row_bytes: int) -> "ctypes.Array[ctypes.c_int64]":
        return (ctypes.c_int64 * self.size)(*(count * row_bytes for count in rows))

    def _run(self, call: Callable[..., int], *arguments: object) -> None:
        member = self._present  # held until the call has ended, whoever closes meanwhile
        with self._clock:
            result = call(member.handle, *arguments)
        self._check(result)

    def _check(self, result: int) -> None:
        end, rank = wait_end(result)
        if end is WaitEnd.DONE:
            return
        if end is WaitEnd.UNEQUAL:
            raise AssertionError(f"ranks {self.index} and {rank} of the group gave sizes that do not fit")
        raise PeerLostError(
            {
                WaitEnd.LOST: f"rank {rank} of the group of {self.size} is gone",
                WaitEnd.SILENT: f"rank {rank} of the group of {self.size} is silent",
                WaitEnd.CLOSED: "this rank has closed the group",
            }[end]
        )


class _Member:
    """This rank's place in the memory. It ends with the last reference: a call that is under way holds one."""

    def __init__(
        self, memory: int | str, *, shape: GroupMemoryShape, index: int, library: NativeLibrary, limits: WaitLimits
    ) -> None:
        mapped = _map(memory, num_bytes=shape.num_bytes)
        sizes = GroupShape(shape.size, shape.num_slots, shape.outbox_bytes, shape.slot_bytes)
        spin_us = _SPIN_US if limits.spins else 0
        self.handle: int = library.group.join(ctypes.addressof(mapped), sizes, index, spin_us, limits.timeout_s)
        self._sent: list[_Sent] = []
        weakref.finalize(self, _free, library, self.handle, mapped, self._sent).atexit = False

    def hold(self, x: torch.Tensor, *, to: int) -> _Sent:
        """Keeps x, which is about to be sent, until it has left."""
        sent = _Sent(x, to)
        self.kept().append(sent)
        return sent

    def kept(self) -> list[_Sent]:
        """What has not left yet, the oldest first."""
        self._sent[:] = [sent for sent in self._sent if not sent.is_moved.value]
        return self._sent


def _map(memory: int | str, *, num_bytes: int) -> "ctypes.Array[ctypes.c_char]":
    """Its pages are there when this returns: the first step does not wait for them."""
    try:
        descriptor = os.dup(memory) if isinstance(memory, int) else os.open(memory, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise PeerLostError(f"the memory of the group is gone: {error}") from error
    try:
        mapping = mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    finally:
        os.close(descriptor)
    return (ctypes.c_char * num_bytes).from_buffer(mapping)


def _free(library: NativeLibrary, handle: int, *held: object) -> None:
    library.group.free(handle)
    del held  # until here: the memory, and what had not left
