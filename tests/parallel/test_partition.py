"""Every small list of costs in every number of parts, against all ways to cut it."""

from itertools import combinations, pairwise, product

import pytest

from parallel.partition import balanced_bounds


@pytest.mark.parametrize("size", range(1, 7))
def test_the_costliest_part_is_as_cheap_as_it_can_be_and_no_part_is_empty(size: int) -> None:
    for costs in product((1, 2, 5), repeat=size):
        for parts in range(1, size + 1):
            bounds = balanced_bounds(costs, parts=parts)
            assert (bounds[0], bounds[-1], len(bounds)) == (0, size, parts + 1)
            assert list(bounds) == sorted(set(bounds))
            ways = [(0, *cuts, size) for cuts in combinations(range(1, size), parts - 1)]
            least = min(worst(costs, way) for way in ways)
            assert worst(costs, bounds) == least


def test_equal_costs_give_parts_that_differ_by_one_at_most() -> None:
    for size in range(1, 30):
        for parts in range(1, size + 1):
            bounds = balanced_bounds([3] * size, parts=parts)
            lengths = {after - before for before, after in pairwise(bounds)}
            assert max(lengths) - min(lengths) <= 1, (size, parts, bounds)


def worst(costs: tuple[int, ...], bounds: tuple[int, ...]) -> int:
    return max(sum(costs[start:end]) for start, end in pairwise(bounds))
