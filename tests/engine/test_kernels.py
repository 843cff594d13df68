"""The engine gives transformers' logits through every kernel: torch, native, FlashInfer over a double of its calls."""

from contextlib import closing
from dataclasses import replace
from functools import partial

import pytest

from attention.flashinfer_kernel.backend import FlashInferAttentionBackend
from attention.interface import AttentionBackend, AttentionSpec
from attention.native_kernel.backend import NativeAttentionBackend
from attention.torch_kernel.backend import TorchAttentionBackend
from native.library import NativeLibrary
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape
from tests.attention import flashinfer_double
from tests.engine.test_parity import prompts
from tests.harness.checkpoints import Oracle
from tests.harness.local_replica import LocalReplica, MakeBackend
from tests.harness.parity import assert_replica_agrees
from worker.kernels.native_kernels import NativeKernels

NUM_TOKENS = 24
SETTINGS = EngineSettings(page_size=16, max_batch_tokens=250, max_sequences=16, kv_tokens=4096)


def torch_backend(spec: AttentionSpec) -> AttentionBackend:
    return TorchAttentionBackend(spec)


def flashinfer_backend(spec: AttentionSpec) -> AttentionBackend:
    return FlashInferAttentionBackend(spec, library=flashinfer_double, workspace_bytes=1024)


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
@pytest.mark.parametrize("kind", ["torch", "flashinfer", "native"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_step_path_gives_transformers_logits_through_all_kernels(
    family: str, name: str, kind: str, library: NativeLibrary, request: pytest.FixtureRequest
) -> None:
    oracle: Oracle = request.getfixturevalue(family)
    chosen = SHAPES[name] if family == "mixtral" else replace(SHAPES[name], experts=None)
    backends: dict[str, MakeBackend] = {
        "torch": torch_backend,
        "flashinfer": flashinfer_backend,
        "native": partial(NativeAttentionBackend, library=library),
    }
    kernels = NativeKernels(library) if kind == "native" else None
    replica = LocalReplica(oracle.folder, shape=chosen, settings=SETTINGS, make_backend=backends[kind], kernels=kernels)
    with closing(replica):
        assert_replica_agrees(replica, oracle, prompts(), n=NUM_TOKENS)
