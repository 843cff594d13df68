"""From tokens to text as they come: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class OutputText:
    """The text of one generation. `stopped` becomes true when a stop string has appeared; no text follows then."""

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def add(self, token_id: int) -> str:
        """The text that became certain with this token."""
        if self.stopped:
            return ""
        self._held += self._stream.step(self._tokenizer, token_id) or ""
        found = [index for index in map(self._held.find, self._stop) if index >= 0]
        if found:
            self.stopped = True
            return self._take(min(found))
        return self._take(len(self._held) - self._possible_stop())

    def finish(self) -> str:
        """What was held back because a stop string might have begun, and did not."""
        return "" if self.stopped else self._take(len(self._held))

    def _take(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        return text

    def _possible_stop(self) -> int:
        """The length of the longest end of the held text with which a stop string begins."""
        longest = max(map(len, self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0
