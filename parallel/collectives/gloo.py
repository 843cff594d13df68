"""Collectives over gloo, on host memory."""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from parallel.collectives.c10d_calls import begin_collective, finish_collective, run_collective
from parallel.collectives.communicator import Channel, CollectiveClock
from parallel.group_memory import max_sends
from parallel.link import Link


class GlooCommunicator:
    """Collectives on host memory. A reduce-scatter is an all-to-all and a sum: faster than gloo's, in fixed order."""

    link = Link.GLOO

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
                run_collective(self._group._allgather_base, out.view(-1), x.reshape(-1))
        return out

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Collective: see Communicator."""
        return self.all_to_all(x).sum(0)

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """Collective: see Communicator."""
        received = x.new_empty(x.shape)
        if x.numel():
            with self._clock:
                run_collective(self._group.alltoall_base, received, x.contiguous(), [], [])
        return received

    def all_to_all_uneven(self, x: torch.Tensor, *, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """Collective: see Communicator."""
        out = x.new_empty((sum(received), *x.shape[1:]))
        with self._clock:
            run_collective(self._group.alltoall_base, out, x.contiguous(), list(received), list(sent))
        return out

    def send(self, x: torch.Tensor, *, to: int, channel: Channel) -> None:
        """See Communicator."""
        if not x.numel():
            return
        while len(self._sends) >= max_sends(self.size):
            self._wait(self._sends.popleft()[0])
        x = x.contiguous()
        self._sends.append((begin_collective(self._group.send, [x], to, channel), x))

    def receive(self, out: torch.Tensor, *, source: int, channel: Channel) -> torch.Tensor:
        """See Communicator."""
        if out.numel():
            self._wait(begin_collective(self._group.recv, [out], source, channel))
        return out

    def begin_shift(self, x: torch.Tensor, out: torch.Tensor, *, distance: int) -> Callable[[], torch.Tensor]:
        """See Communicator."""
        x, works = x.contiguous(), []
        if out.numel():
            works.append(begin_collective(self._group.recv, [out], (self.index - distance) % self.size, Channel.KV))
        if x.numel():
            works.append(begin_collective(self._group.send, [x], (self.index + distance) % self.size, Channel.KV))
        return partial(self._finish_shift, works, x, out)

    def _finish_shift(self, works: list[Any], x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        del x  # was held until here: it must not be freed before it has left
        for work in works:
            self._wait(work)
        return out

    def _wait(self, work: Any) -> None:
        with self._clock:
            finish_collective(work)

    def close(self) -> None:
        """See Communicator. A gloo group ends with its last reference: its connections are closed then."""
        self._sends.clear()
        self._group = None
