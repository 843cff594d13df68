"""The engine gives transformers' logits through either kernel: torch, and FlashInfer over a double of its functions."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from attention.flashinfer_backend import FlashInferAttentionBackend
from attention.interface import AttentionBackend, AttentionSpec
from attention.torch_backend import TorchAttentionBackend
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape
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


def shape(*, pp: int = 1, dp: int = 1, cp: int = 1, tp: int = 1, moe_dp: int = 1, moe_tp: int = 1) -> ReplicaShape:
    width = dp * cp * tp
    return ReplicaShape(
        pp=pp,
        attention=AttentionSizes(dp=dp, cp=cp, tp=tp),
        experts=ExpertSizes(moe_dp=moe_dp, ep=width // (moe_dp * moe_tp), moe_tp=moe_tp),
    )


SHAPES = {
    "one": shape(),
    "dp2": shape(dp=2),
    "cp2": shape(cp=2),
    "tp2": shape(tp=2),
    "tp6": shape(tp=6, moe_tp=3),
    "pp3": shape(pp=3),
    "pp2 dp2 cp2": shape(pp=2, dp=2, cp=2, moe_dp=2, moe_tp=2),
    "pp2 cp2 tp2": shape(pp=2, cp=2, tp=2, moe_dp=2),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("backend", [torch_backend, flashinfer_backend])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_step_path_gives_transformers_logits_through_both_kernels(
    family: str, name: str, backend: MakeBackend, request: pytest.FixtureRequest
) -> None:
    oracle: Oracle = request.getfixturevalue(family)
    chosen = SHAPES[name] if family == "mixtral" else replace(SHAPES[name], experts=None)
    replica = LocalReplica(oracle.folder, shape=chosen, settings=SETTINGS, make_backend=backend)
    with closing(replica):
        found = replica.run(list(submits(oracle, count=NUM_TOKENS)))
    for index, prompt in enumerate(prompts(), 1):
        wanted = oracle.answer(prompt, NUM_TOKENS).logits
        error = np.abs(np.stack(found[index]) - wanted).max(axis=1) / np.abs(wanted).max(axis=1)
        assert error.max() <= TOLERANCE, f"prompt of {len(prompt)}: {error.max():.1e}"
