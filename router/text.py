"""A model's text: its tokenizer, its chat template, and what its own files say of generation. No torch."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from router.end_of_turn import end_of_turn, unnamed_end_token
from router.generation_defaults import read_defaults
from router.output_tokens import OutputTokens
from router.tokenizer_loading import load_tokenizer


class ModelText:
    """The text side of the checkpoint in `folder`; ValueError names a file of it that is missing or broken."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer: Any = load_tokenizer(folder)
        self.longest_token_bytes = max(len(token.encode()) for token in self._tokenizer.get_vocab())
        self.output_tokens = OutputTokens(self.tokenizer)
        defaults = read_defaults(folder)
        self.defaults = replace(defaults, eos_token_ids=defaults.eos_token_ids | end_of_turn(self._tokenizer))
        #: A warning where the tokenizer's own end token ends nothing.
        self.unnamed_end_token = unnamed_end_token(self._tokenizer, eos_token_ids=self.defaults.eos_token_ids)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer itself."""
        backend: Tokenizer = self._tokenizer.backend_tokenizer
        return backend

    @property
    def has_chat_template(self) -> bool:
        """Whether the model says how a chat is written."""
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer adds by itself."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a chat, ready for the model's answer; ValueError where the template refuses it."""
        try:
            text: str = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is the model's own program: it may raise anything
            raise ValueError(f"the model's chat template refuses it: {error}") from error
        return self._encode(text, add_special_tokens=False)

    def token(self, token_id: int) -> str:
        """The token of an id as text writes it."""
        return str(self.tokenizer.id_to_token(token_id))

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # As a batch of one: alone it would hold Python's lock, and every stream with it, for seconds.
        (encoding,) = self.tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids
