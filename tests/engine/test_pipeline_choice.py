"""In how many parts a batch goes through the stages: the shortest round, over all small sizes."""

from itertools import product

import pytest

from parallel.link import DEVICES, DeviceSpeed
from parallel.stage_cost import CacheCost, StageCost
from worker.engine.pipeline_choice import FastestParts, FixedParts, Host, choose_pipeline

MB = 1 << 20


def stage(weight_bytes: int, *, key_bytes: int = 0) -> StageCost:
    """Of float32 weights, each met by each row."""
    caches = (CacheCost(key_bytes=key_bytes, key_flops=key_bytes, window=0),) if key_bytes else ()
    return StageCost(weight_bytes=weight_bytes, row_flops=weight_bytes // 2, caches=caches)


def host(*, units: int = 2, num_ranks: int = 2, units_per_rank: int = 1, kind: str = "cpu") -> Host:
    return Host(speed=DEVICES[kind], units=units, units_per_rank=units_per_rank, num_ranks=num_ranks)


def fastest(*stages: StageCost, on: Host, stage_size: int = 1) -> FastestParts:
    return FastestParts(stages=stages, stage_size=stage_size, host=on)


def rounds(times: list[float], *, parts: int, count: int) -> float:
    """Seconds of the last of `count` rounds of parts that run through stages, one at a time on each."""
    free = [0.0] * len(times)
    ready = [0.0] * parts
    ends = []
    for _ in range(count):
        for part in range(parts):
            at = ready[part]
            for number, seconds in enumerate(times):
                at = free[number] = max(at, free[number]) + seconds
            ready[part] = at
        ends.append(max(ready))
    return ends[-1] - ends[-2]


@pytest.mark.parametrize("sizes", [(1,), (3, 3), (5, 2), (2, 5), (4, 4, 4), (1, 6, 2), (3, 1, 1, 4)])
def test_a_round_takes_what_parts_take_that_run_through_the_stages_one_after_the_other(sizes: tuple[int, ...]) -> None:
    # Accelerators: a stage is as fast whatever the others do.
    choice = fastest(*(stage(size * MB) for size in sizes), on=host(kind="cuda", units=8, num_ranks=len(sizes)))
    for parts, rows in product(range(1, len(sizes) + 1), (len(sizes), 12, 4096)):
        each = -(-rows // parts)
        times = [
            fastest(stage(size * MB), on=host(kind="cuda")).round_s(rows=each, context=0, parts=1) for size in sizes
        ]
        expected = rounds(times, parts=parts, count=20)
        assert choice.round_s(rows=rows, context=0, parts=parts) == pytest.approx(expected)


def test_what_is_chosen_has_the_shortest_round_of_all_and_of_equals_the_fewest_parts() -> None:
    for num_stages, rows, units, context in product((1, 2, 3, 4), range(1, 40), (1, 2, 4, 64), (0, 100, 10_000)):
        stages = [stage(100 * MB, key_bytes=1000)] * num_stages
        choice = fastest(*stages, on=host(units=units, num_ranks=num_stages))
        chosen = choice.num_parts(rows=rows, context=context)
        by_parts = {
            parts: choice.round_s(rows=rows, context=context, parts=parts)
            for parts in range(1, min(num_stages, rows) + 1)
        }
        assert chosen == min(parts for parts, seconds in by_parts.items() if seconds == min(by_parts.values()))


def test_cores_of_one_memory_take_few_rows_whole_and_many_in_parts() -> None:
    chosen = [
        fastest(stage(270 * MB), stage(270 * MB), on=host()).num_parts(rows=rows, context=30) for rows in (1, 4, 64)
    ]
    assert chosen == [1, 1, 2]


def test_stages_with_a_memory_of_their_own_work_at_once_as_soon_as_rows_cost_anything() -> None:
    stages = [stage(270 * MB, key_bytes=1000)] * 3
    for on in (host(num_ranks=1), host(kind="cuda", units=3, num_ranks=3)):
        assert [fastest(*stages, on=on).num_parts(rows=rows, context=100) for rows in (1, 3, 8, 64)] == [1, 3, 3, 3]


def test_ranks_that_have_all_cores_already_gain_nothing_by_parts() -> None:
    # Two stages of two ranks, or of one with two threads, on two cores: another stage at work takes theirs.
    stages = [stage(270 * MB)] * 2
    for on, stage_size in ((host(num_ranks=4), 2), (host(units_per_rank=2), 1)):
        for rows in range(1, 64):
            assert fastest(*stages, on=on, stage_size=stage_size).num_parts(rows=rows, context=0) == 1


def test_long_contexts_part_a_batch_that_short_ones_do_not() -> None:
    stages = [stage(270 * MB, key_bytes=23_000)] * 2
    chosen = [fastest(*stages, on=host()).num_parts(rows=6, context=context) for context in (100, 100_000)]
    assert chosen == [1, 2]


@pytest.mark.parametrize(("setting", "parts"), [("whole", 1), ("parts", 3)])
def test_what_the_configuration_asks_for_is_taken_at_any_size(setting: str, parts: int) -> None:
    choice = choose_pipeline(setting, stages=(stage(MB),) * 3, stage_size=1, host=host())
    assert choice == FixedParts(parts=parts)
    assert {choice.num_parts(rows=rows, context=context) for rows in (1, 2, 99) for context in (1, 1e6)} == {parts}


def test_units_that_read_at_once_share_what_a_host_gives_and_one_alone_has_its_own_rate() -> None:
    speed = DeviceSpeed(flops=1, key_flops=1, read_bytes_per_s=10, shared_reads=0.5, host_bytes_per_s=100)
    assert [speed.reads(units=units, of=8) for units in (1, 2, 4, 8)] == [10, 10, 10, 5]
    assert speed.reads(units=40, of=40) == 2.5
    assert speed.reads(units=1, of=1) == 10
