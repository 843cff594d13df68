"""The placement table is honoured: experts swapped or held twice, in any block, give what experts in order give."""

from contextlib import closing
from dataclasses import replace

import pytest

from parallel.expert_table import expert_table
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape
from parallel.sharding import experts_of
from parallel.wire import shape_from_wire, sizes_to_wire
from tests import tiny_models
from tests.engine.test_kernels import NUM_TOKENS, SETTINGS, torch_backend
from tests.engine.test_parity import prompts
from tests.harness.checkpoints import Oracle
from tests.harness.local_replica import LocalReplica
from tests.harness.parity import assert_replica_agrees

SWAPPED = (5, 1, 2, 3, 4, 0, 6, 7)
IN_ORDER, REVERSED = tuple(range(8)), tuple(reversed(range(8)))
#: Expert 7, which the skewed gate likes best, in slots of both shares; expert 3 twice in one.
TWICE = (0, 1, 2, 3, 3, 7, 4, 5, 6, 7)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("dispatch", ["gather", "all_to_all"])
@pytest.mark.parametrize("placements", [(SWAPPED,), (TWICE,), (REVERSED, IN_ORDER, SWAPPED)])
def test_experts_swapped_or_held_twice_give_transformers_logits(
    placements: tuple[tuple[int, ...], ...], dispatch: str, mixtral: Oracle
) -> None:
    sizes = ExpertSizes(ep=2, moe_tp=2, placements=placements)
    shape = ReplicaShape(attention=AttentionSizes(dp=2, cp=2), experts=sizes)
    settings = replace(SETTINGS, dispatch=dispatch)
    replica = LocalReplica(mixtral.folder, shape=shape, settings=settings, make_backend=torch_backend)
    with closing(replica):
        assert_replica_agrees(replica, mixtral, prompts(), n=NUM_TOKENS)


def test_a_placement_that_cannot_be_is_refused_with_the_number_that_is_wrong() -> None:
    for placement, ep, sentence in (
        ((0, 1, 4), 1, r"placement\[2\] is 4, but the model has 3 experts: write 0 to 2"),
        ((0, 1, 1), 1, "placement leaves out expert 2: every expert needs a slot"),
        ((0, 1, 2, 2), 3, "ep 3 does not divide 4 slots of its placement: ep may be 1, 2, 4"),
        ((), 2, "ep 2 does not divide 3 experts: ep may be 1, 3"),
    ):
        with pytest.raises(ValueError, match=sentence):
            expert_table(num_experts=3, ep=ep, placement=placement)


def test_each_layer_with_experts_has_its_own_placement_and_one_stands_for_all() -> None:
    description = tiny_models.describe(tiny_models.glm4_moe())
    by_layer = experts_of(description, ExpertSizes(ep=4, placements=(REVERSED, IN_ORDER, SWAPPED)))
    assert {layer: table.held_by(0) for layer, table in by_layer.items()} == {1: (7, 6), 2: (0, 1), 3: (5, 1)}
    for placements, slots in ((), IN_ORDER), ((SWAPPED,), SWAPPED):
        tables = experts_of(description, ExpertSizes(ep=4, placements=placements))
        assert [table.slots for table in tables.values()] == [slots] * 3


@pytest.mark.parametrize(
    ("placements", "sentence"),
    [
        ((IN_ORDER, IN_ORDER), "placements are given for 2 layers: 3 layers have experts"),
        ((IN_ORDER, IN_ORDER, TWICE), "placements have 8, 10 slots: every layer needs equally many"),
    ],
)
def test_placements_that_do_not_fit_the_layers_are_refused(
    placements: tuple[tuple[int, ...], ...], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        experts_of(tiny_models.describe(tiny_models.glm4_moe()), ExpertSizes(ep=2, placements=placements))


@pytest.mark.parametrize("placements", [(), (TWICE,), (REVERSED, IN_ORDER, SWAPPED)])
def test_placements_come_back_from_the_wire_as_they_went(placements: tuple[tuple[int, ...], ...]) -> None:
    shape = ReplicaShape(attention=AttentionSizes(dp=2), experts=ExpertSizes(ep=2, placements=placements))
    assert shape_from_wire(sizes_to_wire(shape)) == shape
