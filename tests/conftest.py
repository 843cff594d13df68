"""Fixtures that tests of several packages share."""

from pathlib import Path

import pytest
from hypothesis import settings

from native.build import Build
from native.library import NativeLibrary
from tests.harness.checkpoints import (
    Oracle,
    mxfp4_gpt_oss,
    tiny_glm4_moe,
    tiny_gpt_oss,
    tiny_llama,
    tiny_mixtral,
    tiny_qwen2,
    tiny_qwen3,
    tiny_qwen3_moe,
)

# A machine that is busy is no fault of what is tested.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def library() -> NativeLibrary:
    """The native kernels of this machine."""
    return NativeLibrary(Build().make(), num_threads=2)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """A random tiny Llama."""
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """A random tiny Mixtral, 2 of 8 experts."""
    return tiny_mixtral(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """A random tiny Qwen2, its biases drawn too."""
    return tiny_qwen2(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """A random tiny Qwen3, the weights of its norms drawn too."""
    return tiny_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """A random tiny Qwen3-MoE: experts, dense, experts; the chosen experts' weights sum to one."""
    folder = tmp_path_factory.mktemp("qwen3_moe")
    return tiny_qwen3_moe(folder, norm_topk_prob=True, mlp_only_layers=[1])


@pytest.fixture(scope="session")
def qwen3_moe_sparse(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """A random tiny Qwen3-MoE: dense, experts, dense; the chosen experts' weights are the softmax's."""
    folder = tmp_path_factory.mktemp("qwen3_moe_sparse")
    return tiny_qwen3_moe(folder, norm_topk_prob=False, decoder_sparse_step=2)


@pytest.fixture(scope="session")
def glm4_moe(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """A random tiny GLM-4.5 with everything that its configs may switch on."""
    return tiny_glm4_moe(tmp_path_factory.mktemp("glm4_moe"))


@pytest.fixture(scope="session")
def glm4_moe_plain(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """A random tiny GLM-4.5 without biases, norms of heads, groups and dense layers; weights are the sigmoids."""
    folder = tmp_path_factory.mktemp("glm4_moe_plain")
    without = {"attention_bias": False, "use_qk_norm": False, "norm_topk_prob": False, "first_k_dense_replace": 0}
    return tiny_glm4_moe(folder, **without, n_group=1, topk_group=1, n_shared_experts=1)


@pytest.fixture(scope="session")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """A random tiny gpt-oss as transformers saves it: windows of 37 positions in its first and last layer."""
    return tiny_gpt_oss(tmp_path_factory.mktemp("gpt_oss"))


@pytest.fixture(scope="session")
def gpt_oss_mxfp4(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """The same as it is published: its experts' weights are MXFP4."""
    return mxfp4_gpt_oss(tmp_path_factory.mktemp("gpt_oss_mxfp4"))


@pytest.fixture
def tmp_folder(tmp_path: Path) -> Path:
    """A folder of the test's own."""
    return tmp_path
