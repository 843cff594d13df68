"""Placement over all small sizes: each rank once, each device once, and groups apart only where no host holds them."""

from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement, product
from math import lcm

from hypothesis import given
from hypothesis import strategies as st

from parallel.placement import Demand, Loss, Run, ladder, plan_runs
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape

Free = tuple[int, ...]


def moe(*, pp: int = 1, dp: int = 1, cp: int = 1, tp: int = 1, ep: int = 1, moe_tp: int = 1) -> ReplicaShape:
    moe_dp = dp * cp * tp // (ep * moe_tp)
    return ReplicaShape(
        pp=pp,
        attention=AttentionSizes(dp=dp, cp=cp, tp=tp),
        experts=ExpertSizes(moe_dp=moe_dp, ep=ep, moe_tp=moe_tp),
    )


def hosts_of(runs: Sequence[Run]) -> list[int]:
    return [run.host for run in runs for _ in range(run.count)]


def hosts_by_block(runs: Sequence[Run], *, size: int) -> Iterator[set[int]]:
    """The hosts of each block of `size` ranks."""
    hosts = hosts_of(runs)
    for first in range(0, len(hosts), size):
        yield set(hosts[first : first + size])


def can_pack(items: Sequence[int], free: Free) -> bool:
    """Whether every item fits whole into a host: by trying all ways."""
    if not items:
        return True
    return any(
        can_pack(items[1:], (*free[:host], room - items[0], *free[host + 1 :]))
        for host, room in enumerate(free)
        if room >= items[0]
    )


def check_sound(demands: Sequence[Demand], free: Free, plans: Sequence[Sequence[Run]]) -> None:
    assert [sum(run.count for run in runs) for runs in plans] == [
        demand.replicas * demand.shape.world_size for demand in demands
    ]
    used = [0] * len(free)
    for run in (run for runs in plans for run in runs):
        assert run.count > 0
        used[run.host] += run.count
    assert all(count <= room for count, room in zip(used, free, strict=True))


def test_groups_stay_inside_a_host_wherever_any_placement_keeps_all_of_them() -> None:
    kept = 0
    sizes = list(product((1, 2, 3), (1, 2, 3, 4)))  # replicas and the size of an expert group
    for free in combinations_with_replacement(range(1, 8), 2):
        for first, second in product(sizes, sizes):
            items = sorted([first[1]] * first[0] + [second[1]] * second[0], reverse=True)
            if sum(items) > sum(free) or not can_pack(items, free):
                continue
            demands = [Demand(replicas=count, shape=moe(dp=size, ep=size)) for count, size in (first, second)]
            plans = plan_runs(demands, free=free)
            check_sound(demands, free, plans)
            for demand, runs in zip(demands, plans, strict=True):
                assert all(len(hosts) == 1 for hosts in hosts_by_block(runs, size=demand.shape.world_size)), (
                    free,
                    first,
                    second,
                )
            kept += 1
    assert kept > 500


shapes = st.builds(
    lambda pp, dp, cp, tp, split: moe(
        pp=pp, dp=dp, cp=cp, tp=tp, **dict(zip(("ep", "moe_tp"), _factors(dp * cp * tp, split), strict=True))
    ),
    *[st.integers(1, 3)] * 4,
    st.integers(0, 100),
)


def _factors(width: int, seed: int) -> tuple[int, int]:
    legal = [(ep, moe_tp) for ep in range(1, width + 1) for moe_tp in range(1, width + 1) if width % (ep * moe_tp) == 0]
    return legal[seed % len(legal)]


@given(
    demands=st.lists(st.builds(Demand, replicas=st.integers(1, 3), shape=shapes), max_size=3),
    free=st.lists(st.integers(0, 8), min_size=1, max_size=12),
)
def test_every_rank_and_device_is_used_once_and_no_room_is_missed(demands: list[Demand], free: list[int]) -> None:
    missing = sum(demand.replicas * demand.shape.world_size for demand in demands) - sum(free)
    room = (*free, *([1] * max(missing, 0)))
    plans = plan_runs(demands, free=room)
    check_sound(demands, room, plans)
    assert plans == plan_runs(demands, free=room)


@given(shape=shapes, per_host=st.integers(1, 12))
def test_over_equal_hosts_the_largest_block_that_fits_a_host_is_never_apart(shape: ReplicaShape, per_host: int) -> None:
    fitting = [size for size in ladder(shape) if size <= per_host and shape.world_size % size == 0]
    if fitting:
        demand = Demand(replicas=2, shape=shape)
        count = -(-2 * shape.world_size // fitting[0])
        (runs,) = plan_runs([demand], free=[per_host] * count)
        assert all(len(hosts) == 1 for hosts in hosts_by_block(runs, size=fitting[0]))


@given(shape=shapes)
def test_every_rung_divides_the_replica_and_holds_whole_groups(shape: ReplicaShape) -> None:
    sizes = ladder(shape)
    assert list(sizes) == sorted(sizes, reverse=True)
    assert shape.world_size == 1 or next(iter(sizes)) == shape.world_size
    assert all(shape.world_size % size == 0 for size in sizes)
    experts = shape.experts
    assert experts is not None
    whole = lcm(shape.attention.tp, experts.ep * experts.moe_tp)
    for axis in ("attn_tp", "block"):
        for group in shape.groups(axis):
            assert group.ranks[0] // whole == group.ranks[-1] // whole
    if whole > 1:
        assert sizes[whole] is Loss.GROUPS


def test_a_replica_crosses_hosts_before_its_stages_do_and_stages_before_groups() -> None:
    two_stages = Demand(replicas=1, shape=moe(pp=2, dp=2, tp=2, ep=4))
    (runs,) = plan_runs([two_stages], free=(6, 6))
    assert hosts_of(runs) == [0] * 4 + [1] * 4
    two_blocks = Demand(replicas=1, shape=moe(dp=4, tp=2, ep=4))
    (runs,) = plan_runs([two_blocks], free=(6, 6))
    assert hosts_of(runs) == [0] * 4 + [1] * 4
    no_block_fits = Demand(replicas=1, shape=moe(dp=4, tp=2, ep=8))
    (runs,) = plan_runs([no_block_fits], free=(3, 3, 3))
    assert hosts_of(runs) == [0, 0, 1, 1, 2, 2, 0, 1]


def test_a_large_replica_gets_the_large_host_though_a_small_one_comes_first() -> None:
    small, large = (Demand(replicas=1, shape=moe(dp=size, ep=size)) for size in (4, 8))
    assert plan_runs([small, large], free=(8, 4)) == ((Run(host=1, count=4),), (Run(host=0, count=8),))


def test_hosts_are_filled_in_order_where_that_takes_nothing_apart() -> None:
    first, second = (Demand(replicas=2, shape=moe(dp=2, ep=2)) for _ in range(2))
    assert plan_runs([first, second], free=(8, 8)) == ((Run(host=0, count=4),), (Run(host=0, count=4),))
