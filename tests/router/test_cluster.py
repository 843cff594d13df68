"""The rounds of a warm-up: every pair of replicas that may hand off meets once, and nobody has two others at a time."""

from itertools import product

import pytest

from router.cluster import rounds


@pytest.mark.parametrize(("num_sources", "num_targets"), list(product(range(5), range(5))))
def test_every_pair_meets_once_and_nobody_has_two_others_in_a_round(num_sources: int, num_targets: int) -> None:
    sources, targets = range(num_sources), range(100, 100 + num_targets)
    found = []
    for pairs in rounds(sources, targets):
        assert len({source for source, _ in pairs}) == len({target for _, target in pairs}) == len(pairs)
        found += pairs
    assert sorted(found) == list(product(sources, targets))
