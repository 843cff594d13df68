"""The memory of a group: its size is the library's, it is there when it is made, and what cannot be is said."""

import ctypes
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from native.build import Build
from native.library import GroupShape, NativeLibrary
from parallel.group_memory import GroupMemoryShape, allocate_group_memory, max_sends, memory_shape
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 64])
@pytest.mark.parametrize(("outbox_bytes", "slot_bytes"), [(64 * 128, 128), (512 << 10, 128 << 10)])
@pytest.mark.parametrize("has_messages", [False, True])
def test_its_bytes_are_those_that_the_library_lays_out(
    size: int, outbox_bytes: int, slot_bytes: int, has_messages: bool
) -> None:
    shape = GroupMemoryShape(size=size, has_messages=has_messages, outbox_bytes=outbox_bytes, slot_bytes=slot_bytes)
    sizes = GroupShape(size, shape.num_slots, outbox_bytes, slot_bytes)
    assert NativeLibrary(Build().make()).group.num_bytes(ctypes.byref(sizes)) == shape.num_bytes


def test_a_rank_has_a_slot_for_each_way_besides_those_of_the_sends_that_may_be_under_way() -> None:
    assert GroupMemoryShape(size=3).num_slots == 3 * 2 + max_sends(3)


def test_only_the_sets_of_ranks_along_axes_with_messages_have_room_for_some() -> None:
    shape = ReplicaShape(pp=2, attention=AttentionSizes(dp=2, cp=2, tp=2), experts=ExpertSizes(ep=8))
    found = {ranks: memory_shape(ranks, shape=shape).has_messages for ranks in shape.creation_order()}
    assert {ranks for ranks, has_messages in found.items() if has_messages} == {
        group.ranks for axis in ("pp", "attn_cp") for group in shape.groups(axis)
    }
    assert not memory_shape(tuple(range(8)), shape=shape).num_slots


def test_what_is_allocated_has_all_its_pages() -> None:
    shape = GroupMemoryShape(size=2)
    descriptor = allocate_group_memory(shape)
    try:
        status = os.fstat(descriptor)
        assert status.st_size == shape.num_bytes
        assert status.st_blocks * 512 >= shape.num_bytes
    finally:
        os.close(descriptor)


def test_memory_that_cannot_be_had_is_an_error_now() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            allocate_group_memory(GroupMemoryShape(size=4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


@pytest.mark.parametrize(
    ("size", "sizes", "message"),
    [
        (65, {}, "a group of 65 ranks shares no memory: 1 to 64 can"),
        (4, {"outbox_bytes": 384}, "outbox_bytes 384 of 4 ranks"),
        (2, {"slot_bytes": 100}, "slot_bytes 100"),
    ],
)
def test_sizes_that_cannot_be_are_refused_with_their_numbers(size: int, sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupMemoryShape(size=size, **sizes)
