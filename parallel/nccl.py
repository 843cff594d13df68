"""Collectives over NCCL, on device memory."""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from parallel.c10d_calls import begin_collective, finish_collective, run_collective
from parallel.communicator import Channel, max_sends


class NcclCommunicator:
    """Collectives on device memory. `make_group(name)` makes a group of the same ranks.

    NCCL runs what one group is asked for in order, so messages that may overtake each other have groups of their own,
    made when first used.
    """

    def __init__(self, make_group: Callable[[str], Any], *, size: int, index: int) -> None:
        self._make_group = make_group
        self._groups: dict[str, Any] = {"collectives": make_group("collectives")}
        self._sends: deque[tuple[Any, torch.Tensor]] = deque()
        self.size = size
        self.index = index

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Collective: see Communicator."""
        out = x.new_empty((self.size, *x.shape))
        run_collective(self._group()._allgather_base, out.view(-1), x.reshape(-1))
        return out

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Collective: see Communicator. NCCL's ring adds in an order fixed by the group's size."""
        out = torch.empty_like(x[0])
        run_collective(self._group()._reduce_scatter_base, out, x.contiguous())
        return out

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """Collective: see Communicator."""
        received = x.new_empty(x.shape)
        run_collective(self._group().alltoall_base, received, x.contiguous(), [], [])
        return received

    def all_to_all_uneven(self, x: torch.Tensor, *, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """Collective: see Communicator."""
        out = x.new_empty((sum(received), *x.shape[1:]))
        run_collective(self._group().alltoall_base, out, x.contiguous(), list(received), list(sent))
        return out

    def send(self, x: torch.Tensor, *, to: int, channel: Channel) -> None:
        """See Communicator: the host does not wait, and x is held here until it has left."""
        if len(self._sends) >= max_sends(self.size):
            finish_collective(self._sends.popleft()[0])
        x = x.contiguous()
        self._sends.append((begin_collective(self._group(channel.name).send, [x], to, 0), x))

    def receive(self, out: torch.Tensor, *, source: int, channel: Channel) -> torch.Tensor:
        """See Communicator: the current stream waits, not the host."""
        run_collective(self._group(channel.name).recv, [out], source, 0)
        return out

    def begin_shift(self, x: torch.Tensor, out: torch.Tensor, *, distance: int) -> Callable[[], torch.Tensor]:
        """See Communicator. Both halves are one NCCL call: apart, ranks in a circle would wait for each other."""
        if not x.numel() and not out.numel():
            return lambda: out  # nothing coalesced is no work to wait for
        group, x = self._group(Channel.KV.name), x.contiguous()
        group._start_coalescing()
        if x.numel():
            begin_collective(group.send, [x], (self.index + distance) % self.size, 0)
        if out.numel():
            begin_collective(group.recv, [out], (self.index - distance) % self.size, 0)
        return partial(_finish_shift, group._end_coalescing(), x, out)

    def _group(self, name: str = "collectives") -> Any:
        if name not in self._groups:
            self._groups[name] = self._make_group(name)
        return self._groups[name]

    def close(self) -> None:
        """See Communicator."""
        for group in self._groups.values():
            group.abort()
        self._groups = {}
        self._sends.clear()


def _finish_shift(work: Any, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    del x  # was held until here: it must not be freed before it has left
    finish_collective(work)
    return out
