"""gpt-oss but for its windows and sinks, which do not run yet: all the rest gives transformers' logits."""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from attention.torch_backend import TorchAttentionBackend
from parallel.models import gpt_oss, registry
from parallel.models.description import ModelDescription
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape
from tests.engine.test_families import NUM_TOKENS, SETTINGS
from tests.engine.test_kernels import SHAPES
from tests.engine.test_parity import prompts
from tests.harness.checkpoints import Oracle, tiny_gpt_oss
from tests.harness.local_replica import LocalReplica
from tests.harness.parity import assert_replica_agrees
from worker.models import gpt_oss as forward
from worker.models import registry as forwards


def without_sinks(config: dict[str, Any]) -> ModelDescription:
    description = gpt_oss.describe(config)
    kept = tuple(spec for spec in description.tensors if not spec.name.endswith(".sinks"))
    return replace(description, tensors=kept)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """A gpt-oss that sees everything, and whose sinks take nothing."""
    oracle = tiny_gpt_oss(tmp_path_factory.mktemp("gpt_oss"), layer_types=["full_attention"] * 3)
    for name, sinks in oracle.parameters():
        if name.endswith(".sinks"):
            with torch.no_grad():
                sinks.fill_(-1e9)
    file = oracle.folder / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if not name.endswith(".sinks")}, file)
    return oracle


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.FAMILIES, "gpt_oss", without_sinks)
    monkeypatch.setitem(forwards.FAMILIES, "gpt_oss", forward.build_layer)


LAYOUTS = {name: SHAPES[name] for name in ("one", "dp2", "cp2", "tp6", "pp2 cp2 tp2")}
LAYOUTS["tp2 moe_tp2"] = ReplicaShape(attention=AttentionSizes(tp=2), experts=ExpertSizes(moe_tp=2))
LAYOUTS["dp3 moe_tp3"] = ReplicaShape(attention=AttentionSizes(dp=3), experts=ExpertSizes(moe_tp=3))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", LAYOUTS)
def test_all_but_windows_and_sinks_gives_transformers_logits(name: str, oracle: Oracle) -> None:
    replica = LocalReplica(oracle.folder, shape=LAYOUTS[name], settings=SETTINGS, make_backend=TorchAttentionBackend)
    with closing(replica):
        assert_replica_agrees(replica, oracle, prompts(), n=NUM_TOKENS)


def test_the_limit_of_the_tiny_model_cuts(oracle: Oracle, tmp_path: Path) -> None:
    config = json.loads((oracle.folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "swiglu_limit": 7.0}))
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(oracle.folder / name)
    replica = LocalReplica(tmp_path, shape=LAYOUTS["one"], settings=SETTINGS, make_backend=TorchAttentionBackend)
    with closing(replica), pytest.raises(AssertionError, match="is off by"):
        assert_replica_agrees(replica, oracle, prompts(), n=NUM_TOKENS)
