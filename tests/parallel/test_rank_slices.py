"""What each rank holds beside the tiling of tensors (test_sharding.py): owners, outer stages, padding, KV."""

from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.mesh import divisors
from parallel.model_share import ModelShare, TensorSlice
from parallel.models.description import ModelDescription, Part
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape
from parallel.sharding import even_interval, experts_of, kv_head_interval, stage_layers
from tests.tiny_models import describe, glm4_moe, gpt_oss, llama, mixtral, qwen2, qwen3, qwen3_moe

# Uneven on purpose: 50 words and a width of 20 are not divisible by 8, 3 KV heads meet 9 query heads.
DENSE = describe(llama())
MOE = describe(mixtral())
TIED = describe(mixtral(tie_word_embeddings=True))
BIASED = describe(qwen2())
MIXED = describe(qwen3_moe(mlp_only_layers=[1]))
SHARED = describe(glm4_moe())
PAIRED = describe(gpt_oss())
NORMED = describe(qwen3())
THREE_KV_HEADS = describe(llama(num_attention_heads=9, num_key_value_heads=3))


def dense_shapes(tps: tuple[int, ...] = (1, 2, 4, 8)) -> list[ReplicaShape]:
    return [
        ReplicaShape(pp=pp, attention=AttentionSizes(dp=dp, cp=2, tp=tp), experts=None)
        for pp, dp, tp in product((1, 2, 4), (1, 2), tps)
    ]


def moe_shapes() -> list[ReplicaShape]:
    return [
        ReplicaShape(
            pp=pp,
            attention=AttentionSizes(dp=8 // tp, tp=tp),
            experts=ExpertSizes(moe_dp=8 // ep // moe_tp, ep=ep, moe_tp=moe_tp),
        )
        for pp, tp, ep in product((1, 3), (1, 2, 8), divisors(8))
        for moe_tp in divisors(8 // ep)
    ]


CASES = [
    *((model, shape) for model in (DENSE, BIASED, NORMED) for shape in dense_shapes()),
    *((THREE_KV_HEADS, shape) for shape in dense_shapes((1, 3, 9))),
    *((model, shape) for model in (MOE, TIED, MIXED, SHARED, PAIRED) for shape in moe_shapes()),
]


def slices_by_tensor(description: ModelDescription, shape: ReplicaShape) -> dict[str, list[TensorSlice]]:
    """Every slice of every rank, by the tensor's name."""
    found: dict[str, list[TensorSlice]] = {spec.name: [] for spec in description.tensors}
    for rank in range(shape.world_size):
        for part in ModelShare(description=description, shape=shape, coordinates=shape.coordinates(rank)).slices():
            found[part.spec.name].append(part)
    return found


def test_every_rank_that_holds_a_tensor_holds_one_padded_size_of_it() -> None:
    for description, shape in CASES:
        for name, slices in slices_by_tensor(description, shape).items():
            assert len({part.num_elements for part in slices}) == 1, (shape, name)
            for part in slices:
                assert all(interval.size <= interval.padded for interval in part.intervals)


def test_a_bias_is_cut_as_the_rows_of_its_weight_and_counted() -> None:
    for shape in dense_shapes():
        for rank in range(shape.world_size):
            coordinates = shape.coordinates(rank)
            parts = {
                part.spec.name: part
                for part in ModelShare(description=BIASED, shape=shape, coordinates=coordinates).slices()
            }
            biases = [name for name in parts if name.endswith(".bias")]
            assert len(biases) == 3 * len(stage_layers(BIASED, shape=shape, pp_rank=coordinates.pp_rank))
            for name in biases:
                weight = parts[name.replace(".bias", ".weight")]
                assert parts[name].intervals == weight.intervals[:1]
                assert parts[name].num_elements * weight.spec.shape[1] == weight.num_elements


def test_a_bias_of_a_sum_over_ranks_is_held_by_the_first_of_them_alone() -> None:
    for shape in moe_shapes():
        assert shape.experts is not None
        for rank in range(shape.world_size):
            coordinates = shape.coordinates(rank)
            share = ModelShare(description=PAIRED, shape=shape, coordinates=coordinates)
            held = {part.spec.name for part in share.slices()}
            down = [name for name in held if name.endswith("down_proj_bias")]
            assert bool(down) == (coordinates.moe_tp_rank == 0)
            assert any(name.endswith("o_proj.bias") for name in held) == (coordinates.attn_tp_rank == 0)
            assert sum(name.endswith("gate_up_proj_bias") for name in held) == 8 // shape.experts.ep * len(share.layers)


def test_an_experts_width_of_pairs_is_cut_between_pairs_where_its_down_projection_is_cut() -> None:
    for shape in moe_shapes():
        for rank in range(shape.world_size):
            share = ModelShare(description=PAIRED, shape=shape, coordinates=shape.coordinates(rank))
            parts = {part.spec.name: part for part in share.slices()}
            for name in (name for name in parts if name.endswith(".down_proj")):
                (_, columns), (rows, _) = (
                    parts[found].intervals for found in (name, name.replace("down_proj", "gate_up_proj"))
                )
                assert (rows.start, rows.end, rows.padded) == (2 * columns.start, 2 * columns.end, 2 * columns.padded)


def test_an_expert_is_owned_once_in_each_moe_dp_block_and_read_by_no_other() -> None:
    for shape in moe_shapes():
        assert shape.experts is not None
        for rank in range(shape.world_size):
            coordinates = shape.coordinates(rank)
            for part in ModelShare(description=MOE, shape=shape, coordinates=coordinates).slices():
                if part.spec.expert is not None:
                    assert part.spec.layer is not None
                    table = experts_of(MOE, shape.experts)[part.spec.layer]
                    owner = table.slots_of[part.spec.expert][0] // table.slots_per_rank
                    assert owner == coordinates.moe_ep_rank
        for name, slices in slices_by_tensor(MOE, shape).items():
            if slices[0].spec.expert is not None:
                assert len(slices) == shape.experts.moe_dp * shape.experts.moe_tp, name


def test_experts_are_dealt_in_contiguous_equal_shares() -> None:
    for table in experts_of(MOE, ExpertSizes(ep=4)).values():
        assert [table.held_by(rank) for rank in range(4)] == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_a_layers_tensors_are_on_its_stage_alone() -> None:
    for description, shape in CASES:
        for rank in range(shape.world_size):
            coordinates = shape.coordinates(rank)
            layers = stage_layers(description, shape=shape, pp_rank=coordinates.pp_rank)
            for part in ModelShare(description=description, shape=shape, coordinates=coordinates).slices():
                assert part.spec.layer is None or part.spec.layer in layers


def test_embedding_and_output_are_on_the_outer_stages() -> None:
    attention = AttentionSizes()
    for description in (MOE, TIED):
        shape = ReplicaShape(pp=3, attention=attention, experts=ExpertSizes())
        parts = [
            {
                part.spec.part
                for part in ModelShare(
                    description=description, shape=shape, coordinates=shape.coordinates(rank)
                ).slices()
            }
            for rank in range(3)
        ]
        assert parts == [{Part.LAYER, Part.EMBEDDING}, {Part.LAYER}, {Part.LAYER, Part.OUTPUT}]


@pytest.mark.parametrize("shares_output", [False, True])
@pytest.mark.parametrize(("dp", "cp", "tp"), list(product((1, 2, 3), (1, 2), (1, 2))))
def test_the_ranks_along_the_outputs_axis_hold_its_vocabulary_in_their_order(
    dp: int, cp: int, tp: int, shares_output: bool
) -> None:
    sizes = AttentionSizes(dp=dp, cp=cp, tp=tp)
    shape = ReplicaShape(pp=2, attention=sizes, experts=None, shares_output=shares_output)
    size = TIED.vocab_size
    for group in (found for found in shape.groups(shape.output_axis) if found.ranks[0] >= shape.stage_size):
        assert len(group.ranks) == (dp * cp * tp if shares_output else tp)
        slices = [
            part.intervals[0]
            for rank in group.ranks
            for part in ModelShare(description=TIED, shape=shape, coordinates=shape.coordinates(rank)).slices()
            if part.spec.name == "lm_head.weight"
        ]
        assert [found.start for found in slices[1:]] == [found.end for found in slices[:-1]]
        assert (slices[0].start, slices[-1].end) == (0, size)
        assert {found.padded for found in slices} == {-(-size // len(group.ranks))}


def test_the_output_makes_the_last_stage_shorter_but_for_a_pool_of_prompts() -> None:
    description = describe(llama(num_hidden_layers=12, vocab_size=600))

    def sizes(draws_every_token: bool) -> list[int]:
        shape = ReplicaShape(pp=3, attention=AttentionSizes(), experts=None, draws_every_token=draws_every_token)
        return [len(stage_layers(description, shape=shape, pp_rank=index)) for index in range(3)]

    decode = sizes(True)
    assert decode[0] >= decode[1] > decode[2] >= 1
    assert sizes(False) == [4, 4, 4]


@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 500), parts=st.integers(1, 64))
def test_even_intervals_tile_and_only_the_end_is_padded(size: int, parts: int) -> None:
    intervals = [even_interval(size, parts=parts, index=index) for index in range(parts)]
    assert [row for interval in intervals for row in range(interval.start, interval.end)] == list(range(size))
    assert len({interval.padded for interval in intervals}) == 1
    assert 0 <= intervals[0].padded * parts - size < parts
    partial = [interval for interval in intervals if 0 < interval.size < interval.padded]
    assert len(partial) <= 1


@pytest.mark.parametrize(("num_kv_heads", "tp"), [(kv, tp) for kv in range(1, 9) for tp in range(1, 33)])
def test_kv_heads_are_shared_out_or_replicated_to_neighbours(num_kv_heads: int, tp: int) -> None:
    if num_kv_heads % tp and tp % num_kv_heads:
        return
    held = [kv_head_interval(num_kv_heads, tp=tp, tp_rank=rank) for rank in range(tp)]
    copies = Counter(head for interval in held for head in range(interval.start, interval.end))
    assert copies == Counter({head: max(1, tp // num_kv_heads) for head in range(num_kv_heads)})
    assert [interval.start for interval in held] == sorted(interval.start for interval in held)


def test_a_tp_ranks_query_heads_find_their_kv_heads_on_it() -> None:
    for description in (DENSE, THREE_KV_HEADS):
        ((num_heads, num_kv_heads),) = description.head_counts
        for tp in divisors(num_heads):
            if num_kv_heads % tp and tp % num_kv_heads:
                continue
            for rank in range(tp):
                queries = even_interval(num_heads, parts=tp, index=rank)
                heads = kv_head_interval(num_kv_heads, tp=tp, tp_rank=rank)
                needed = {query * num_kv_heads // num_heads for query in range(queries.start, queries.end)}
                assert needed == set(range(heads.start, heads.end))


def test_kv_per_token_counts_the_stages_layers_and_the_ranks_heads() -> None:
    shape = ReplicaShape(pp=2, attention=AttentionSizes(tp=8), experts=None)
    for rank in range(shape.world_size):
        coordinates = shape.coordinates(rank)
        layers = len(stage_layers(DENSE, shape=shape, pp_rank=coordinates.pp_rank))
        # 4 KV heads over 8 ranks: each holds one of them, K and V of 4 elements of 2 bytes.
        share = ModelShare(description=DENSE, shape=shape, coordinates=coordinates)
        assert share.token_bytes(EngineSettings(dtype="bfloat16")) == {"full": layers * 2 * 4 * 2}
