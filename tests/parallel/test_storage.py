"""Where bytes of KV lie, how many pages a group has, and what is refused."""

import itertools
from dataclasses import replace
from typing import Any

import pytest

from parallel.settings import EngineSettings
from parallel.storage import (
    EVERYTHING,
    CacheGroup,
    PageLayout,
    Plane,
    PlaneView,
    RankStorage,
    Window,
    check_alike,
    check_holds,
    keys_and_values,
    lay_out_page,
    lay_out_storage,
)
from parallel.storage_wire import storage_from_wire, storage_to_wire

WINDOW = keys_and_values("window", layers=(1, 3), sees=Window(tokens=40), num_kv_heads=4, head_size=8)
FULL = keys_and_values("full", layers=(0, 2), sees=EVERYTHING, num_kv_heads=4, head_size=8)


def places(page: PageLayout) -> list[int]:
    """The first byte of every element of a page, plane by plane."""
    return [
        plane.offset + head * plane.head_stride + position * plane.position_stride + element * plane.itemsize
        for plane in page.planes
        for head, position, element in itertools.product(
            range(plane.num_heads), range(page.page_size), range(plane.elements)
        )
    ]


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_element_of_a_page_has_bytes_of_its_own_inside_it(page_size: int, dtype: str) -> None:
    planes = [
        Plane(name="latent", elements=5, per_head=False),
        Plane(name="k", elements=3, per_head=True, dtype="float16"),
        Plane(name="v", elements=7, per_head=True),
    ]
    page = lay_out_page(planes, page_size=page_size, num_heads=3, dtype=dtype)
    found = places(page)
    itemsizes = [plane.itemsize for plane in page.planes for _ in range(plane.num_heads * page_size * plane.elements)]
    taken = [byte for place, size in zip(found, itemsizes, strict=True) for byte in range(place, place + size)]
    assert len(set(taken)) == len(taken) and max(taken) < page.page_bytes
    assert all(place % size == 0 for place, size in zip(found, itemsizes, strict=True))
    assert page.page_bytes % 16 == 0


def storage(*groups: CacheGroup, layers: range = range(4), page_size: int = 16) -> RankStorage:
    return lay_out_storage(
        groups,
        layers=layers,
        heads={group.name: (1, 2) for group in groups},
        num_pages={group.name: 3 + index for index, group in enumerate(groups)},
        page_size=page_size,
        dtype="float32",
    )


def test_a_region_holds_each_layer_of_each_group_once_and_no_layer_of_another_stage() -> None:
    whole = storage(FULL, WINDOW)
    page = 2 * 2 * 16 * 8 * 4
    starts = [whole.group("full").layer_start(layer) for layer in (0, 2)]
    starts += [whole.group("window").layer_start(layer) for layer in (1, 3)]
    assert starts == [0, 3 * page, 6 * page, 10 * page] and whole.num_bytes == 14 * page
    stage = storage(FULL, WINDOW, layers=range(3, 4))
    assert stage.group("full").num_bytes == 0 and stage.num_bytes == 4 * page


def test_storage_is_read_back_from_its_messages() -> None:
    whole = storage(FULL, WINDOW)
    assert storage_from_wire(storage_to_wire(whole)) == whole


@pytest.mark.parametrize(
    ("planes", "said"),
    [
        (
            replace(FULL, planes=(*FULL.planes, Plane(name="index", elements=4, per_head=False))),
            r"group full has the planes k, v here and k, v, index there",
        ),
        (
            replace(FULL, planes=tuple(replace(plane, dtype="float16") for plane in FULL.planes)),
            r"plane k of group full has dtype float32 here and float16 there",
        ),
        (
            replace(FULL, planes=(replace(FULL.planes[0], elements=9), FULL.planes[1])),
            r"plane k of group full has elements 8 here and 9 there",
        ),
        (replace(FULL, name="other"), r"there are the cache groups full here and other there"),
    ],
)
def test_pools_that_store_something_else_are_refused_by_name(planes: CacheGroup, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_alike(storage(FULL), storage(planes))


def test_pools_may_differ_in_pages_and_heads() -> None:
    other = lay_out_storage(
        [FULL], layers=range(4), heads={"full": (0, 4)}, num_pages={"full": 9}, page_size=4, dtype="float32"
    )
    check_alike(storage(FULL), other)


def test_a_region_without_a_layer_or_a_head_that_is_written_to_it_is_refused() -> None:
    region = storage(FULL).group("full")  # heads 1 and 2
    check_holds(region, layers=(0, 2), heads=(1, 3))
    with pytest.raises(ValueError, match="group full has no layer 1 there"):
        check_holds(region, layers=(0, 1), heads=(1, 2))
    with pytest.raises(ValueError, match="plane k of group full has the heads 1 to 2 there, not 0 to 1"):
        check_holds(region, layers=(0,), heads=(0, 2))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"value": PlaneView(plane="w", offset=0, width=8)}, "the value of group full lies in plane 'w'"),
        ({"key": PlaneView(plane="k", offset=1, width=8)}, r"elements \[1, 9\) of plane k, which has 8"),
        ({"value": PlaneView(plane="k", offset=0, width=8)}, "nothing would be left to tell that a row is broken"),
        (
            {"planes": (FULL.planes[0], replace(FULL.planes[1], dtype="float16"))},
            "the key and the value of group full have two dtypes",
        ),
    ],
)
def test_a_group_that_no_kernel_could_read_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(FULL, **changes)


def test_a_plane_that_is_not_stored_per_token_is_refused() -> None:
    with pytest.raises(ValueError, match="plane state is stored per 'sequence': only per 'token' is stored yet"):
        Plane(name="state", elements=4, per_head=True, unit="sequence")
    with pytest.raises(ValueError, match="plane k has dtype 'int3': those that run are float32, bfloat16, float16"):
        Plane(name="k", elements=4, per_head=True, dtype="int3")


def test_a_value_may_be_a_part_of_the_keys_plane() -> None:
    latent = Plane(name="latent", elements=24, per_head=False)
    group = CacheGroup(
        name="latent",
        layers=(0,),
        sees=EVERYTHING,
        num_kv_heads=1,
        planes=(latent,),
        key=PlaneView(plane="latent", offset=0, width=24),
        value=PlaneView(plane="latent", offset=0, width=16),
    )
    # What heads share is stored once, whatever the rank's heads are.
    assert group.token_bytes(num_heads=8, dtype="bfloat16") == 48


@pytest.mark.parametrize(
    ("changes", "pages"),
    [
        ({}, 4 * (3 + 2) + 3 * 8),  # a window of 40 is 3 pages of 16; two steps run, one is planned
        ({"max_sequences": 1}, 3 + 2 + 3 * 8),
        ({"kv_tokens": 160}, 10),  # never more than the groups that see everything
        ({"max_batch_tokens": 100}, 4 * (3 + 2) + 3 * 7),
    ],
)
def test_a_windows_group_has_pages_for_windows_and_for_the_steps_in_flight(changes: dict[str, int], pages: int) -> None:
    settings = EngineSettings(**{"max_sequences": 4, "max_batch_tokens": 128, "kv_tokens": 16384, **changes})  # type: ignore[arg-type]
    assert settings.pages_of(WINDOW, pp=2) == pages
    assert settings.pages_of(FULL, pp=2) == settings.kv_tokens // 16
