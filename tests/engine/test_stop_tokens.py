"""Generations that end by a token, on real ranks with few slots and pages: what was planned past it harms nobody."""

from pathlib import Path

import numpy as np
import pytest

from proto import control_pb2
from router.generation import GenerationRequest
from tests.engine.test_parity import LAYOUTS
from tests.harness.checkpoints import VOCAB_SIZE, Oracle
from tests.harness.near_ties import first_near_tie
from tests.harness.running_router import greedy, running_router, topology

NUM_TOKENS = 24
#: Two sequences a dp coordinate, and pages for little more: each slot and page is used again at once.
TIGHT = {"page_size": 4, "max_batch_tokens": 32, "max_sequences": 2, "kv_tokens": 160}
#: Behind several stages a drawn token is under way for some steps, and its slot may have another owner by then.
PLACES = {name: LAYOUTS[name] for name in ("unified-dp1", "cp2-ep2")} | {
    "unified-pp2": ({"unified": {"pp": 2}}, 2),
    "decode-pp3": ({"prefill": {}, "decode": {"pp": 3}}, 4),
}


def stopping(prompt: tuple[int, ...], *, stop: int) -> GenerationRequest:
    return GenerationRequest(
        prompt_ids=prompt,
        max_new_tokens=NUM_TOKENS,
        stop_token_ids=frozenset([stop]),
        sampling=control_pb2.Sampling(temperature=0, top_p=1),
    )


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", PLACES)
def test_a_token_that_ends_one_sequence_leaves_its_neighbours_right(name: str, mixtral: Oracle, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    requests, expected = [], []
    for index in range(24):
        prompt = tuple(int(token) for token in random.integers(0, VOCAB_SIZE, 3 + index % 19))
        answer = mixtral.answer(prompt, NUM_TOKENS)
        stop = answer.token_ids[index % NUM_TOKENS]
        end = answer.token_ids.index(stop) + 1
        requests.append(stopping(prompt, stop=stop))
        expected.append(answer.token_ids[:end] if end <= first_near_tie(answer.logits) else None)
    pools, devices = PLACES[name]
    with running_router(topology(mixtral.folder, pools=pools, devices=devices, engine=TIGHT), tmp_path) as router:
        found = [tuple(generation.token_ids) for generation in router.generate_all(requests)]
        router.wait_until_empty()
    compared = [pair for pair in zip(found, expected, strict=True) if pair[1] is not None]
    assert len(compared) >= 18
    for got, wanted in compared:
        assert got == wanted


@pytest.mark.timeout(60)
def test_tokens_that_nobody_embeds_do_not_pile_up_before_the_first_stage(llama: Oracle, tmp_path: Path) -> None:
    content = topology(llama.folder, pools={"unified": {"pp": 2}}, devices=2, engine=TIGHT)
    with running_router(content, tmp_path) as router:
        for index in range(40):
            (generation,) = router.generate_all([greedy((1, 2, index), max_new_tokens=1)])
            assert len(generation.token_ids) == 1
        router.wait_until_empty()
