"""The engine gives transformers' logits through either kernel: torch, and FlashInfer over a double of its functions."""

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from attention.flashinfer_backend import FlashInferAttentionBackend
from attention.interface import AttentionBackend, AttentionSpec
from attention.torch_backend import TorchAttentionBackend
from parallel.settings import EngineSettings
from proto import control_pb2
from tests.attention import flashinfer_double
from tests.engine.test_parity import prompts
from tests.harness.checkpoints import Oracle
from tests.harness.local_replica import LocalReplica, MakeBackend
from tests.harness.parity import TOLERANCE

NUM_TOKENS = 24
SETTINGS = EngineSettings(page_size=16, max_batch_tokens=250, max_sequences=16, kv_tokens=4096)


def torch_backend(spec: AttentionSpec) -> AttentionBackend:
    return TorchAttentionBackend(spec)


def flashinfer_backend(spec: AttentionSpec) -> AttentionBackend:
    return FlashInferAttentionBackend(spec, library=flashinfer_double, workspace_bytes=1024)


def submits(oracle: Oracle, *, count: int) -> Iterator[control_pb2.Submit]:
    """A probe along the oracle's own tokens for each prompt."""
    for index, prompt in enumerate(prompts(), 1):
        answer = oracle.answer(prompt, NUM_TOKENS)
        yield control_pb2.Submit(
            request_id=index,
            prompt_ids=prompt,
            max_new_tokens=count,
            sampling=control_pb2.Sampling(top_p=1),
            probe=control_pb2.Probe(forced_ids=answer.token_ids, logits=True),
        )


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
        found = replica.run(list(submits(oracle, count=count)))
    for index, prompt in enumerate(prompts(), 1):
        wanted = oracle.answer(prompt, NUM_TOKENS).logits[:count]
        error = np.abs(np.stack(found[index]) - wanted).max(axis=1) / np.abs(wanted).max(axis=1)
        assert error.max() <= TOLERANCE, f"prompt of {len(prompt)}: {error.max():.1e}"
