"""Text as it streams is what the tokenizer decodes of the whole, whatever the kind of tokenizer and the tokens."""

import itertools
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from router.detokenizer import Detokenizer
from router.output_tokens import OutputTokens
from tests.harness.tokenizer_kinds import ADDED, KINDS, SPECIAL, ids_of

TOKENIZERS = {name: make() for name, make in KINDS.items()}


def pieces(tokenizer: Tokenizer, output: list[int], *, prompt: list[int]) -> list[str]:
    """What each token made certain, and the rest at the end."""
    detokenizer = Detokenizer(OutputTokens(tokenizer), prompt_ids=prompt)
    return [*(detokenizer.add(token_id) for token_id in output), detokenizer.rest()]


def decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    content = [tokenizer.id_to_token(token_id) for token_id in ids]
    # The library panics where there is nothing from whose end it could strip.
    return str(tokenizer.decode(ids, skip_special_tokens=True)) if {*content} - {None, *SPECIAL} else ""


def continuation(tokenizer: Tokenizer, output: list[int], *, prompt: list[int]) -> str:
    """What the tokenizer decodes of prompt and output, less what it decodes of the prompt."""
    before, whole = decoded(tokenizer, prompt), decoded(tokenizer, prompt + output)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))
    return whole[len(list(same)) :]


@st.composite
def token_lists(draw: Any, kind: str, *, max_size: int) -> list[int]:
    """Random tokens, among them bytes that are no character, special and unknown ones; often a few over and over."""
    tokenizer = TOKENIZERS[kind]
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    every = st.integers(0, size + 3)
    some = st.sampled_from(draw(st.lists(every, min_size=1, max_size=4)))
    encoded = st.text(alphabet="aé日🙂 .'\n", max_size=12).map(lambda text: tokenizer.encode(text).ids)
    parts = st.lists(st.one_of(st.lists(every, max_size=4), st.lists(some, max_size=30), encoded), max_size=6)
    return [token_id for part in draw(parts) for token_id in part][:max_size]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_text_of_an_answer_is_what_the_tokenizer_decodes_of_it(kind: str, data: st.DataObject) -> None:
    output = data.draw(token_lists(kind, max_size=100))
    tokenizer = TOKENIZERS[kind]
    assert "".join(pieces(tokenizer, output, prompt=[])) == decoded(tokenizer, output)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_text_of_a_continuation_is_the_whole_less_the_prompt(kind: str, data: st.DataObject) -> None:
    prompt, output = data.draw(token_lists(kind, max_size=60)), data.draw(token_lists(kind, max_size=60))
    tokenizer = TOKENIZERS[kind]
    found = "".join(pieces(tokenizer, output, prompt=prompt))
    assert found == continuation(tokenizer, output, prompt=prompt)


@pytest.mark.parametrize("kind", ["llama_2", "gemma", "unigram_with_bytes"])
def test_bytes_that_are_no_character_come_as_replacement_characters(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    assert "".join(pieces(tokenizer, ids_of(tokenizer, "<0x26>", "<0x9A>", "▁a"), prompt=[])) == "\ufffd\ufffd a"


@pytest.mark.parametrize("kind", ["llama_2", "unigram", "unigram_with_bytes"])
def test_an_answer_has_no_leading_blank_and_a_continuation_keeps_it(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    output = ids_of(tokenizer, "▁a", "▁b")
    assert "".join(pieces(tokenizer, output, prompt=[])) == "a b"
    assert "".join(pieces(tokenizer, output, prompt=ids_of(tokenizer, "<s>", "▁b"))) == " a b"
    assert "".join(pieces(tokenizer, output, prompt=ids_of(tokenizer, "<s>"))) == "a b"


def test_a_character_is_shown_when_it_is_whole_and_not_before() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    output = tokenizer.encode("a日b").ids
    found = pieces(tokenizer, output, prompt=[])
    assert [piece for piece in found if piece] == ["a", "日", "b"]
    assert found[0] == "a"


def test_a_run_of_bytes_is_shown_when_it_has_ended_since_one_more_may_spoil_it() -> None:
    tokenizer = TOKENIZERS["llama_2"]
    whole = ids_of(tokenizer, "a", "<0xC3>", "<0xA9>", "a")
    assert pieces(tokenizer, whole, prompt=[]) == ["a", "", "", "éa", ""]
    spoilt = ids_of(tokenizer, "a", "<0xC3>", "<0xA9>", "<0xA9>")
    assert pieces(tokenizer, spoilt, prompt=[]) == ["a", "", "", "", "\ufffd" * 3]


def test_a_character_that_begins_in_the_prompt_belongs_to_the_output() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("x🙂").ids
    assert "".join(pieces(tokenizer, ids[-1:], prompt=ids[:-1])) == "🙂"
    assert "".join(pieces(tokenizer, tokenizer.encode("a").ids, prompt=ids[:-1])) == "a"


def test_special_and_unknown_tokens_say_nothing_and_added_ones_what_they_are() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    output = [*ids_of(tokenizer, *SPECIAL), 10**6, *ids_of(tokenizer, ADDED), 2**32 - 1]
    assert pieces(tokenizer, output, prompt=output) == ["", "", "", ADDED, "", ""]


class Counting:
    """A tokenizer that counts what it is asked to decode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.num_decoded = 0

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        self.num_decoded += len(ids)
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@st.composite
def silent_and_bytes(draw: Any, kind: str) -> list[int]:
    """What makes the worst context: tokens without any text, and runs of bytes, of whole characters or not."""
    tokenizer = TOKENIZERS[kind]
    contents = (*(f"<0x{byte:02X}>" for byte in "🙂".encode()), " ", "##", "▁", "</w>", "a")
    known = [found for content in contents if (found := tokenizer.token_to_id(content)) is not None]
    return [int(token) for token in draw(st.lists(st.sampled_from(known), min_size=1, max_size=20))]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_token_costs_the_same_however_long_prompt_and_output_are(kind: str, data: st.DataObject) -> None:
    some = data.draw(st.one_of(token_lists(kind, max_size=40), silent_and_bytes(kind)))
    # A prompt that is bytes to its last token is one run, decoded at its end with the output's first text.
    assert num_decoded(kind, some * 50) <= (40 + 4) * 50 * len(some) + 40


EMOJI = tuple(f"<0x{byte:02X}>" for byte in "🙂".encode())


@pytest.mark.parametrize("contents", [("<unk>", *EMOJI, *EMOJI, " "), (" ",), (*EMOJI, " ", " ")])
def test_tokens_without_text_beside_runs_of_bytes_cost_no_more_than_others(contents: tuple[str, ...]) -> None:
    some = ids_of(TOKENIZERS["stripped_by_token"], *contents)
    assert num_decoded("stripped_by_token", some * 200) <= 20 * 200 * len(some)


def num_decoded(kind: str, some: list[int]) -> int:
    """Tokens that are decoded for a prompt and an output that are each `some`."""
    counting: Any = Counting(TOKENIZERS[kind])
    pieces(counting, some, prompt=some)
    return int(counting.num_decoded)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
@example(data=None)
def test_many_special_tokens_between_the_bytes_of_a_character_do_not_break_it(data: st.DataObject | None) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    special = ids_of(tokenizer, SPECIAL[0])
    count = data.draw(st.integers(0, 50)) if data else 1000
    output = [token for byte in tokenizer.encode("🙂").ids for token in (byte, *special * count)]
    assert "".join(pieces(tokenizer, output, prompt=[])) == "🙂"
