"""Consecutive parts of a list of costs, the costliest part as cheap as it can be."""

from collections.abc import Sequence
from itertools import accumulate


def balanced_bounds(costs: Sequence[int], *, parts: int) -> tuple[int, ...]:
    """Where each of `parts` parts begins, and the end: parts + 1 numbers, each part with one cost or more.

    The largest sum is the least possible, and within it the parts are near their average.
    """
    assert 1 <= parts <= len(costs), f"{len(costs)} costs do not make {parts} parts"
    prefix = [0, *accumulate(costs)]
    limit = _least_limit(costs, prefix, parts=parts)
    bounds = [len(costs)]
    for left in range(parts - 1, 0, -1):
        end = bounds[-1]
        start = end - 1
        # Longer while the parts in front need it, and up to the average of what is to be shared out.
        while start > left and (
            _parts_needed(costs[:start], limit=limit) > left
            or (prefix[end] - prefix[start - 1]) * (left + 1) <= prefix[end]
        ):
            start -= 1
        bounds.append(start)
    return (0, *reversed(bounds))


def _least_limit(costs: Sequence[int], prefix: Sequence[int], *, parts: int) -> int:
    """The least limit under which `parts` parts suffice, found by halving; a fit in fewer parts can be cut further."""
    low, high = max(costs), prefix[-1]
    while low < high:
        middle = (low + high) // 2
        if _parts_needed(costs, limit=middle) <= parts:
            high = middle
        else:
            low = middle + 1
    return low


def _parts_needed(costs: Sequence[int], *, limit: int) -> int:
    count, total = 1, 0
    for cost in costs:
        if total + cost > limit:
            count, total = count + 1, 0
        total += cost
    return count
