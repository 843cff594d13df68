"""The hand-off between any two layouts: simulated on bytes, every element arrives once and from the right place."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.arrays import Ints
from parallel.handoff import Lane, copy_runs, plan_copies, plan_lanes
from parallel.model_share import ModelShare
from parallel.models.description import ModelDescription
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ReplicaShape
from parallel.storage import (
    EVERYTHING,
    CacheGroup,
    GroupRegion,
    Plane,
    PlaneLayout,
    RankStorage,
    Window,
    keys_and_values,
)
from tests import tiny_models

NUM_PAGES = 40
Sizes = dict[str, int]
Memory = dict[tuple[int, int, int], npt.NDArray[np.uint8]]
"""By pp, cp and tp rank, the bytes of its region."""


def description(layers: int = 5) -> ModelDescription:
    """Layers that take turns: keys and values with an index that heads share, and a window of keys and values."""
    model = tiny_models.describe(tiny_models.llama(num_hidden_layers=layers))
    full, window = range(0, layers, 2), range(1, layers, 2)
    heads = model.cache_groups[0].num_kv_heads
    group = keys_and_values("full", layers=full, sees=EVERYTHING, num_kv_heads=heads, head_size=3)
    index = Plane(name="index", elements=5, per_head=False)
    return replace(
        model,
        cache_groups=(
            replace(group, planes=(*group.planes, index)),
            keys_and_values("window", layers=window, sees=Window(tokens=6), num_kv_heads=heads, head_size=2),
        ),
    )


class Side:
    """A replica with its memory and a sequence's tables in it, by group: owners and numbers of its pages."""

    def __init__(self, model: ModelDescription, sizes: Sizes, *, num_tokens: int, seed: int) -> None:
        self.model, self.sizes = model, sizes
        attention = AttentionSizes(cp=sizes["cp"], tp=sizes["tp"])
        self.shape = ReplicaShape(pp=sizes["pp"], attention=attention, experts=None)
        self.page_size = sizes["page_size"]
        random = np.random.default_rng(seed)
        count = -(-num_tokens // self.page_size)
        self.tables = {
            group.name: (random.integers(sizes["cp"], size=count), random.permutation(count + 2)[:count])
            for group in model.cache_groups
        }
        self.storages = {pp: self._storage(pp) for pp in range(sizes["pp"])}
        self.memory = self.new_memory()

    def _storage(self, pp: int) -> list[RankStorage]:
        """By tp rank."""
        engine = EngineSettings(page_size=self.page_size, kv_tokens=NUM_PAGES * self.page_size)
        ranks = [self.shape.attention_rank(pp_rank=pp, dp=0, tp=tp) for tp in range(self.sizes["tp"])]
        shares = [
            ModelShare(description=self.model, shape=self.shape, coordinates=self.shape.coordinates(rank))
            for rank in ranks
        ]
        return [share.storage(engine) for share in shares]

    def new_memory(self) -> Memory:
        places = itertools.product(range(self.sizes["pp"]), range(self.sizes["cp"]), range(self.sizes["tp"]))
        return {(pp, cp, tp): np.zeros(self.storages[pp][tp].num_bytes, dtype=np.uint8) for pp, cp, tp in places}

    def fill(self, memory: Memory, positions: range, group: CacheGroup) -> None:
        """What a forward writes at `positions`: numbers that tell layer, plane, head, position and element."""
        owners, pages = self.tables[group.name]
        for (pp, cp, tp), bytes_ in memory.items():
            region = self.storages[pp][tp].group(group.name)
            for layer, (number, plane) in itertools.product(region.layers, enumerate(region.page.planes)):
                array = view(bytes_, plane, region=region, layer=layer)
                for position in positions:
                    page, offset = divmod(position, self.page_size)
                    if owners[page] == cp:
                        heads = np.arange(plane.num_heads) + (region.first_head if plane.per_head else 0)
                        tag = ((layer * 4 + number) * 16 + heads[:, None]) * 64 + position
                        array[pages[page], :, offset] = tag * 8 + np.arange(plane.elements) + 1


def view(
    memory: npt.NDArray[np.uint8], plane: PlaneLayout, *, region: GroupRegion, layer: int
) -> npt.NDArray[np.float32]:
    """A plane of a layer as [page, head, position, element]."""
    return np.ndarray(
        (region.num_pages, plane.num_heads, region.page.page_size, plane.elements),
        dtype=np.float32,
        buffer=memory.data,
        offset=region.layer_start(layer) + plane.offset,
        strides=(region.page.page_bytes, plane.head_stride, plane.position_stride, plane.itemsize),
    )


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
    source: Sizes, target: Sizes, num_tokens: int, cut: int, seed: int
) -> None:
    model = description()
    left = Side(model, source, num_tokens=num_tokens, seed=seed)
    right = Side(model, target, num_tokens=num_tokens, seed=seed + 1)
    wanted, written = right.new_memory(), right.new_memory()
    for group in model.cache_groups:
        left.fill(left.memory, range(num_tokens), group)
        right.fill(wanted, range(num_tokens), group)
    cut = min(cut, num_tokens)
    for lane in plan_lanes(model, source=left.shape, target=right.shape):
        for positions in ((0, cut), (cut, num_tokens)):
            for key, span, data in sent(lane, left, right, positions):
                right.memory[key][span] = data
                written[key][span] += 1
    for key, array in wanted.items():
        assert np.array_equal(right.memory[key], array)
        # No element's four bytes are all zero, and whole elements are written: once each, and nothing beside them.
        elements = array.view(np.uint32) != 0
        assert np.array_equal(written[key].reshape(-1, 4).max(axis=1) == 1, elements)
        assert written[key].max(initial=0) <= 1


def sent(
    lane: Lane, left: Side, right: Side, positions: tuple[int, int]
) -> Iterator[tuple[tuple[int, int, int], slice, npt.NDArray[np.uint8]]]:
    """(place in the target, its bytes, what is written) of a lane, layer by layer and run by run."""
    own = left.storages[lane.source_pp][lane.source_tp].group(lane.group)
    other = right.storages[lane.target_pp][lane.target_tp].group(lane.group)
    copies = plan_copies(source_page_size=left.page_size, target_page_size=right.page_size, positions=positions)
    source_cp, source_pages = (column[copies.source_page] for column in left.tables[lane.group])
    target_cp, target_pages = (column[copies.target_page] for column in right.tables[lane.group])
    for cp, to in itertools.product(range(left.sizes["cp"]), range(right.sizes["cp"])):
        chosen = (source_cp == cp) & (target_cp == to)
        runs = copy_runs(
            copies.take(chosen),
            lane=lane,
            source=own,
            target=other,
            pages=(source_pages[chosen], target_pages[chosen]),
        )
        memory = left.memory[lane.source_pp, cp, lane.source_tp]
        for layer, (begin, end, size) in itertools.product(lane.layers, runs.tolist()):
            first, last = own.layer_start(layer) + begin, other.layer_start(layer) + end
            yield (lane.target_pp, to, lane.target_tp), slice(last, last + size), memory[first : first + size]


@pytest.mark.parametrize(("source_tp", "target_tp"), [(8, 1), (8, 4), (4, 8), (8, 8)])
def test_replicated_heads_are_read_from_one_holder_and_written_to_all(source_tp: int, target_tp: int) -> None:
    model = description(2)
    shapes = [ReplicaShape(attention=AttentionSizes(tp=tp), experts=None) for tp in (source_tp, target_tp)]
    lanes = plan_lanes(model, source=shapes[0], target=shapes[1])
    for group in model.cache_groups:
        own = [lane for lane in lanes if lane.group == group.name and lane.heads is not None]
        assert {lane.target_tp for lane in own} == set(range(target_tp))
        assert len({lane.source_tp for lane in own}) == min(source_tp, group.num_kv_heads)
    # What heads share is read from the first tp rank.
    shared = [(lane.source_tp, lane.target_tp) for lane in lanes if lane.heads is None]
    assert shared == [(0, tp) for tp in range(target_tp)]


def whole_pages(source: Sizes, target: Sizes, *, pages: Ints, to: Ints) -> Ints:
    """The runs of as many whole pages of the window's keys and values."""
    model = description(2)
    left, right = (Side(model, sizes, num_tokens=4, seed=0) for sizes in (source, target))
    lane = next(lane for lane in plan_lanes(model, source=left.shape, target=right.shape) if lane.group == "window")
    size = source["page_size"]
    return copy_runs(
        plan_copies(source_page_size=size, target_page_size=target["page_size"], positions=(0, size * len(pages))),
        lane=lane,
        source=left.storages[0][0].group("window"),
        target=right.storages[0][0].group("window"),
        pages=(pages, to),
    )


ONE = {"pp": 1, "cp": 1, "tp": 1, "page_size": 4}


def test_whole_pages_of_equal_heads_are_one_run_each_and_neighbours_are_one_together() -> None:
    page = 2 * 4 * 4 * 2 * 4  # K and V, heads, positions, elements, bytes
    apart = whole_pages(ONE, ONE, pages=np.array([3, 5]), to=np.array([7, 1]))
    assert apart.tolist() == [[3 * page, 7 * page, page], [5 * page, page, page]]
    together = whole_pages(ONE, ONE, pages=np.array([3, 4]), to=np.array([6, 7]))
    assert together.tolist() == [[3 * page, 6 * page, 2 * page]]


def test_pages_of_another_size_are_cut_at_both_boundaries() -> None:
    copies = plan_copies(source_page_size=6, target_page_size=4, positions=(3, 13))
    assert copies.source_page.tolist() == [0, 0, 1, 1, 2]
    assert copies.source_start.tolist() == [3, 4, 0, 2, 0]
    assert copies.target_page.tolist() == [0, 1, 1, 2, 3]
    assert copies.target_start.tolist() == [3, 0, 2, 0, 0]
    assert copies.num_tokens.tolist() == [1, 2, 2, 4, 1]
    assert not len(plan_copies(source_page_size=6, target_page_size=4, positions=(5, 5)).num_tokens)
