"""Every rope kind gives transformers' logits on any cut of a prompt, at positions beyond its original length too."""

from contextlib import closing

import pytest

from attention.torch_kernel.backend import TorchAttentionBackend
from parallel.models.registry import describe_checkpoint
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ReplicaShape
from tests.engine.test_parity import prompts
from tests.harness.checkpoints import ROPES, Oracle, tiny_scaled_llama
from tests.harness.local_replica import LocalReplica
from tests.harness.parity import assert_replica_agrees

NUM_TOKENS = 12
#: Steps of less than the longest prompts, so that their keys are rotated in several chunks.
SETTINGS = EngineSettings(page_size=16, max_batch_tokens=250, max_sequences=16, kv_tokens=4096)


@pytest.fixture(scope="module", params=ROPES)
def scaled_llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """A random tiny Llama for each rope kind that scales."""
    return tiny_scaled_llama(tmp_path_factory.mktemp(request.param), rope=request.param)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("cp", [1, 2])
def test_a_scaled_rope_gives_transformers_logits_whatever_the_cut(scaled_llama: Oracle, cp: int) -> None:
    longest = max(map(len, prompts()))
    assert longest + NUM_TOKENS <= describe_checkpoint(scaled_llama.folder).max_positions
    shape = ReplicaShape(attention=AttentionSizes(cp=cp), experts=None)
    replica = LocalReplica(scaled_llama.folder, shape=shape, settings=SETTINGS, make_backend=TorchAttentionBackend)
    with closing(replica):
        assert_replica_agrees(replica, scaled_llama, prompts(), n=NUM_TOKENS)
