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
        self._prompt: str | None = tokens.decode(self._window)  # until it is known how much of it stands
        self._shown = 0  # characters of the window's text
        self._limit = 2 * _CONTEXT

    def add(self, token_id: int) -> str:
        """The text that became certain with this token."""
        content = self._tokens.content(token_id)
        if not self._tokens.is_visible(content):
            return ""
        self._window.append(token_id)
        if is_byte(content):
            return ""  # one more may turn the whole run into U+FFFD
        text = self._tokens.decode(self._window)
        # A character that lacks bytes is one U+FFFD at the end.
        certain = text.removesuffix(_REPLACEMENT)
        self._skip_prompt(certain)
        new = certain[self._shown :] if self._prompt is None else ""
        self._shown += len(new)
        self._trim(text)
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

    def _trim(self, text: str) -> None:
        """Gives tokens up that are context no longer, where the text that is not shown yet stays the same."""
        if self._prompt is not None or len(self._window) < self._limit:
            return
        window = self._window[-_CONTEXT:]
        shorter = self._tokens.decode(window)
        unshown = len(text) - self._shown
        if len(shorter) > unshown and shorter.endswith(text[max(self._shown - 1, 0) :]):
            self._window, self._shown = window, len(shorter) - unshown
        # Where it would not stay the same, the next try is not at the next token: each costs what the window is long.
        self._limit = 2 * max(len(self._window), _CONTEXT)


def _num_common(one: str, other: str) -> int:
    """Characters that both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
