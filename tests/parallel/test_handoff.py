"""The hand-off between any two layouts: simulated on arrays, every element arrives once and from the right place."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.handoff import CacheLayout, PagePlace, byte_runs, cache_layout, plan_copies, plan_lanes
from parallel.models.description import ModelDescription
from parallel.shape import AttentionSizes, ReplicaShape
from tests import tiny_models

D = 3


def description(layers: int) -> ModelDescription:
    return tiny_models.describe(tiny_models.llama(num_hidden_layers=layers))


def layout(model: ModelDescription, *, pp: int, cp: int, tp: int, page_size: int) -> CacheLayout:
    shape = ReplicaShape(pp=pp, attention=AttentionSizes(cp=cp, tp=tp), experts=None)
    return cache_layout(model, shape=shape, page_size=page_size)


def table(num_tokens: int, *, page_size: int, cp: int, seed: int) -> list[PagePlace]:
    random = np.random.default_rng(seed)
    count = -(-num_tokens // page_size)
    pages = random.permutation(count + 2)[:count]
    return [PagePlace(coordinate=int(random.integers(cp)), page=int(page)) for page in pages]


def memory(side: CacheLayout, pages: int) -> dict[tuple[int, int, int], np.ndarray]:
    """Zeroed layer memory by (layer, cp, tp)."""
    found = {}
    for first, end in side.stages:
        for layer, cp, tp in itertools.product(
            range(first, end), range(side.shape.attention.cp), range(len(side.heads))
        ):
            heads = side.heads[tp][1] - side.heads[tp][0]
            found[layer, cp, tp] = np.zeros((pages, 2, heads, side.page_size, D), dtype=np.int64)
    return found


def value(layer: int, part: int, head: int, position: int) -> int:
    return ((layer * 2 + part) * 64 + head) * 4096 + position + 1


def fill(
    side: CacheLayout, places: list[PagePlace], num_tokens: int, into: dict[tuple[int, int, int], np.ndarray]
) -> None:
    for (layer, cp, tp), array in into.items():
        for position, part in itertools.product(range(num_tokens), range(2)):
            place = places[position // side.page_size]
            if place.coordinate == cp:
                for head in range(*side.heads[tp]):
                    row = array[place.page, part, head - side.heads[tp][0], position % side.page_size]
                    row[:] = value(layer, part, head, position)


LAYOUTS = [
    {"pp": pp, "cp": cp, "tp": tp, "page_size": page_size}
    for pp, cp, tp, page_size in itertools.product((1, 2, 3), (1, 2, 3), (1, 2, 4, 8), (1, 4, 6))
]


@settings(max_examples=150, deadline=None)
@given(
    source=st.sampled_from(LAYOUTS),
    target=st.sampled_from(LAYOUTS),
    num_tokens=st.integers(1, 30),
    cut=st.integers(0, 30),
    seed=st.integers(0, 5),
)
def test_every_element_arrives_once_and_from_the_right_place(
    source: dict[str, int], target: dict[str, int], num_tokens: int, cut: int, seed: int
) -> None:
    model = description(5)
    left, right = layout(model, **source), layout(model, **target)
    source_table = table(num_tokens, page_size=left.page_size, cp=source["cp"], seed=seed)
    target_table = table(num_tokens, page_size=right.page_size, cp=target["cp"], seed=seed + 1)
    sent, got = memory(left, 40), memory(right, 40)
    written = {key: np.zeros(array.size, dtype=np.int64) for key, array in got.items()}
    fill(left, source_table, num_tokens, sent)
    cut = min(cut, num_tokens)
    for positions in ((0, cut), (cut, num_tokens)):
        copies = list(
            plan_copies(
                source_table=source_table,
                source_page_size=left.page_size,
                target_table=target_table,
                target_page_size=right.page_size,
                positions=positions,
            )
        )
        for lane, copy in itertools.product(plan_lanes(left, right), copies):
            for run in byte_runs(copy, lane=lane, source=left, target=right, token_elements=D):
                for layer in range(*lane.layers):
                    from_ = sent[layer, copy.source.coordinate, lane.source_tp].reshape(-1)
                    key = (layer, copy.target.coordinate, lane.target_tp)
                    span = slice(run.target_start, run.target_start + run.size)
                    got[key].reshape(-1)[span] = from_[run.source_start : run.source_start + run.size]
                    written[key][span] += 1
    wanted = memory(right, 40)
    fill(right, target_table, num_tokens, wanted)
    for key, array in wanted.items():
        assert np.array_equal(got[key], array)
        assert np.array_equal(written[key], (array.reshape(-1) != 0).astype(np.int64))


@pytest.mark.parametrize(("source_tp", "target_tp"), [(8, 1), (8, 4), (4, 8), (8, 8)])
def test_replicated_heads_are_read_from_one_holder_and_written_to_all(source_tp: int, target_tp: int) -> None:
    model = description(2)
    lanes = plan_lanes(
        layout(model, pp=1, cp=1, tp=source_tp, page_size=4), layout(model, pp=1, cp=1, tp=target_tp, page_size=4)
    )
    assert {lane.target_tp for lane in lanes} == set(range(target_tp))
    assert len({lane.source_tp for lane in lanes}) == min(source_tp, model.num_kv_heads)


def test_a_whole_page_of_equal_heads_is_one_run() -> None:
    model = description(1)
    side = layout(model, pp=1, cp=1, tp=1, page_size=4)
    (lane,) = plan_lanes(side, side)
    place = [PagePlace(coordinate=0, page=3)]
    (copy,) = plan_copies(
        source_table=place, source_page_size=4, target_table=place, target_page_size=4, positions=(0, 4)
    )
    (run,) = byte_runs(copy, lane=lane, source=side, target=side, token_elements=D)
    assert run.size == 2 * model.num_kv_heads * 4 * D
