"""What every cp rank reads off its tables, against plain lists, whatever the leader's plans were."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.exchange.choice import ExchangePolicy
from benchmarks.exchange_steps import exchange_policy
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ReplicaShape
from parallel.storage import CacheGroup
from tests.engine.test_leader import POOLS, VERBS, groups_of, live
from tests.worker.checked_tables import RanksWithTables

WINDOWS = st.sampled_from([(0,), (0, 1), (0, 3), (5, 0), (0, 8), (0, 17), (2, 9), (6,), (1,), (0, 2, 5)])


def named_groups(windows: tuple[int, ...]) -> list[CacheGroup]:
    """As `groups_of`, each with a name of its own."""
    return [replace(group, name=f"group {number}") for number, group in enumerate(groups_of(windows))]


def policy(group: CacheGroup, *, page_size: int) -> ExchangePolicy:
    """One whose workspace is soon full, so that several strategies meet in a step."""
    return exchange_policy(
        num_heads=2, num_kv_heads=1, head_dim=8, page_size=page_size, max_tokens=24, window=group.window
    )


@pytest.mark.timeout(120)
@settings(max_examples=40, deadline=None)
@given(
    sizes=st.builds(AttentionSizes, dp=st.integers(1, 2), cp=st.integers(1, 4), tp=st.integers(1, 3)),
    pp=st.integers(1, 2),
    pool=POOLS,
    windows=WINDOWS,
    page_size=st.sampled_from([1, 2, 4, 8]),
    batch=st.sampled_from([1, 3, 10, 40]),
    seed=st.integers(0, 100_000),
)
def test_every_rank_knows_its_rows_what_they_see_and_where_they_are_stored(
    sizes: AttentionSizes, pp: int, pool: str, windows: tuple[int, ...], page_size: int, batch: int, seed: int
) -> None:
    chance = random.Random(seed)
    groups = named_groups(windows)
    ranks = RanksWithTables(
        shape=ReplicaShape(pp=pp, attention=sizes, experts=None),
        settings=EngineSettings(
            page_size=page_size,
            max_batch_tokens=batch,
            max_sequences=chance.randint(1, 5),
            kv_tokens=chance.choice([48, 96]),
        ),
        groups=groups,
        policies=[policy(group, page_size=page_size) for group in groups],
        seed=seed,
        faults=chance.choice([0.0, 0.1]),
    )
    live(ranks, chance.choices(VERBS, k=chance.randint(10, 90)), pool=pool, chance=chance)
