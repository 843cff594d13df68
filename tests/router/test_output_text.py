"""Text as it streams: whole characters, nothing of a stop string, and all of the rest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from router.output_text import OutputText


def byte_tokenizer() -> Tokenizer:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TOKENIZER = byte_tokenizer()


def stream(text: str, stop: list[str]) -> list[str]:
    output = OutputText(TOKENIZER, stop=stop)
    pieces = [output.add(token) for token in TOKENIZER.encode(text).ids]
    return [*pieces, output.finish()]


@given(text=st.text(max_size=40))
def test_without_stop_strings_all_text_comes_in_whole_characters(text: str) -> None:
    pieces = stream(text, [])
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


@given(
    text=st.text(alphabet="abé", max_size=30),
    stop=st.lists(st.text(alphabet="abé", min_size=1, max_size=3), max_size=3),
)
def test_the_text_ends_before_the_first_stop_string_and_never_shows_a_part_of_it(text: str, stop: list[str]) -> None:
    shown = "".join(stream(text, stop))
    assert text.startswith(shown)
    assert not any(item in shown for item in stop)
    if not any(item in text for item in stop):
        assert shown == text
    else:
        assert any(text[len(shown) :].startswith(item) for item in stop)


@pytest.mark.parametrize("text", ["né", "日本", "🙂"])
def test_a_character_that_is_not_whole_is_never_shown(text: str) -> None:
    output = OutputText(TOKENIZER, stop=[])
    shown = [output.add(token) for token in TOKENIZER.encode(text).ids[:-1]]
    assert text.startswith("".join(shown) + output.finish())
