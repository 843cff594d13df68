"""Text as a client sees it: whole characters, nothing of a stop string, and all of the rest."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from router.output_text import OutputText
from router.output_tokens import OutputTokens
from tests.harness.tokenizer_kinds import KINDS, byte_level, ids_of

TOKENIZER = byte_level()
ALL = {name: make() for name, make in KINDS.items()}


def stream(text: str, stop: list[str]) -> list[str]:
    output = OutputText(OutputTokens(TOKENIZER), stop=stop)
    pieces = [output.add(token) for token in TOKENIZER.encode(text).ids]
    return [*pieces, output.finish()]


def run(*contents: str, stop: list[str], tokenizer: Tokenizer = TOKENIZER) -> tuple[list[str], bool]:
    """What each token of the vocabulary made certain, then the rest; and whether a stop string ended it."""
    output = OutputText(OutputTokens(tokenizer), stop=stop)
    pieces = [output.add(token_id) for token_id in ids_of(tokenizer, *contents)]
    return [*pieces, output.finish()], output.stopped


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
def test_a_character_is_shown_when_it_is_whole_or_nothing_follows(text: str) -> None:
    output = OutputText(OutputTokens(TOKENIZER), stop=[])
    shown = [output.add(token) for token in TOKENIZER.encode(text).ids[:-1]]
    assert text.startswith("".join(shown))
    assert output.finish() == "\ufffd"  # as it stands, its bytes are no character


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_of_every_tokenizer_the_text_ends_before_a_stop_string(kind: str, data: st.DataObject) -> None:
    tokenizer = ALL[kind]
    ids = st.lists(st.integers(0, tokenizer.get_vocab_size(with_added_tokens=True) + 3), max_size=40)
    prompt, output = data.draw(ids), data.draw(ids)
    tokens = OutputTokens(tokenizer)
    stop = data.draw(st.lists(st.sampled_from([" ", "a", "\ufffd", "n't", "日本", ". ", " a"]), max_size=3))
    whole, text = (OutputText(tokens, stop=some, prompt_ids=prompt) for some in ([], stop))
    expected = "".join([*map(whole.add, output), whole.finish()])
    shown = "".join([*map(text.add, output), text.finish()])
    assert expected.startswith(shown)
    assert not any(item in shown for item in stop)
    assert text.stopped == any(item in expected for item in stop)
    assert any(expected[len(shown) :].startswith(item) for item in stop) if text.stopped else shown == expected


@pytest.mark.parametrize(
    ("contents", "stop", "shown"),
    [
        (["a", "</s>", "b"], ["</s>"], ["a", "", "", ""]),
        (["a", "</s>", "b"], ["a</s>"], ["", "", "", ""]),
        (["c", "a", "</s>", "b"], ["a</s>b"], ["c", "", "", "", ""]),
        (["a", "</s>", "b", "c"], ["</s>b"], ["a", "", "", "", ""]),
        (["a", "<s>", "</s>", "b"], ["<s></s>"], ["a", "", "", "", ""]),
        (["Ã", "</s>", "a"], ["</s>"], ["", "\ufffd", "", ""]),
    ],
)
def test_a_stop_string_may_name_special_tokens_alone_and_among_others(
    contents: list[str], stop: list[str], shown: list[str]
) -> None:
    assert run(*contents, stop=stop) == (shown, True)


@pytest.mark.parametrize(
    ("contents", "stop", "shown"),
    [
        (["a", "</s>", "b"], ["b</s>"], "ab"),
        (["a", "</s>", "b"], ["</s>c"], "ab"),
        (["a", "</s>"], ["</s>c"], "a"),
        (["a", "</s>", "b"], ["<s>"], "ab"),
        (["a", "</s>", "b"], ["/s"], "ab"),
        (["Ã", "</s>", "©"], ["</s>c"], "é"),
    ],
)
def test_a_special_token_that_no_stop_string_comes_to_an_end_with_is_not_shown(
    contents: list[str], stop: list[str], shown: str
) -> None:
    pieces, stopped = run(*contents, stop=stop)
    assert ("".join(pieces), stopped) == (shown, False)


@given(
    contents=st.lists(st.sampled_from(["a", "b", "<s>", "</s>"]), max_size=25),
    stop=st.lists(
        st.lists(st.sampled_from(["a", "b", "<s>", "</s>"]), min_size=1, max_size=3).map("".join), max_size=3
    ),
)
def test_text_with_special_tokens_ends_where_the_first_stop_string_is_complete(
    contents: list[str], stop: list[str]
) -> None:
    stop = [text.replace("1", "<s>").replace("2", "</s>") for text in stop]
    named, whole, expected = [item for item in ("<s>", "</s>") if any(item in text for text in stop)], "", None
    for content in contents:
        whole += content if len(content) == 1 or content in named else ""
        found = [index for index in map(whole.find, stop) if index >= 0]
        if found:
            expected = whole[: min(found)]
            break
    pieces, stopped = run(*contents, stop=stop)
    assert stopped == (expected is not None)
    shown = whole if expected is None else expected
    assert "".join(pieces) == shown.replace("</s>", "").replace("<s>", "")


def test_a_stop_string_that_only_the_end_makes_certain_is_found() -> None:
    assert run("a", "<0x0A>", stop=["\n"], tokenizer=ALL["llama_2"]) == (["a", "", ""], True)
