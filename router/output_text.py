"""The text of a generation as a client sees it: what the tokens say, up to the first stop string."""

from collections.abc import Sequence
from itertools import compress

from router.detokenizer import Detokenizer
from router.output_tokens import OutputTokens


class OutputText:
    """The text of one generation. `stopped` becomes true when a stop string has appeared; no text follows then.

    A special token is not shown, but a stop string may name it: for that it stands in the text as the tokenizer writes
    it. `prompt_ids` are those of a prompt that the output continues; a chat's answer begins a text of its own.
    """

    def __init__(self, tokens: OutputTokens, *, stop: Sequence[str], prompt_ids: Sequence[int] = ()) -> None:
        self._tokens = tokens
        self._detokenizer = Detokenizer(tokens, prompt_ids=prompt_ids)
        self._stop = tuple(stop)
        #: Special tokens that a stop string names.
        self._named = frozenset(content for content in tokens.special if any(content in text for text in stop))
        self._held = ""
        self._is_shown: list[bool] = []  # of each character that is held
        self.stopped = False

    def add(self, token_id: int) -> str:
        """The text that became certain with this token."""
        if self.stopped:
            return ""
        if self._named:
            content = self._tokens.content(token_id)
            if content in self._named:
                return self._add_special(content)
        self._hold(self._detokenizer.add(token_id), is_shown=True)
        return self._until_stop(len(self._held) - self._possible_stop())

    def finish(self) -> str:
        """What was held back, because a character might not be whole or a stop string might have begun."""
        if self.stopped:
            return ""
        self._hold(self._detokenizer.rest(), is_shown=True)
        return self._until_stop(len(self._held))

    def _add_special(self, content: str) -> str:
        """A special token that ends the text here ends what was held before it, too."""
        rest = self._detokenizer.rest()
        if any(text in self._held + rest + content for text in self._stop):
            self._hold(rest, is_shown=True)
        self._hold(content, is_shown=False)
        return self._until_stop(len(self._held) - self._possible_stop())

    def _hold(self, text: str, *, is_shown: bool) -> None:
        self._held += text
        self._is_shown += [is_shown] * len(text)

    def _until_stop(self, size: int) -> str:
        """Takes `size` characters of what is held, or those before the first stop string, which ends it all."""
        found = [index for index in map(self._held.find, self._stop) if index >= 0]
        if found:
            self.stopped = True
            size = min(found)
        text = "".join(compress(self._held[:size], self._is_shown))
        self._held, self._is_shown = self._held[size:], self._is_shown[size:]
        return text

    def _possible_stop(self) -> int:
        """The length of the longest end of the held text with which a stop string begins."""
        longest = max(map(len, self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0
