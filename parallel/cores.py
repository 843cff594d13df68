"""Which cores a rank may use, and how many threads: what a machine has, dealt to the ranks that are placed on it. Pure.

```
2 nodes of 8 cores, 4 ranks of one pool: 4 threads each    node 0, cores 0-7: ranks 0 1    node 1, cores 8-15: ranks 2 3
```
Ranks of a pool step at once, and as fast as the slowest of them: each gets as many threads. Where there are several
NUMA nodes, a rank is kept to all cores of its node and not to cores of its own: so its memory, which its threads touch
first, is near, and it can still move away from a busy core. Ranks in order share nodes, as consecutive ones are in the
groups that say most to each other (`placement.py` has the same order). On one node nobody is kept to anything.

Pools of one machine share its cores although they do not always step at once: where they do, a thread waits at each
barrier for one whose core another pool has, and that costs more than idle cores do (`benchmarks/pool_threads.py`).
`engine.threads` says otherwise where it is known that they do not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count


@dataclass(frozen=True, kw_only=True)
class Node:
    """A NUMA node, and those of its cores that may be used."""

    index: int
    cores: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a launcher says of its machine: `num_cores` may be used at once, of any of the nodes' cores.

    `threads_per_rank` is its operator's word, None where there is none.
    """

    nodes: tuple[Node, ...]
    num_cores: int
    threads_per_rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class Team:
    """The ranks of one pool that are on a machine, in order; `num_threads` where somebody says how many each has."""

    num_ranks: int
    num_threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class RankCores:
    """Of one rank: its threads, and the nodes and cores that it is kept to, none where it may be anywhere.

    It `spins` where every rank that it may wait for can run meanwhile. `machine_cores` are those that all ranks of the
    machine share, 0 where nobody has said.
    """

    num_threads: int = 1
    nodes: tuple[int, ...] = ()
    cores: tuple[int, ...] = ()
    spins: bool = False
    machine_cores: int = 0


def deal_cores(machine: Machine, teams: Sequence[Team]) -> tuple[tuple[RankCores, ...], ...]:
    """For each team, what each of its ranks gets."""
    share = max(1, machine.num_cores // max(1, ranks_at_once(teams)))
    taken = [0] * len(machine.nodes)
    return tuple(tuple(_deal(machine, team, share=share, taken=taken)) for team in teams)


def ranks_at_once(teams: Sequence[Team]) -> int:
    """Ranks that may step at once, among which a machine's cores are divided: those of all pools."""
    return sum(team.num_ranks for team in teams)


def check_threads(num_threads: int, *, num_cores: int) -> None:
    """ValueError where a rank of `num_threads` could never run on so many cores."""
    if num_threads > num_cores:
        raise ValueError(
            f"threads {num_threads} are more than the {num_cores} cores there: write {num_cores} or fewer, or leave it "
            "out"
        )


def _deal(machine: Machine, team: Team, *, share: int, taken: list[int]) -> Iterator[RankCores]:
    """`taken` counts by node the threads of the teams before; those of this one are added."""
    num_threads, places = _places(machine, team, num_threads=team.num_threads or share, taken=taken)
    spins = team.num_ranks * num_threads <= machine.num_cores
    for place in places:
        nodes = [machine.nodes[index] for index in place]
        yield RankCores(
            num_threads=num_threads,
            nodes=tuple(node.index for node in nodes),
            cores=tuple(core for node in nodes for core in node.cores),
            spins=spins,
            machine_cores=machine.num_cores,
        )


#: Places of a machine's nodes in its list; none for anywhere.
_Place = tuple[int, ...]


def _places(machine: Machine, team: Team, *, num_threads: int, taken: list[int]) -> tuple[int, list[_Place]]:
    """The threads of each rank and its place: its node, or several nodes where one is too small for it.

    What nobody has asked for is made smaller until it fits.
    """
    num_ranks, is_asked = team.num_ranks, team.num_threads is not None
    anywhere: list[_Place] = [()] * num_ranks
    sizes = [len(node.cores) for node in machine.nodes]
    if len(sizes) < 2 or not num_ranks:
        return num_threads, anywhere
    if num_threads > max(sizes):
        runs = _runs_of_nodes(num_ranks, num_nodes=len(sizes))
        room = min((sum(sizes[index] for index in run) for run in runs), default=0)
        fitting = num_threads if is_asked else min(num_threads, room)
        return (fitting, runs) if runs and fitting <= room else (num_threads, anywhere)
    if not is_asked:
        num_threads = next((size for size in range(num_threads, 1, -1) if _num_slots(sizes, size) >= num_ranks), 1)
    order = sorted(range(len(sizes)), key=lambda index: taken[index] / sizes[index])
    counts = _fill(num_ranks, slots=[sizes[index] // num_threads for index in order])
    places: list[_Place] = [(index,) for index, size in zip(order, counts, strict=True) for _ in range(size)]
    for index, size in zip(order, counts, strict=True):
        taken[index] += size * num_threads
    return num_threads, places


def _runs_of_nodes(num_ranks: int, *, num_nodes: int) -> list[_Place]:
    """As many whole nodes for each rank, in order; none where that is all of them, or less than one."""
    each = num_nodes // num_ranks
    if not 0 < each < num_nodes:
        return []
    return [tuple(range(rank * each, (rank + 1) * each)) for rank in range(num_ranks)]


def _num_slots(sizes: Sequence[int], num_threads: int) -> int:
    return sum(size // num_threads for size in sizes)


def _fill(num_ranks: int, *, slots: Sequence[int]) -> list[int]:
    """How many ranks each node takes, the first ones first, so that the fullest has as few as can be.

    Where there are more ranks than slots, every slot takes several.
    """
    each = -(-num_ranks // sum(slots))
    room = [slot * each for slot in slots]
    level = next(level for level in count(1) if sum(min(level, slot) for slot in room) >= num_ranks)
    counts: list[int] = []
    for slot in room:
        counts.append(min(level, slot, num_ranks - sum(counts)))
    return counts
