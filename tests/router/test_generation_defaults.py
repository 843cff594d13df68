"""Defaults of a checkpoint either work or are refused at the start: no client is blamed for what it did not send."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.models.registry import describe_checkpoint
from proto import inference_pb2
from router.capacity import Capacity
from router.generation_defaults import GenerationDefaults, read_defaults, unserved_defaults
from router.text import ModelText
from router.validation import RequestValidator
from tests import tiny_models
from tests.tiny_models import write_checkpoint

GREEDY = {"eos_token_ids": frozenset[int](), "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}

ROOMY = Capacity(prompt_tokens=1 << 20, sequence_tokens=1 << 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), tiny_models.llama())


def write(folder: Path, values: dict[str, Any]) -> None:
    (folder / "generation_config.json").write_text(json.dumps(values))


def defaults(folder: Path, values: dict[str, Any]) -> GenerationDefaults:
    write(folder, values)
    return read_defaults(folder)


@pytest.mark.parametrize(
    ("values", "changes"),
    [
        ({}, {}),
        ({"top_k": -1}, {}),
        ({"top_k": 0}, {}),
        ({"top_k": None}, {}),
        ({"top_k": 50.0}, {"top_k": 50}),
        ({"top_p": None}, {}),
        ({"top_p": 1}, {}),
        ({"top_p": 0}, {"top_p": 1e-6}),  # of the most likely tokens that make up nothing, transformers keeps one
        ({"min_p": None}, {}),
        ({"min_p": 0}, {}),
        ({"temperature": None, "do_sample": True}, {"temperature": 1.0}),
        ({"temperature": 0, "do_sample": True}, {"temperature": 0.0}),
        ({"temperature": 0.6}, {}),
        ({"temperature": 0.6, "do_sample": None}, {}),
        ({"temperature": 0.6, "do_sample": True}, {"temperature": 0.6}),
        ({"eos_token_id": 2}, {"eos_token_ids": {2}}),
        ({"eos_token_id": [2, 3, -1]}, {"eos_token_ids": {2, 3}}),
        ({"eos_token_id": -1}, {}),
        ({"eos_token_id": []}, {}),
        ({"eos_token_id": None}, {}),
    ],
)
def test_a_default_that_switches_something_off_is_off(
    folder: Path, values: dict[str, Any], changes: dict[str, Any]
) -> None:
    assert vars(defaults(folder, values)) == {**GREEDY, **changes}


NAN = float("nan")
WITHOUT_MEANING: dict[str, tuple[object, ...]] = {
    "top_k": (-2, 1.5, "50", True, False, [1], 2**31, 10**400, float("inf"), NAN),
    "top_p": (-0.1, 1.1, "1", True, {}, NAN),
    "min_p": (-0.1, 2, "0", False, NAN),
    "temperature": (-1, "0.6", True, float("inf"), NAN, [], 1e39, 10**400),
    "do_sample": ("false", 1, []),
    "eos_token_id": ("2", 1.0, True, 50, -2, [2, "3"], [None], {"id": 2}, NAN),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, all_ in WITHOUT_MEANING.items() for value in all_])
def test_a_default_without_a_meaning_is_refused_with_file_key_and_value(folder: Path, key: str, value: object) -> None:
    with pytest.raises(ValueError) as caught:
        defaults(folder, {key: value})
    assert f"{folder}/generation_config.json has {key} = {value!r}; write " in str(caught.value)
    assert str(caught.value).endswith(f", or remove {key}")


def test_an_end_token_of_the_config_itself_is_told_with_that_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tiny_models.llama(eos_token_id="</s>"))
    with pytest.raises(ValueError, match=r"/config\.json has eos_token_id = '</s>'"):
        read_defaults(folder)
    assert defaults(folder, {"eos_token_id": 3}).eos_token_ids == {3}


@settings(max_examples=150, deadline=None)
@given(
    values=st.dictionaries(
        st.sampled_from(["do_sample", "temperature", "top_p", "top_k", "min_p", "eos_token_id"]),
        st.none()
        | st.booleans()
        | st.integers(-3, 60)
        | st.floats()
        | st.text(max_size=2)
        | st.lists(st.integers(-2, 60)),
    )
)
def test_whatever_the_file_says_a_request_that_says_nothing_is_valid_or_the_start_is_refused(
    folder: Path, validator: RequestValidator, values: dict[str, Any]
) -> None:
    write(folder, values)
    try:
        found = read_defaults(folder)
    except ValueError as error:
        assert "generation_config.json has " in str(error)
        return
    validator.text.defaults = found
    validator.validate(inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[1])))


@pytest.fixture(scope="module")
def validator(folder: Path) -> RequestValidator:
    write(folder, {})
    return RequestValidator(description=describe_checkpoint(folder), text=ModelText(folder), capacity=ROOMY)


@pytest.mark.parametrize(
    ("values", "num_warnings"),
    [
        ({"repetition_penalty": 1.0, "num_beams": 1, "no_repeat_ngram_size": 0, "suppress_tokens": None}, 0),
        ({"repetition_penalty": 1.05}, 1),
        ({"suppress_tokens": [3], "num_beams": 4}, 2),
        ({"stop_strings": [], "guidance_scale": 1, "penalty_alpha": None, "min_length": 0}, 0),
        ({"stop_strings": ["User:"]}, 1),
        ({"guidance_scale": 1.5, "presence_penalty": 0.5, "frequency_penalty": -1, "min_length": 3}, 4),
    ],
)
def test_a_default_that_nothing_here_does_is_a_warning(folder: Path, values: dict[str, Any], num_warnings: int) -> None:
    write(folder, values)
    found = list(unserved_defaults(folder))
    assert len(found) == num_warnings
    assert not found or all(any(f"has {key} = {value!r}" in told for told in found) for key, value in values.items())
