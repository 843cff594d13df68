"""A config that ties the output, beside weights that hold one of their own: transformers' logits, and a warning."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from attention.torch_kernel.backend import TorchAttentionBackend
from parallel.checkpoint.tied_output import EMBEDDING, OUTPUT
from parallel.models.registry import describe_checkpoint
from router.model_check import check_model
from tests.engine.test_families import SETTINGS
from tests.engine.test_kernels import SHAPES
from tests.engine.test_parity import prompts
from tests.harness.checkpoints import Oracle, from_folder, tiny_llama
from tests.harness.local_replica import LocalReplica
from tests.harness.parity import assert_replica_agrees

NUM_TOKENS = 8


def with_output(folder: Path, *, changed_values: int) -> Oracle:
    """The tied Llama with an output beside its embedding that differs from it in its first `changed_values`."""
    tiny_llama(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[OUTPUT] = tensors[EMBEDDING].clone()
    tensors[OUTPUT].view(-1)[:changed_values] += torch.randn(changed_values, generator=torch.Generator().manual_seed(1))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return from_folder(folder, LlamaForCausalLM)


@pytest.mark.parametrize("layout", ["one", "pp2 cp2 tp2"])
def test_an_output_that_differs_is_served_as_transformers_does_and_told(tmp_path: Path, layout: str) -> None:
    oracle = with_output(tmp_path, changed_values=5000)
    assert not describe_checkpoint(tmp_path).tied_embeddings
    (warning,) = check_model(tmp_path, weights=True).warnings
    assert "tie_word_embeddings = true, but lm_head.weight differs from model.embed_tokens.weight" in warning
    shape = replace(SHAPES[layout], experts=None)
    with closing(LocalReplica(tmp_path, shape=shape, settings=SETTINGS, make_backend=TorchAttentionBackend)) as replica:
        assert_replica_agrees(replica, oracle, prompts(), n=NUM_TOKENS)


def test_an_output_that_differs_in_one_value_differs(tmp_path: Path) -> None:
    with_output(tmp_path, changed_values=1)
    assert not describe_checkpoint(tmp_path).tied_embeddings


def test_an_output_that_is_the_embedding_is_harmless_and_silent(tmp_path: Path) -> None:
    with_output(tmp_path, changed_values=0)
    assert describe_checkpoint(tmp_path).tied_embeddings
    found = check_model(tmp_path, weights=True)
    assert (found.faults, found.warnings) == ((), ())


def test_an_untied_model_without_its_output_is_refused(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    (fault,) = check_model(tmp_path, weights=True).faults
    assert f"lacks 1 tensor that its config.json calls for: {OUTPUT}" in fault.what
