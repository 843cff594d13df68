"""Every family gives transformers' logits on the step path, from one rank and from several."""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from attention.torch_kernel.backend import TorchAttentionBackend
from parallel.models.registry import describe_checkpoint
from parallel.settings import EngineSettings
from tests.engine.test_kernels import SHAPES
from tests.engine.test_parity import ENGINE, LAYOUTS, prompts
from tests.harness.checkpoints import Oracle
from tests.harness.local_replica import LocalReplica
from tests.harness.parity import assert_logits_agree, assert_replica_agrees
from tests.harness.running_router import running_router, topology

FAMILIES = ["qwen2", "qwen3", "qwen3_moe", "qwen3_moe_sparse", "glm4_moe", "glm4_moe_plain", "gpt_oss", "gpt_oss_mxfp4"]
NUM_TOKENS = 16
SETTINGS = EngineSettings(page_size=16, max_batch_tokens=250, max_sequences=16, kv_tokens=4096)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["one", "dp2", "cp2", "tp6", "pp2 cp2 tp2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gives_transformers_logits(family: str, name: str, request: pytest.FixtureRequest) -> None:
    oracle: Oracle = request.getfixturevalue(family)
    has_experts = describe_checkpoint(oracle.folder).experts is not None
    shape = SHAPES[name] if has_experts else replace(SHAPES[name], experts=None)
    replica = LocalReplica(oracle.folder, shape=shape, settings=SETTINGS, make_backend=TorchAttentionBackend)
    with closing(replica):
        assert_replica_agrees(replica, oracle, prompts(), n=NUM_TOKENS)


def test_the_limit_and_the_sinks_of_the_tiny_gpt_oss_are_felt(gpt_oss: Oracle, tmp_path: Path) -> None:
    config = json.loads((gpt_oss.folder / "config.json").read_text())
    tensors = load_file(gpt_oss.folder / "model.safetensors")
    sinks = {name: value - 30 for name, value in tensors.items() if name.endswith(".sinks")}
    for name, changes, values in (("limit", {"swiglu_limit": 7.0}, {}), ("sinks", {}, sinks)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        save_file({**tensors, **values}, folder / "model.safetensors")
        replica = LocalReplica(folder, shape=SHAPES["one"], settings=SETTINGS, make_backend=TorchAttentionBackend)
        with closing(replica), pytest.raises(AssertionError, match="is off by"):
            assert_replica_agrees(replica, gpt_oss, prompts(), n=NUM_TOKENS)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe", "gpt_oss", "gpt_oss_mxfp4"])
def test_layers_of_both_kinds_go_through_the_router_and_the_hand_off(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    oracle: Oracle = request.getfixturevalue(family)
    pools, devices = LAYOUTS["cp2-ep2"]
    with running_router(topology(oracle.folder, pools=pools, devices=devices, engine=ENGINE), tmp_path) as router:
        assert_logits_agree(router, oracle, prompts(), n=NUM_TOKENS)
        router.wait_until_empty()
