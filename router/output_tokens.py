"""What a tokenizer makes of single tokens: which of them are text at all, and which are bytes of characters."""

from collections.abc import Sequence

from tokenizers import Tokenizer


class OutputTokens:
    """One tokenizer's tokens as they come out of a model; made once, for all generations."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        #: What special tokens are called; none is part of a text.
        self.special = frozenset(token.content for token in added if token.special)

    def content(self, token_id: int) -> str | None:
        """The token as its vocabulary writes it; None for an id of the embedding that the tokenizer does not know."""
        content: str | None = self._tokenizer.id_to_token(token_id)
        return content

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, with U+FFFD where their bytes are no character; special and unknown ones are skipped."""
        if not token_ids:
            return ""  # a decoder that strips the end panics over nothing
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def last_visible(self, token_ids: Sequence[int], *, count: int) -> list[int]:
        """The last `count` of `token_ids` that are text, and with them all of a run of bytes at their end."""
        found: list[int] = []
        is_run = True
        for token_id in reversed(token_ids):
            content = self.content(token_id)
            if not self.is_visible(content):
                continue
            is_run = is_run and is_byte(content)
            if len(found) >= count and not is_run:
                break
            found.append(token_id)
            count += is_run
        return found[::-1]

    def is_visible(self, content: str | None) -> bool:
        """Whether a token is text."""
        return content is not None and content not in self.special


def is_byte(content: str | None) -> bool:
    """Whether a token is written as the byte that it stands for: `<0x0A>`.

    Where a decoder joins them, a run of them is one text, or a U+FFFD for each byte if one does not fit.
    """
    return content is not None and len(content) == 6 and content.startswith("<0x") and content.endswith(">")
