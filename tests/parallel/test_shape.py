"""The shape of a replica: both meshes and the stages, over every factorisation of W up to 16 with pp up to 4.

Every attention mesh with every pp, and every expert mesh with every pp; every pair of the two for W up to 8. The
meshes do not constrain each other beyond W, so the pairs add only what both have in common: the creation order.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import pytest

from parallel.shape import (
    ATTENTION_AXES,
    EXPERT_AXES,
    OUTPUT_AXIS,
    AttentionSizes,
    ExpertSizes,
    Group,
    RankCoordinates,
    ReplicaShape,
)
from tests.parallel.test_mesh import factorisations

STAGES = (1, 2, 3, 4)


def shape_of(*, pp: int, attention: tuple[int, int, int], experts: tuple[int, int, int] | None) -> ReplicaShape:
    dp, cp, tp = attention
    sizes = None if experts is None else ExpertSizes(moe_dp=experts[0], ep=experts[1], moe_tp=experts[2])
    return ReplicaShape(pp=pp, attention=AttentionSizes(dp=dp, cp=cp, tp=tp), experts=sizes)


def shapes_of_width(width: int) -> Iterator[ReplicaShape]:
    for pp in STAGES:
        for sizes in factorisations(width):
            yield shape_of(pp=pp, attention=sizes, experts=None)
            yield shape_of(pp=pp, attention=(width, 1, 1), experts=sizes)


def pairs_of_width(width: int) -> Iterator[ReplicaShape]:
    for pp in STAGES:
        for attention in factorisations(width):
            for experts in factorisations(width):
                yield shape_of(pp=pp, attention=attention, experts=experts)


def coordinate(shape: ReplicaShape, rank: int, axis: str) -> int | None:
    found: int | None = getattr(shape.coordinates(rank), f"{axis}_rank")
    return found


every_width = pytest.mark.parametrize("width", range(1, 17))


@every_width
def test_every_rank_is_in_exactly_one_group_of_each_axis(width: int) -> None:
    for shape in shapes_of_width(width):
        for axis in shape.axes:
            members = [rank for group in shape.groups(axis) for rank in group.ranks]
            assert sorted(members) == list(range(shape.world_size)), (shape, axis)


@every_width
def test_the_last_stages_ranks_are_the_group_along_an_output_that_they_share(width: int) -> None:
    for shape in (replace(shape, shares_output=True) for shape in shapes_of_width(width)):
        if shape.attention.tp == width:
            assert shape.output_axis == "attn_tp" and OUTPUT_AXIS not in shape.axes
            continue
        groups = [group.ranks for group in shape.groups(OUTPUT_AXIS)]
        last = tuple(range(shape.world_size - width, shape.world_size))
        assert groups == [*((rank,) for rank in range(shape.world_size - width)), last]
        assert len(groups) == shape.num_groups(OUTPUT_AXIS) and shape.first_group(OUTPUT_AXIS).ranks == last
        assert {shape.group_of(rank, OUTPUT_AXIS).ranks for rank in range(shape.world_size)} == set(groups)
        for rank in range(shape.world_size):
            of_rank = [ranks for ranks in shape.creation_order() if rank in ranks]
            assert list(shape.creation_order_of(rank)) == of_rank


@every_width
def test_groups_of_different_axes_of_one_mesh_meet_in_at_most_one_rank(width: int) -> None:
    for shape in shapes_of_width(width):
        for axes in (("pp", *ATTENTION_AXES), ("pp", *EXPERT_AXES) if shape.experts else ()):
            for first, second in combinations(axes, 2):
                for rank in range(shape.world_size):
                    both = set(shape.group_of(rank, first).ranks) & set(shape.group_of(rank, second).ranks)
                    assert both == {rank}, (shape, first, second)


@every_width
def test_coordinates_name_each_rank_once_in_either_mesh(width: int) -> None:
    for shape in shapes_of_width(width):
        for axes in (("pp", *ATTENTION_AXES), ("pp", *EXPERT_AXES)):
            if axes[1] == "moe_dp" and shape.experts is None:
                continue
            seen = {tuple(coordinate(shape, rank, axis) for axis in axes) for rank in range(shape.world_size)}
            assert len(seen) == shape.world_size, shape


@every_width
def test_coordinates_follow_the_printed_arithmetic(width: int) -> None:
    for shape in shapes_of_width(width):
        for rank in range(shape.world_size):
            pp_rank, r = divmod(rank, width)
            dense = shape.attention
            experts = shape.experts
            assert shape.coordinates(rank) == RankCoordinates(
                global_rank=rank,
                pp_rank=pp_rank,
                attn_tp_rank=r % dense.tp,
                attn_cp_rank=r // dense.tp % dense.cp,
                attn_dp_rank=r // (dense.tp * dense.cp),
                moe_tp_rank=r % experts.moe_tp if experts else None,
                moe_ep_rank=r // experts.moe_tp % experts.ep if experts else None,
                moe_dp_rank=r // (experts.moe_tp * experts.ep) if experts else None,
            )


@every_width
def test_attention_rank_is_the_inverse_of_coordinates(width: int) -> None:
    for shape in shapes_of_width(width):
        for rank in range(shape.world_size):
            at = shape.coordinates(rank)
            assert rank == shape.attention_rank(
                pp_rank=at.pp_rank, dp=at.attn_dp_rank, cp=at.attn_cp_rank, tp=at.attn_tp_rank
            )


@every_width
def test_only_groups_of_pp_cross_stages(width: int) -> None:
    for shape in shapes_of_width(width):
        for axis in shape.axes:
            for group in shape.groups(axis):
                stages = {rank // width for rank in group.ranks}
                assert len(stages) == (shape.pp if axis == "pp" else 1), (shape, axis)


@every_width
def test_a_group_holds_the_ranks_that_differ_in_its_axis_only(width: int) -> None:
    for shape in shapes_of_width(width):
        for axes in (("pp", *ATTENTION_AXES), ("pp", *EXPERT_AXES) if shape.experts else ()):
            for axis in axes:
                for group in shape.groups(axis):
                    others = {
                        tuple(coordinate(shape, rank, other) for other in axes if other != axis) for rank in group.ranks
                    }
                    assert len(others) == 1, (shape, axis)
                    assert len(group.ranks) == len({coordinate(shape, rank, axis) for rank in group.ranks})


@every_width
def test_a_block_holds_the_ranks_of_one_moe_dp_coordinate_and_stage(width: int) -> None:
    for shape in shapes_of_width(width):
        if shape.experts is None:
            continue
        found = [group.ranks for group in shape.groups("block")]
        size = shape.experts.ep * shape.experts.moe_tp
        assert found == [tuple(range(first, first + size)) for first in range(0, shape.world_size, size)]


@pytest.mark.parametrize("width", range(1, 9))
def test_each_ranks_creation_order_is_its_part_of_the_whole(width: int) -> None:
    for shape in pairs_of_width(width):
        whole = shape.creation_order()
        for rank in range(shape.world_size):
            assert shape.creation_order_of(rank) == tuple(ranks for ranks in whole if rank in ranks), shape


@pytest.mark.parametrize("width", range(1, 9))
def test_each_set_of_two_or_more_ranks_is_created_once_and_no_other(width: int) -> None:
    for shape in pairs_of_width(width):
        created = shape.creation_order()
        groups = {group.ranks for axis in shape.axes for group in shape.groups(axis)}
        assert len(created) == len(set(created))
        assert set(created) == {ranks for ranks in groups if len(ranks) > 1}, shape


def test_one_rank_has_every_group_and_creates_none() -> None:
    shape = shape_of(pp=1, attention=(1, 1, 1), experts=(1, 1, 1))
    assert [group for axis in shape.axes for group in shape.groups(axis)] == [
        Group(axis=axis, ranks=(0,)) for axis in shape.axes
    ]
    assert shape.creation_order() == ()


def test_the_example_of_the_design() -> None:
    shape = shape_of(pp=1, attention=(1, 2, 4), experts=(2, 4, 1))
    pairs, halves = [(0, 4), (1, 5), (2, 6), (3, 7)], [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [group.ranks for group in shape.groups("attn_cp")] == pairs
    assert [group.ranks for group in shape.groups("moe_dp")] == pairs
    assert [group.ranks for group in shape.groups("attn_tp")] == halves
    assert [group.ranks for group in shape.groups("moe_ep")] == halves
    assert shape.creation_order() == (*pairs, *halves)


def test_a_dense_model_has_no_expert_axes() -> None:
    shape = shape_of(pp=2, attention=(2, 1, 1), experts=None)
    assert shape.axes == ("pp", *ATTENTION_AXES)
    assert shape.expert_mesh is None
    with pytest.raises(ValueError, match="no axis moe_ep in a replica without experts"):
        shape.group_of(0, "moe_ep")


@every_width
def test_every_product_that_is_not_the_stage_is_refused_with_the_arithmetic(width: int) -> None:
    for attention in factorisations(width):
        for wrong in range(1, 17):
            if wrong == width:
                continue
            with pytest.raises(ValueError, match=re.escape(f"moe_dp 1 x ep {wrong} x moe_tp 1 = {wrong} ranks")):
                shape_of(pp=1, attention=attention, experts=(1, wrong, 1))


def test_a_remainder_names_the_legal_ep_where_the_rest_fits() -> None:
    with pytest.raises(ValueError, match=r"dp 1 x cp 2 x tp 4 = 8: .* with moe_dp 2 and moe_tp 1, ep must be 4"):
        shape_of(pp=1, attention=(1, 2, 4), experts=(2, 3, 1))


def test_a_remainder_names_all_legal_sizes_where_the_rest_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"no ep fits moe_dp 3 .* make that product one of 1, 2, 4, 8 \(nearest: 2\)"):
        shape_of(pp=1, attention=(8, 1, 1), experts=(3, 5, 1))


def test_sizes_below_one_are_errors() -> None:
    with pytest.raises(ValueError, match="pp is 0"):
        shape_of(pp=0, attention=(1, 1, 1), experts=None)
    for attention in ((0, 1, 1), (1, 0, 1), (1, 1, 0), (-1, -1, 1)):
        with pytest.raises(ValueError, match="a size is 1 or more"):
            shape_of(pp=1, attention=attention, experts=None)
        with pytest.raises(ValueError, match="a size is 1 or more"):
            shape_of(pp=1, attention=(1, 1, 1), experts=attention)


def test_a_rank_outside_the_replica_is_an_error() -> None:
    shape = shape_of(pp=2, attention=(2, 1, 1), experts=None)
    for rank in (-1, 4):
        with pytest.raises(ValueError, match=f"global rank {rank} is outside a replica of 4 ranks"):
            shape.coordinates(rank)
