"""On the prompts of the tests no gate is near a tie: there rounding would send a row elsewhere, and no layout agree."""

from pathlib import Path

import pytest

from tests.engine import test_families
from tests.engine.test_parity import prompts
from tests.harness.checkpoints import Oracle, sweep_model
from tests.harness.gate_margins import least_margin
from tests.sweep import runs

#: Scores of one layout and another differ by a few 1e-7.
LEAST_MARGIN = 5e-5


@pytest.mark.parametrize("family", ["glm4_moe", "glm4_moe_plain", "gpt_oss", "gpt_oss_mxfp4"])
def test_no_gate_of_a_tiny_model_is_near_a_tie(family: str, request: pytest.FixtureRequest) -> None:
    oracle: Oracle = request.getfixturevalue(family)
    assert least_margin(oracle, prompts(), n=test_families.NUM_TOKENS) > LEAST_MARGIN


@pytest.mark.parametrize("num_layers", [2, 8])
@pytest.mark.parametrize("family", ["glm4_moe"])
def test_no_gate_of_the_sweep_is_near_a_tie(family: str, num_layers: int, tmp_path: Path) -> None:
    oracle = sweep_model(tmp_path, family=family, num_layers=num_layers)
    assert least_margin(oracle, runs.prompts(), n=runs.NUM_TOKENS) > LEAST_MARGIN
