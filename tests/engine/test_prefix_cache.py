"""Prompts that begin alike share pages: the same logits, less to compute, eviction, and the key that turns it off."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape
from tests.engine.test_kernels import SETTINGS, torch_backend
from tests.harness.checkpoints import VOCAB_SIZE, Oracle
from tests.harness.local_replica import LocalReplica
from tests.harness.parity import assert_logits_agree, assert_replica_agrees
from tests.harness.running_router import greedy, running_router, topology

NUM_TOKENS = 6
COMMON = tuple(index * 7 % VOCAB_SIZE for index in range(100))
#: The whole of another one, a longer one, one that leaves inside a page, one that shares nothing.
PROMPTS = (COMMON, (*COMMON, 1, 2, 3), (*COMMON[:70], *range(50)), tuple(range(9)), COMMON[:96])
SHAPES = {
    "one": ReplicaShape(attention=AttentionSizes(), experts=ExpertSizes()),
    "cp2": ReplicaShape(attention=AttentionSizes(cp=2), experts=ExpertSizes(ep=2)),
    "pp2 dp2 cp2": ReplicaShape(pp=2, attention=AttentionSizes(dp=2, cp=2), experts=ExpertSizes(moe_dp=2, ep=2)),
}


@pytest.mark.timeout(90)
@pytest.mark.parametrize("exchange", ["gather", "ring", "pass_q"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_cached_prefix_gives_transformers_logits(name: str, exchange: str, mixtral: Oracle) -> None:
    settings = replace(SETTINGS, exchange=exchange, max_batch_tokens=40)
    replica = LocalReplica(mixtral.folder, shape=SHAPES[name], settings=settings, make_backend=torch_backend)
    with closing(replica):
        assert_replica_agrees(replica, mixtral, PROMPTS[:1], n=NUM_TOKENS)
        assert replica.cached_tokens == {1: 0}
        assert_replica_agrees(replica, mixtral, PROMPTS, n=NUM_TOKENS)
        # Of its 100 tokens 6 pages of 16 are found; of the prompt of 96 five, as its last token is to be computed.
        assert replica.cached_tokens == {1: 96, 2: 96, 3: 64, 4: 0, 5: 80}


@pytest.mark.timeout(90)
@pytest.mark.parametrize("name", SHAPES)
def test_a_later_turn_finds_what_was_answered_but_for_a_page_whose_last_token_was_not_computed(
    name: str, mixtral: Oracle
) -> None:
    settings = replace(SETTINGS, max_batch_tokens=40)
    replica = LocalReplica(mixtral.folder, shape=SHAPES[name], settings=settings, make_backend=torch_backend)
    first = COMMON[:20]
    answer = mixtral.answer(first, 28).token_ids  # 20 + 28 are three pages of 16, and of the last token there is no KV
    second = (*first, *answer, 1, 2, 3)
    third = (*second, *mixtral.answer(second, NUM_TOKENS).token_ids, 4)
    with closing(replica):
        for prompt, num_tokens, cached_tokens in ((first, 28, 0), (second, NUM_TOKENS, 32), (third, NUM_TOKENS, 48)):
            assert_replica_agrees(replica, mixtral, [prompt], n=num_tokens)
            assert replica.cached_tokens == {1: cached_tokens}


@pytest.mark.timeout(90)
def test_the_key_turns_it_off(mixtral: Oracle) -> None:
    settings = replace(SETTINGS, prefix_cache=False)
    replica = LocalReplica(mixtral.folder, shape=SHAPES["one"], settings=settings, make_backend=torch_backend)
    with closing(replica):
        for _ in range(2):
            assert_replica_agrees(replica, mixtral, PROMPTS[:1], n=NUM_TOKENS)
            assert replica.cached_tokens == {1: 0}


@pytest.mark.timeout(120)
def test_a_cached_prefix_is_handed_off_whole_and_told_in_the_usage(mixtral: Oracle, tmp_path: Path) -> None:
    pools = {"prefill": {"attention": {"cp": 2}}, "decode": {"engine": {"page_size": 8}}}
    engine = {"kv_tokens": 1024, "max_batch_tokens": 64}
    content = topology(mixtral.folder, pools=pools, devices=3, engine=engine)
    with running_router(content, tmp_path) as router:
        for _ in range(2):
            assert_logits_agree(router, mixtral, [COMMON], n=NUM_TOKENS)
            (generation,) = router.generate_all([greedy(COMMON, max_new_tokens=2)])
            assert generation.cached_tokens == 96
            # K and V of 2 heads of 16 float32 in 3 layers, for every token, the cached ones too.
            assert generation.handoff_bytes == len(COMMON) * 3 * 2 * 2 * 16 * 4
        router.wait_until_empty()
