"""What a step costs a stage, against numbers worked out by hand for a tiny model."""

import pytest

from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape
from parallel.stage_cost import CacheCost, StageCost, stage_costs
from tests.tiny_models import describe, gpt_oss, llama, mixtral

# 4 layers, hidden 32, 8 query heads and 4 KV heads of 4, width 20, vocabulary 50, 8 experts of which 2; float32.
ATTENTION = 2 * 32 * 32 + 2 * 16 * 32
WIDE = 3 * 20 * 32
NORMS = 2 * 32
SETTINGS = EngineSettings()


def dense(*, pp: int = 1, tp: int = 1) -> ReplicaShape:
    return ReplicaShape(pp=pp, attention=AttentionSizes(tp=tp), experts=None)


def test_a_stage_reads_its_layers_and_the_last_the_output_but_none_the_embedding() -> None:
    first, last = stage_costs(describe(llama()), shape=dense(pp=2), settings=SETTINGS)
    assert first.weight_bytes == 4 * 2 * (ATTENTION + WIDE + NORMS)
    assert first.row_flops == 2 * 2 * (ATTENTION + WIDE)
    assert last.weight_bytes == first.weight_bytes + 4 * (32 + 50 * 32)
    assert last.row_flops == first.row_flops + 2 * 50 * 32
    # Keys and values of 4 heads of 4 in 2 layers; 8 heads of scores and of sums.
    assert first.caches == last.caches == (CacheCost(key_bytes=2 * 2 * 4 * 4 * 4, key_flops=2 * 8 * 16, window=0),)
    assert (first.expert_bytes, first.visits) == (0, 0)


def test_an_output_that_is_tied_to_the_embedding_is_read_where_it_is_the_output() -> None:
    tied = stage_costs(describe(llama(tie_word_embeddings=True)), shape=dense(pp=2), settings=SETTINGS)
    assert tied == stage_costs(describe(llama()), shape=dense(pp=2), settings=SETTINGS)


def test_ranks_that_share_an_output_read_a_part_of_it_each_and_meet_it_with_the_rows_of_all() -> None:
    def cost(*, shares_output: bool) -> StageCost:
        sizes = AttentionSizes(dp=2)
        shape = ReplicaShape(attention=sizes, experts=None, shares_output=shares_output)
        return stage_costs(describe(llama()), shape=shape, settings=SETTINGS)[0]

    alone, shared = cost(shares_output=False), cost(shares_output=True)
    assert alone.weight_bytes - shared.weight_bytes == 4 * 25 * 32
    assert alone.row_flops == shared.row_flops


def test_weights_are_counted_as_they_are_held_and_split_over_tp() -> None:
    (whole,) = stage_costs(describe(llama()), shape=dense(), settings=SETTINGS)
    (half,) = stage_costs(describe(llama()), shape=dense(), settings=EngineSettings(weights="bfloat16"))
    matrices = 4 * (ATTENTION + WIDE) + 50 * 32
    assert whole.weight_bytes - half.weight_bytes == 2 * matrices
    (split,) = stage_costs(describe(llama()), shape=dense(tp=2), settings=SETTINGS)
    assert split.row_flops == whole.row_flops // 2
    assert split.key_bytes(7) == whole.key_bytes(7) / 2


@pytest.mark.parametrize(("moe_dp", "ep"), [(1, 4), (2, 2), (4, 1)])
def test_of_experts_those_are_read_that_rows_of_the_block_visit(moe_dp: int, ep: int) -> None:
    experts = ExpertSizes(moe_dp=moe_dp, ep=ep)
    shape = ReplicaShape(attention=AttentionSizes(dp=2, cp=2), experts=experts)
    (cost,) = stage_costs(describe(mixtral()), shape=shape, settings=SETTINGS)
    held = 4 * (8 // ep) * WIDE
    assert cost.expert_bytes == 4 * held
    assert cost.block_rows == 4 / moe_dp
    # One row of each coordinate: 4 / moe_dp in the block, each with 2 of 8 experts.
    assert cost.read_bytes(1) == pytest.approx(cost.weight_bytes + 4 * held * (1 - 0.75 ** (4 / moe_dp)))
    assert cost.read_bytes(1000) == pytest.approx(cost.weight_bytes + 4 * held)
    assert cost.flops(3) == pytest.approx(3 * (cost.row_flops + 2 * held * 4 / moe_dp / 4))


def test_a_window_bounds_the_keys_that_a_row_meets() -> None:
    (cost,) = stage_costs(
        describe(gpt_oss()), shape=ReplicaShape(attention=AttentionSizes(), experts=ExpertSizes()), settings=SETTINGS
    )
    windows = {cache.window for cache in cost.caches}
    assert 0 in windows and len(windows) == 2
    window = max(windows)
    inside, beyond = cost.key_bytes(window), cost.key_bytes(2 * window)
    assert inside < beyond < 2 * inside
