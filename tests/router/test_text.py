"""A model's text is served whole and the same each time, and its end tokens are those that end its turns."""

import json
from pathlib import Path
from typing import Any

import pytest

from router.model_check import check_model
from router.text import ModelText
from tests import tiny_models
from tests.tiny_models import write_checkpoint

END = {"eos_token": "w49"}
TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}END\n{% endfor %}"


def model(folder: Path, *, changes: dict[str, Any] | None = None, template: str | None = None, **config: Any) -> Path:
    """A checkpoint whose tokenizer.json has `changes`, with an end token where a template is given."""
    write_checkpoint(folder, tiny_models.llama(**config))
    path = folder / "tokenizer.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "pre_tokenizer": {"type": "Whitespace"}, **(changes or {})})
    )
    if template is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({**END, "chat_template": template}))
    return folder


PADDING = {
    "strategy": {"Fixed": 12},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "w0",
}
TRUNCATION = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}


@pytest.mark.parametrize(
    "changes", [{"truncation": TRUNCATION}, {"padding": PADDING}, {"truncation": TRUNCATION, "padding": PADDING}]
)
def test_a_prompt_is_neither_cut_nor_padded_whatever_the_tokenizers_file_says(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    text = ModelText(model(tmp_path, changes=changes, template="{% for m in messages %}{{ m.content }}{% endfor %}"))
    assert text.encode("w3 w4 w5 w6 w7") == [3, 4, 5, 6, 7]
    assert text.encode_chat([{"role": "user", "content": "w3 w4 w5 w6 w7"}]) == [3, 4, 5, 6, 7]


def test_a_prompt_has_the_same_tokens_each_time_though_the_tokenizer_was_trained_with_dropout(tmp_path: Path) -> None:
    letters = {letter: index for index, letter in enumerate("abcd")}
    merges = {"ab": 4, "abc": 5, "abcd": 6}
    bpe = {
        "type": "BPE",
        "dropout": 0.5,
        "vocab": {**letters, **merges},
        "merges": [["a", "b"], ["ab", "c"], ["abc", "d"]],
    }
    text = ModelText(model(tmp_path, changes={"model": bpe}))
    assert {tuple(text.encode("abcd")) for _ in range(50)} == {(6,)}


def test_the_tokenizers_end_token_ends_a_generation_where_the_template_ends_turns_with_it(tmp_path: Path) -> None:
    folder = model(tmp_path, template=TURNS.replace("END", "{{ eos_token }}"), eos_token_id=2)
    assert ModelText(folder).defaults.eos_token_ids == {2, 49}
    assert check_model(folder, weights=True).warnings == ()


@pytest.mark.parametrize(
    "template", ["", TURNS, TURNS.replace("END", "</turn>"), "{{ raise_exception('no') }}", "{{ eos_token }}"]
)
def test_an_end_token_that_nothing_names_is_a_warning(tmp_path: Path, template: str) -> None:
    folder = model(tmp_path, template=template, eos_token_id=2)
    assert ModelText(folder).defaults.eos_token_ids == {2}
    *_, warning = check_model(folder, weights=True).warnings
    assert "the tokenizer's end token 'w49' (49) is named by no config as eos_token_id" in warning


def test_an_end_token_that_a_config_names_is_silent(tmp_path: Path) -> None:
    folder = model(tmp_path, template=TURNS, eos_token_id=[2, 49])
    assert check_model(folder, weights=True).warnings == ()
