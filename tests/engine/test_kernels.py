"""The engine gives transformers' logits through either kernel: torch, and FlashInfer over a double of its functions."""

from contextlib import closing

import pytest

from attention.flashinfer_backend import FlashInferAttentionBackend
from attention.interface import AttentionBackend, AttentionSpec
from attention.torch_backend import TorchAttentionBackend
from parallel.settings import EngineSettings
from tests.attention import flashinfer_double
from tests.engine.test_parity import prompts
from tests.harness.checkpoints import Oracle
from tests.harness.local_replica import LocalReplica, MakeBackend
from tests.harness.parity import assert_replica_agrees

NUM_TOKENS = 24
SETTINGS = EngineSettings(page_size=16, max_batch_tokens=250, max_sequences=16, kv_tokens=4096)


def torch_backend(spec: AttentionSpec) -> AttentionBackend:
    return TorchAttentionBackend(spec)


def flashinfer_backend(spec: AttentionSpec) -> AttentionBackend:
    return FlashInferAttentionBackend(spec, library=flashinfer_double, workspace_bytes=1024)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("backend", [torch_backend, flashinfer_backend])
@pytest.mark.parametrize(("dp", "cp", "count"), [(1, 1, NUM_TOKENS), (2, 1, NUM_TOKENS), (1, 2, 1), (2, 2, 1)])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_step_path_gives_transformers_logits_through_both_kernels(
    family: str, dp: int, cp: int, count: int, backend: MakeBackend, request: pytest.FixtureRequest
) -> None:
    oracle: Oracle = request.getfixturevalue(family)
    replica = LocalReplica(oracle.folder, settings=SETTINGS, make_backend=backend, dp=dp, cp=cp)
    with closing(replica):
        assert_replica_agrees(replica, oracle, prompts(), n=count)
