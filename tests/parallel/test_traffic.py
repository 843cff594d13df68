"""Bytes that ranks send, against numbers worked out by hand for a tiny model."""

from dataclasses import replace

import pytest

from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape
from parallel.traffic import StepTraffic, busiest_traffic, handoff_bytes_per_token
from tests.tiny_models import describe, glm4_moe, llama, mixtral, qwen3_moe

# 4 layers, hidden 32, 8 query heads and 4 KV heads of 4, vocabulary 50, 8 experts of which 2; float32.
DENSE = describe(llama())
MOE = describe(mixtral())
SETTINGS = EngineSettings(max_batch_tokens=48, max_sequences=12)


def sent(shape: ReplicaShape, *, pool: str = "prefill", pp_rank: int = 0) -> dict[str, int]:
    description = DENSE if shape.experts is None else MOE
    traffic = StepTraffic(description=description, shape=shape, settings=SETTINGS, pool=pool, pp_rank=pp_rank)
    return {row.axis: row.sent_bytes for row in traffic.axes()}


def dense(*, pp: int = 1, dp: int = 1, cp: int = 1, tp: int = 1) -> ReplicaShape:
    return ReplicaShape(pp=pp, attention=AttentionSizes(dp=dp, cp=cp, tp=tp), experts=None)


def moe(*, dp: int = 1, tp: int = 1, moe_dp: int = 1, ep: int = 1, moe_tp: int = 1) -> ReplicaShape:
    experts = ExpertSizes(moe_dp=moe_dp, ep=ep, moe_tp=moe_tp)
    return ReplicaShape(attention=AttentionSizes(dp=dp, tp=tp), experts=experts)


def test_one_rank_sends_nothing_and_neither_do_dp_and_moe_dp() -> None:
    assert sent(dense()) == {}
    assert sent(dense(dp=4)) == {}
    assert sent(moe(dp=2, moe_dp=2)) == {}


def test_tp_gathers_and_scatters_rows_around_each_block_and_at_both_ends() -> None:
    rows = 48 // 4 * 32 * 4
    logits = 3 * (32 * 4 + 13 * 4)  # 12 draws over 4 ranks, 50 tokens of the vocabulary over 4 ranks
    assert sent(dense(tp=4)) == {"attn_tp": 3 * (4 * 2 * 2 * rows + rows + logits)}
    # A layer of experts has one block that tp shares: attention.
    assert sent(moe(tp=4, moe_dp=4)) == {"attn_tp": 3 * (4 * 2 * rows + rows + logits)}


def test_a_shared_expert_gathers_and_scatters_as_a_dense_layer_does_and_only_layers_with_experts_dispatch() -> None:
    def of(config: dict[str, object]) -> dict[str, int]:
        shape = moe(tp=4, ep=4)
        traffic = StepTraffic(description=describe(config), shape=shape, settings=SETTINGS, pool="prefill", pp_rank=0)
        return {row.axis: row.sent_bytes for row in traffic.axes()}

    row, choice = 12 * 32 * 4, 12 * (2 * 32 * 4 + 3 * 8)
    ends = row + 3 * (32 * 4 + 13 * 4)
    shared = of(glm4_moe())
    assert shared == {"attn_tp": 3 * (4 * 2 * 2 * row + ends), "block": 3 * 3 * choice}
    mixed = of(qwen3_moe(mlp_only_layers=[0, 2], num_experts_per_tok=3))
    assert mixed == {"attn_tp": 3 * ((2 + 1 + 2 + 1) * 2 * row + ends), "block": 2 * 3 * choice}


def test_prefill_gathers_the_kv_of_its_share_of_tokens_new_and_cached() -> None:
    token = 4 * 2 * 4 * 4 * 4  # layers, K and V, heads, head size, bytes
    assert sent(dense(cp=4)) == {"attn_cp": 3 * 12 * token}
    assert sent(dense(cp=4, tp=2))["attn_cp"] == 3 * 12 * token // 2
    (row,) = busiest_traffic(DENSE, shape=dense(cp=4), settings=SETTINGS, pool="prefill")
    assert row.cached_bytes == 3 * 250 * token


def test_decode_passes_queries_and_new_kv_and_gets_partial_outputs() -> None:
    rows, new_kv = 12 // 4, 2 * 4 * 4 * 4
    assert sent(dense(cp=4), pool="decode") == {"attn_cp": 4 * 3 * rows * (8 * (2 * 4 * 4 + 4) + new_kv)}


def test_a_block_gathers_rows_with_their_choices_and_scatters_sums() -> None:
    assert sent(moe(dp=4, ep=2, moe_tp=2)) == {"block": 4 * 3 * 48 * (2 * 32 * 4 + 2 * 8)}
    # Two blocks of two ranks each: moe_dp moves nothing.
    assert sent(moe(dp=4, ep=2, moe_dp=2)) == {"block": 4 * 1 * 48 * (2 * 32 * 4 + 2 * 8)}


def test_a_shared_output_gathers_what_is_drawn_from_over_the_whole_stage_and_sends_logits_back() -> None:
    shape = replace(dense(dp=2, tp=2), shares_output=True)
    found, draws = sent(shape, pool="decode"), 6
    assert found["output"] == 3 * draws * (32 * 4 + 13 * 4)
    of_tp = draws * (32 * 4 + 25 * 4)
    assert sent(dense(dp=2, tp=2), pool="decode")["attn_tp"] - found["attn_tp"] == of_tp


def test_a_stage_sends_rows_on_and_the_last_one_drawn_tokens_back() -> None:
    shape = dense(pp=2, cp=2)
    assert sent(shape, pp_rank=0)["pp"] == 24 * 32 * 4
    assert sent(shape, pool="unified", pp_rank=1)["pp"] == 12 * 8
    assert "pp" not in sent(shape, pp_rank=1)  # what prefill draws is embedded elsewhere


def test_the_busiest_stage_stands_for_an_axis() -> None:
    shape = dense(pp=3, tp=2)
    stages = [sent(shape, pool="unified", pp_rank=rank) for rank in range(3)]
    rows = busiest_traffic(DENSE, shape=shape, settings=SETTINGS, pool="unified")
    assert {row.axis: row.sent_bytes for row in rows} == {
        axis: max(stage[axis] for stage in stages) for axis in ("pp", "attn_tp")
    }


@pytest.mark.parametrize(("tp", "copies"), [(1, 1), (2, 1), (4, 1), (8, 2)])
def test_a_hand_off_writes_each_head_once_for_each_rank_that_keeps_it(tp: int, copies: int) -> None:
    written = handoff_bytes_per_token(DENSE, source=dense(pp=2, cp=2), target=dense(tp=tp), settings=SETTINGS)
    assert written == copies * 4 * 2 * 4 * 4 * 4
