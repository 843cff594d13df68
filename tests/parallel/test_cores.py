"""Dealing the cores of made-up machines: over all small ones, and what a few of a known shape give."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby, product

import pytest

from parallel.cores import Machine, Node, RankCores, Team, check_threads, deal_cores


def machine(*sizes: int, quota: int | None = None) -> Machine:
    """Nodes of so many cores, numbered through; node indices have gaps, as systems may have."""
    firsts = [sum(sizes[:index]) for index in range(len(sizes))]
    nodes = tuple(
        Node(index=2 * index, cores=tuple(range(first, first + size)))
        for index, (first, size) in enumerate(zip(firsts, sizes, strict=True))
    )
    return Machine(nodes=nodes, num_cores=quota or sum(sizes))


def dealt(machine: Machine, *ranks: int, threads: int | None = None) -> list[list[RankCores]]:
    return [list(part) for part in deal_cores(machine, [Team(num_ranks=count, num_threads=threads) for count in ranks])]


def small_machines() -> Iterator[Machine]:
    for num_nodes in range(1, 5):
        for sizes in product((1, 2, 3, 8), repeat=num_nodes):
            yield machine(*sizes)
            if sum(sizes) > 2:
                yield machine(*sizes, quota=sum(sizes) // 2)


def small_teams() -> Iterator[tuple[int, ...]]:
    yield from ((count,) for count in range(1, 10))
    yield from product((1, 2, 5), repeat=2)


def nodes_of(machine: Machine) -> dict[int, Node]:
    return {node.index: node for node in machine.nodes}


def check_sound(machine: Machine, teams: Sequence[Sequence[RankCores]]) -> None:
    by_index = nodes_of(machine)
    for team in teams:
        assert len({(cores.num_threads, cores.spins) for cores in team}) == 1, "ranks that step together are alike"
        threads = team[0].num_threads
        assert threads >= 1
        assert team[0].spins == (len(team) * threads <= machine.num_cores)
        for cores in team:
            assert cores.cores == tuple(core for index in cores.nodes for core in by_index[index].cores)
            assert not cores.cores or threads <= len(cores.cores), "no rank waits for itself"
        places = [place for place, _ in groupby(cores.nodes for cores in team)]
        assert len(places) == len(set(places)), "ranks of a node follow each other"


def test_every_rank_has_a_thread_and_a_whole_place_on_every_small_machine() -> None:
    for found, ranks in product(small_machines(), small_teams()):
        check_sound(found, dealt(found, *ranks))


def test_threads_are_no_more_than_cores_wherever_every_rank_can_have_one() -> None:
    for found, ranks in product(small_machines(), small_teams()):
        teams = dealt(found, *ranks)
        threads = sum(cores.num_threads for team in teams for cores in team)
        assert threads <= max(found.num_cores, sum(ranks))


def test_no_node_has_more_threads_than_cores_where_a_pool_alone_fits() -> None:
    for found, count in product(small_machines(), range(1, 10)):
        (team,) = dealt(found, count)
        if len(found.nodes) == 1 or count > sum(len(node.cores) for node in found.nodes) or not team[0].nodes:
            continue
        load = Counter(place for cores in team for place in [cores.nodes])
        for place, ranks in load.items():
            assert ranks * team[0].num_threads <= sum(len(nodes_of(found)[index].cores) for index in place)


def test_on_one_node_nobody_is_kept_to_anything() -> None:
    for size, ranks in product(range(1, 9), small_teams()):
        assert all(not cores.nodes and not cores.cores for team in dealt(machine(size), *ranks) for cores in team)


def test_equal_nodes_take_equally_many_ranks_as_far_as_their_number_divides() -> None:
    for num_nodes, each, size in product((2, 3, 4), (1, 2, 3), (3, 8)):
        (team,) = dealt(machine(*[size] * num_nodes), num_nodes * each)
        assert Counter(cores.nodes for cores in team) == {(2 * index,): each for index in range(num_nodes)}
        assert {cores.num_threads for cores in team} == {size // each}


@pytest.mark.parametrize(
    ("sizes", "ranks", "threads", "nodes"),
    [
        ((8, 8), (1,), [16], [[()]]),  # one rank uses the whole machine
        ((8, 8), (2,), [8], [[(0,), (2,)]]),
        ((8, 8), (3,), [4], [[(0,), (0,), (2,)]]),  # smaller than its share: it fits
        ((8, 8), (4,), [4], [[(0,), (0,), (2,), (2,)]]),
        ((8, 8, 8), (4,), [4], [[(0,), (0,), (2,), (2,)]]),  # pairs stay whole: the third node would speed up nobody
        ((8, 8, 8, 8), (2,), [16], [[(0, 2), (4, 6)]]),  # a rank that is larger than a node has several
        ((8, 8, 8, 8), (3,), [8], [[(0,), (2,), (4,)]]),
        ((8, 2), (2,), [4], [[(0,), (0,)]]),
        ((8, 8), (1, 1), [8, 8], [[(0,)], [(2,)]]),  # the second pool where the first is not
        ((8, 8), (2, 2), [4, 4], [[(0,), (2,)], [(0,), (2,)]]),  # each pool over all of the memory
        ((1, 1), (5,), [1], [[(0,), (0,), (0,), (2,), (2,)]]),
        ((2,), (2, 2), [1, 1], [[(), ()], [(), ()]]),  # the demo on two cores
    ],
)
def test_known_machines(
    sizes: tuple[int, ...], ranks: tuple[int, ...], threads: list[int], nodes: list[list[tuple[int, ...]]]
) -> None:
    teams = dealt(machine(*sizes), *ranks)
    assert [team[0].num_threads for team in teams] == threads
    assert [[cores.nodes for cores in team] for team in teams] == nodes


def test_a_quota_counts_and_a_rank_that_it_makes_small_stays_on_one_node() -> None:
    ((rank,),) = dealt(machine(32, 32, quota=16), 1)
    assert (rank.num_threads, rank.nodes) == (16, (0,))


def test_threads_that_are_asked_for_are_given_and_bind_where_a_node_has_them() -> None:
    for found, count, threads in product(small_machines(), range(1, 6), range(1, 12)):
        (team,) = dealt(found, count, threads=threads)
        assert {cores.num_threads for cores in team} == {threads}
        check_sound(found, [team])
    (team,) = dealt(machine(8, 8), 2, threads=3)
    assert [cores.nodes for cores in team] == [(0,), (2,)]
    (team,) = dealt(machine(8, 8), 2, threads=9)
    assert [cores.nodes for cores in team] == [(), ()]


def test_more_threads_than_cores_are_refused_with_the_number_of_cores() -> None:
    check_threads(4, num_cores=4)
    with pytest.raises(ValueError, match="threads 5 are more than the 4 cores there: write 4 or fewer"):
        check_threads(5, num_cores=4)


def test_a_rank_that_is_kept_to_a_node_knows_how_many_cores_the_machine_has() -> None:
    ((first, last),) = dealt(machine(8, 8), 2)
    assert (len(first.cores), len(last.cores)) == (8, 8)
    assert first.machine_cores == last.machine_cores == 16
