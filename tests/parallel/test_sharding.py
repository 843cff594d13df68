"""Who holds which part of the model: slices tile every tensor, whatever the layout."""

import itertools
from collections import Counter

import pytest

from parallel.model_share import ModelShare
from parallel.models.description import ModelDescription
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape
from parallel.sharding import check_heads, experts_of, kv_head_interval, stage_layers
from tests import tiny_models

LAYOUTS = [
    (pp, (dp, cp, tp), (moe_dp, ep, moe_tp))
    for pp, dp, cp, tp in itertools.product((1, 2, 3), (1, 2), (1, 2), (1, 2, 4, 8))
    for moe_dp, ep, moe_tp in itertools.product((1, 2), (1, 2, 4, 8), (1, 2, 4))
    if dp * cp * tp == moe_dp * ep * moe_tp
]


def mixtral() -> ModelDescription:
    return tiny_models.describe(tiny_models.mixtral())


@pytest.mark.parametrize(("pp", "attention", "experts"), LAYOUTS)
def test_the_slices_of_all_ranks_hold_every_element_equally_often(
    pp: int, attention: tuple[int, int, int], experts: tuple[int, int, int]
) -> None:
    model = mixtral()
    dp, cp, tp = attention
    moe_dp, ep, moe_tp = experts
    shape = ReplicaShape(
        pp=pp,
        attention=AttentionSizes(dp=dp, cp=cp, tp=tp),
        experts=ExpertSizes(moe_dp=moe_dp, ep=ep, moe_tp=moe_tp),
    )
    seen: dict[str, Counter[tuple[int, ...]]] = {}
    for rank in range(shape.world_size):
        for part in ModelShare(description=model, shape=shape, coordinates=shape.coordinates(rank)).slices():
            starts_and_ends = [(interval.start, interval.end) for interval in part.intervals]
            assert all(interval.size <= interval.padded for interval in part.intervals)
            elements = itertools.product(*(range(start, end) for start, end in starts_and_ends))
            # Rows and columns of one element each are enough to see a gap or an overlap.
            seen.setdefault(part.spec.name, Counter()).update(
                element for element in elements if element[-1] in (0, part.spec.shape[-1] - 1)
            )
    assert seen.keys() == {spec.name for spec in model.tensors}
    for spec in model.tensors:
        counts = seen[spec.name]
        wanted = [index for index in itertools.product(*map(range, spec.shape)) if index[-1] in (0, spec.shape[-1] - 1)]
        assert set(counts) == set(wanted)
        assert len(set(counts.values())) == 1


def stages_of(pp: int, *, draws_every_token: bool = True) -> ReplicaShape:
    return ReplicaShape(pp=pp, attention=AttentionSizes(), experts=None, draws_every_token=draws_every_token)


@pytest.mark.parametrize("num_layers", range(1, 13))
def test_stages_tile_the_layers_and_none_is_empty(num_layers: int) -> None:
    model = tiny_models.describe(tiny_models.llama(num_hidden_layers=num_layers))
    for pp in range(1, num_layers + 1):
        for shape in (stages_of(pp), stages_of(pp, draws_every_token=False)):
            stages = [stage_layers(model, shape=shape, pp_rank=rank) for rank in range(pp)]
            assert [layer for stage in stages for layer in stage] == list(range(num_layers))
            assert all(len(stage) for stage in stages)
    with pytest.raises(ValueError, match=f"pp {num_layers + 1} exceeds the model's {num_layers} layers"):
        stage_layers(model, shape=stages_of(num_layers + 1), pp_rank=0)


def test_kv_heads_are_replicated_over_neighbours_where_tp_exceeds_them() -> None:
    held = [kv_head_interval(4, tp=8, tp_rank=rank) for rank in range(8)]
    assert [(interval.start, interval.end) for interval in held] == [(h, h + 1) for h in range(4) for _ in range(2)]


def test_sizes_that_do_not_fit_name_the_legal_ones() -> None:
    with pytest.raises(ValueError, match="tp 3 does not fit 8 query heads and 4 KV heads: tp may be 1, 2, 4, 8"):
        check_heads(mixtral(), tp=3)
    with pytest.raises(ValueError, match="ep 3 does not divide 8 experts: ep may be 1, 2, 4, 8"):
        experts_of(mixtral(), ExpertSizes(ep=3))
