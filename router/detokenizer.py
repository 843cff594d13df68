"""From tokens to text as they come: never text that a later token would change, and in the end all of it.

The tokenizer decodes a window of the last tokens; what lies before it is not decoded again, so that a token costs the
same however long the output is:

    tokens   . . . . . . . [ context, shown before | new ]
    text     . . . . . . . [ ............ shown    | certain | held: a character that may not be whole ]

How a decoder treats a token depends on whether another one is before it (the blank of the first word goes) and, for
bytes, on their neighbours. So the window keeps some context, and a run of bytes is decoded when it has ended.
"""

from collections.abc import Sequence
from itertools import takewhile

from router.output_tokens import OutputTokens, is_byte

_REPLACEMENT = "\ufffd"
#: Tokens of context: more than a character has bytes, and enough that they have some text.
_CONTEXT = 8


class Detokenizer:
    """The text of one output: what the tokenizer decodes of prompt and output, less what it decodes of the prompt.

    Where the first does not begin with all of the second (a prompt that ends inside a character), what they have in
    common at their beginning is the prompt's. Without a prompt, as for a chat's answer, it is the text of the output.
    """

    def __init__(self, tokens: OutputTokens, *, prompt_ids: Sequence[int] = ()) -> None:
        self._tokens = tokens
        self._window = tokens.last_visible(prompt_ids, count=_CONTEXT)
        self._text = tokens.decode(self._window)  # as last decoded: without the bytes that have come since
        self._was_silent = False  # whether the last token left the text as it was
        self._prompt: str | None = self._text  # until it is known how much of it stands
        self._shown = 0  # characters of the window's text
        self._limit = 2 * _CONTEXT

    def add(self, token_id: int) -> str:
        """The text that became certain with this token."""
        content = self._tokens.content(token_id)
        if not self._tokens.is_visible(content):
            return ""
        self._window.append(token_id)
        if is_byte(content):
            self._was_silent = False
            return ""  # one more may turn the whole run into U+FFFD
        text = self._tokens.decode(self._window)
        if self._is_silent_again(text):
            self._window.pop()
            return ""
        # A character that lacks bytes is one U+FFFD at the end.
        certain = text.removesuffix(_REPLACEMENT)
        self._skip_prompt(certain)
        new = certain[self._shown :] if self._prompt is None else ""
        self._shown += len(new)
        self._trim()
        return new

    def rest(self) -> str:
        """What was held back, as it stands if no token follows."""
        text = self._tokens.decode(self._window)
        shown = self._shown if self._prompt is None else _num_common(self._prompt, text)
        return text[shown:]

    def _skip_prompt(self, certain: str) -> None:
        """Once it is certain how much of the prompt's text stands, that much counts as shown."""
        if self._prompt is None:
            return
        common = _num_common(self._prompt, certain)
        if common == len(self._prompt) or common < len(certain):
            self._prompt, self._shown = None, common

    def _is_silent_again(self, text: str) -> bool:
        """Whether this token says nothing, as the one before: no number of such tokens makes up a context.

        After a character that lacks bytes it may be one of them.
        """
        was_silent, self._was_silent = self._was_silent, text == self._text and not text.endswith(_REPLACEMENT)
        self._text = text
        return was_silent and self._was_silent

    def _trim(self) -> None:
        """Gives tokens up that are context no longer, where the text that is not shown yet stays the same."""
        if self._prompt is not None or len(self._window) < self._limit:
            return
        size, unshown = _CONTEXT, len(self._text) - self._shown
        # The shortest context may begin inside a run of bytes, which it would spoil: a longer one holds all of it.
        while size < len(self._window):
            window = self._window[-size:]
            shorter = self._tokens.decode(window)
            if len(shorter) > unshown and shorter.endswith(self._text[max(self._shown - 1, 0) :]):
                self._window, self._text, self._shown = window, shorter, len(shorter) - unshown
                break
            size *= 2
        # Not tried at every token: it costs what decoding the window does.
        self._limit = len(self._window) + _CONTEXT


def _num_common(one: str, other: str) -> int:
    """Characters that both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
