"""Which ranks share a host: how many devices each host gives to each pool, run by run in order of ranks. Pure.

A replica is a ladder of blocks of consecutive ranks, the outer ones the first to be taken apart:

```
replica ─> stage ─> rows that hold whole cp, tp and expert groups ─> whole tp and expert groups ─> moe_tp ─> one rank
```
A block goes to a host that has room for all of it; where none has, the blocks inside it are placed one by one. So pp
and replicas cross hosts first, and a tp or expert group only where no host has room for it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from heapq import heappop, heappush
from itertools import groupby, permutations
from math import lcm

from parallel.shape import ReplicaShape


class Loss(IntEnum):
    """What is lost when a block is taken apart, the worst first."""

    GROUPS = 0
    CONTEXT = 1
    STAGE = 2
    REPLICA = 3


@dataclass(frozen=True, kw_only=True)
class Demand:
    """`replicas` equal blocks of `shape.world_size` ranks that any host may hold."""

    replicas: int
    shape: ReplicaShape


@dataclass(frozen=True, kw_only=True)
class Run:
    """The next `count` ranks are on the host at index `host`."""

    host: int
    count: int


def plan_runs(demands: Sequence[Demand], *, free: Sequence[int]) -> tuple[tuple[Run, ...], ...]:
    """For each demand, in their order, the runs that its replicas' ranks take in order; `free` devices by host.

    Greedy plans are made, and the one that takes the fewest groups apart is kept, the first of equals: demands in every
    order (there are two pools, not many), blocks on the first host with room or where they leave the least of it.
    Every demand is met: the caller has seen that the devices suffice in all.
    """
    plans = (
        _plan(demands, order=order, room=_Room(free, tight=tight))
        for tight in (False, True)
        for order in permutations(range(len(demands)))
    )
    best = next(plans)
    for plan in plans:
        if not any(best.losses):
            break
        best = min(best, plan, key=lambda plan: plan.losses)
    return best.runs


def ladder(shape: ReplicaShape) -> Mapping[int, Loss]:
    """The sizes of the blocks that are worth a host, largest first, and what it costs to take one apart.

    Every size divides the replica; a block of size s begins at a multiple of s.
    """
    tp, moe_tp, block = shape.attention.tp, 1, 1
    if shape.experts is not None:
        moe_tp, block = shape.experts.moe_tp, shape.experts.ep * shape.experts.moe_tp
    found = {shape.world_size: Loss.REPLICA, shape.stage_size: Loss.STAGE}
    found[lcm(tp * shape.attention.cp, block)] = Loss.CONTEXT
    found |= dict.fromkeys((lcm(tp, block), tp, block, moe_tp), Loss.GROUPS)
    return {size: found[size] for size in sorted(found, reverse=True) if size > 1}


@dataclass(frozen=True, kw_only=True)
class _Plan:
    runs: tuple[tuple[Run, ...], ...]
    losses: tuple[int, ...]


def _plan(demands: Sequence[Demand], *, order: Sequence[int], room: "_Room") -> _Plan:
    runs: dict[int, tuple[Run, ...]] = {}
    losses = [0] * len(Loss)
    for index in order:
        replicas, shape = demands[index].replicas, demands[index].shape
        taken = _place(replicas, size=shape.world_size, sizes=ladder(shape), room=room, losses=losses)
        runs[index] = tuple(_merged(taken))
    return _Plan(runs=tuple(runs[index] for index in range(len(demands))), losses=tuple(losses))


def _place(blocks: int, *, size: int, sizes: Mapping[int, Loss], room: "_Room", losses: list[int]) -> Iterator[Run]:
    """The runs of `blocks` blocks of `size` ranks; counts in `losses` what is taken apart."""
    while blocks and (run := room.take(size, at_most=blocks)):
        blocks -= run.count // size
        yield run
    for _ in range(blocks):
        losses[sizes[size]] += 1
        most = room.most
        inner = next((block for block in sizes if block < size and size % block == 0 and block <= most), 1)
        yield from _place(size // inner, size=inner, sizes=sizes, room=room, losses=losses)


def _merged(runs: Iterator[Run]) -> Iterator[Run]:
    for host, together in groupby(runs, key=lambda run: run.host):
        yield Run(host=host, count=sum(run.count for run in together))


class _Room:
    """Free devices by host, given from the first host with enough or, where `tight`, with the least that is enough."""

    def __init__(self, free: Sequence[int], *, tight: bool) -> None:
        self._tight = tight
        self._hosts: dict[int, list[int]] = {}  # by free devices a heap of hosts
        for host, count in enumerate(free):
            self._hosts.setdefault(count, []).append(host)

    @property
    def most(self) -> int:
        """Free devices of the emptiest host."""
        return max((count for count, hosts in self._hosts.items() if hosts), default=0)

    def take(self, size: int, *, at_most: int) -> Run | None:
        """Takes blocks of `size` devices of one host, `at_most` so many; None where no host has room for one."""
        enough = [count for count, hosts in self._hosts.items() if hosts and count >= size]
        if not enough:
            return None
        count = min(enough) if self._tight else min(enough, key=lambda count: self._hosts[count][0])
        host = heappop(self._hosts[count])
        taken = size * min(count // size, at_most)
        heappush(self._hosts.setdefault(count - taken, []), host)
        return Run(host=host, count=taken)
