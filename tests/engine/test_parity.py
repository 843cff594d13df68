"""Any layout gives transformers' logits and tokens: real processes on gloo, through the router, on tiny models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.harness.checkpoints import VOCAB_SIZE, Oracle
from tests.harness.parity import assert_logits_agree, assert_tokens_agree
from tests.harness.running_router import greedy, running_router, topology

NUM_TOKENS = 64
LENGTHS = (1, 2, 3, 15, 16, 17, 300, 611)
#: Less than the longest prompt, and no multiple of the page size.
ENGINE = {"page_size": 16, "max_batch_tokens": 250, "max_sequences": 16, "kv_tokens": 4096}


def layout(*, prefill: dict[str, int], decode: dict[str, int]) -> dict[str, Any]:
    return {"prefill": {"attention": prefill}, "decode": {"attention": decode}}


LAYOUTS: dict[str, tuple[dict[str, Any], int]] = {
    "cp1-ep1": (layout(prefill={}, decode={}), 2),
    "cp2-ep2": (layout(prefill={"cp": 2}, decode={"dp": 2}), 4),
    "cp4-ep1": (layout(prefill={"cp": 4}, decode={}), 5),
    "cp1-ep4": (layout(prefill={}, decode={"dp": 4}), 5),
    "dp2cp2-ep2": (layout(prefill={"dp": 2, "cp": 2}, decode={"dp": 2}), 6),
    "unified-dp1": ({"unified": {"attention": {"dp": 1}}}, 1),
    "unified-dp2": ({"unified": {"attention": {"dp": 2}}}, 2),
}


def prompts() -> list[tuple[int, ...]]:
    random = np.random.default_rng(7)
    return [tuple(int(token) for token in random.integers(0, VOCAB_SIZE, length)) for length in LENGTHS]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_every_layout_gives_the_tokens_of_transformers(
    name: str, family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    oracle: Oracle = request.getfixturevalue(family)
    pools, devices = LAYOUTS[name]
    with running_router(topology(oracle.folder, pools=pools, devices=devices, engine=ENGINE), tmp_path) as router:
        assert_logits_agree(router, oracle, prompts(), n=NUM_TOKENS)
        requests = [greedy(prompt, max_new_tokens=NUM_TOKENS) for prompt in prompts()]
        alone = [router.generate_all([item])[0] for item in requests]
        assert_tokens_agree(alone, oracle, n=NUM_TOKENS)
        assert_tokens_agree(router.generate_all(requests, stagger_s=0.02), oracle, n=NUM_TOKENS)
        router.wait_until_empty()
