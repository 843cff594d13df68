"""Collectives over NCCL, on device memory."""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from parallel.collectives.c10d_calls import begin_collective, finish_collective, run_collective
from parallel.collectives.communicator import Channel
from parallel.group_memory import max_sends
from parallel.link import Link


class NcclCommunicator:
    """Collectives on device memory.

    NCCL runs what one group is asked for in order, so messages that may overtake each other have groups of their own:
    `channels` has one for each channel that is used among these ranks.
    """

    link = Link.NCCL

    def __init__(self, collectives: Any, *, channels: dict[Channel, Any], size: int, index: int) -> None:
        self._collectives = collectives
        self._channels = channels
        self._sends: deque[tuple[Any, torch.Tensor]] = deque()
        self.size = size
        self.index = index

    def connect(self, device: torch.device) -> None:
        """Collective, synchronises: connects every rank with those that it will send to.

        NCCL would do so when ranks first meet, and keep the host of each waiting for the other's: a last stage would
        wait for the first, which is steps behind it.
        """
        x = torch.zeros(1, device=device)
        self.all_gather(x)
        for channel, group in self._channels.items():
            run_collective(group._allgather_base, x.new_empty(self.size), x)
            # KV goes round to every rank; rows go to the next stage, tokens from the last to the first.
            for distance in range(1, self.size if channel is Channel.KV else 2):
                finish_collective(self._begin_shift(channel, x, torch.empty_like(x), distance=distance))
        x.item()

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Collective: see Communicator."""
        out = x.new_empty((self.size, *x.shape))
        run_collective(self._collectives._allgather_base, out.view(-1), x.reshape(-1))
        return out

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Collective: see Communicator. NCCL's ring adds in an order fixed by the group's size."""
        out = torch.empty_like(x[0])
        run_collective(self._collectives._reduce_scatter_base, out, x.contiguous())
        return out

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """Collective: see Communicator."""
        received = x.new_empty(x.shape)
        run_collective(self._collectives.alltoall_base, received, x.contiguous(), [], [])
        return received

    def all_to_all_uneven(self, x: torch.Tensor, *, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """Collective: see Communicator."""
        out = x.new_empty((sum(received), *x.shape[1:]))
        run_collective(self._collectives.alltoall_base, out, x.contiguous(), list(received), list(sent))
        return out

    def send(self, x: torch.Tensor, *, to: int, channel: Channel) -> None:
        """See Communicator: the host does not wait, and x is held here until it has left."""
        if not x.numel():
            return
        if len(self._sends) >= max_sends(self.size):
            finish_collective(self._sends.popleft()[0])
        x = x.contiguous()
        self._sends.append((self._begin(channel, send=(x, to)), x))

    def receive(self, out: torch.Tensor, *, source: int, channel: Channel) -> torch.Tensor:
        """See Communicator: the current stream waits, not the host."""
        if out.numel():
            finish_collective(self._begin(channel, receive=(out, source)))
        return out

    def begin_shift(self, x: torch.Tensor, out: torch.Tensor, *, distance: int) -> Callable[[], torch.Tensor]:
        """See Communicator."""
        if not x.numel() and not out.numel():
            return lambda: out  # nothing coalesced is no work to wait for
        x = x.contiguous()
        return partial(_finish_shift, self._begin_shift(Channel.KV, x, out, distance=distance), x, out)

    def _begin_shift(self, channel: Channel, x: torch.Tensor, out: torch.Tensor, *, distance: int) -> Any:
        """Both halves are one NCCL call: apart, ranks in a circle would wait for each other."""
        return self._begin(
            channel,
            send=(x, (self.index + distance) % self.size) if x.numel() else None,
            receive=(out, (self.index - distance) % self.size) if out.numel() else None,
        )

    def _begin(
        self,
        channel: Channel,
        *,
        send: tuple[torch.Tensor, int] | None = None,
        receive: tuple[torch.Tensor, int] | None = None,
    ) -> Any:
        """Begins one or both. Coalesced also where it is one: a lone send would make a communicator of two ranks, and
        not take the one of all that `connect` has made.
        """
        group = self._channels[channel]
        group._start_coalescing()
        if send is not None:
            begin_collective(group.send, [send[0]], send[1], 0)
        if receive is not None:
            begin_collective(group.recv, [receive[0]], receive[1], 0)
        return begin_collective(group._end_coalescing)

    def close(self) -> None:
        """See Communicator."""
        for group in (self._collectives, *self._channels.values()):
            if group is not None:
                group.abort()
        self._collectives, self._channels = None, {}
        self._sends.clear()


def _finish_shift(work: Any, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    del x  # was held until here: it must not be freed before it has left
    finish_collective(work)
    return out
