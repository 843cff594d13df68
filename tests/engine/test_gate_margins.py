"""On the prompts of the tests no gate is near a tie: there rounding would send a row elsewhere, and no layout agree."""

from pathlib import Path

import pytest

from tests.engine import test_families
from tests.engine.test_parity import prompts
from tests.harness.checkpoints import Oracle, OracleAnswer, sweep_model
from tests.harness.gate_margins import least_margin
from tests.sweep import runs

#: Scores of one layout and another differ by a few 1e-7.
LEAST_MARGIN = 5e-5


@pytest.mark.parametrize("family", ["glm4_moe", "glm4_moe_plain", "gpt_oss", "gpt_oss_mxfp4"])
def test_no_gate_of_a_tiny_model_is_near_a_tie(family: str, request: pytest.FixtureRequest) -> None:
    oracle: Oracle = request.getfixturevalue(family)
    answers = [oracle.answer(prompt, test_families.NUM_TOKENS) for prompt in prompts()]
    assert least_margin(oracle, map(followed, prompts(), answers)) > LEAST_MARGIN


@pytest.mark.parametrize("num_layers", [2, 8])
@pytest.mark.parametrize("family", ["glm4_moe", "gpt_oss", "gpt_oss_wide"])
def test_no_gate_of_the_sweep_is_near_a_tie(family: str, num_layers: int, tmp_path: Path) -> None:
    oracle = sweep_model(tmp_path, family=family, num_layers=num_layers)
    requests = runs.copies()
    answers = [oracle.drawn(request.prompt_ids, runs.NUM_TOKENS, request.sampling) for request in requests]
    prompts = [request.prompt_ids for request in requests]
    assert least_margin(oracle, map(followed, prompts, answers)) > LEAST_MARGIN


def followed(prompt: tuple[int, ...], answer: OracleAnswer) -> tuple[int, ...]:
    """All that is computed for it: after the last token nothing is."""
    return (*prompt, *answer.token_ids[:-1])
