"""A model's text: its tokenizer, its chat template, and what its own files say of generation. No torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What a request that says nothing gets, from the model's generation config."""

    eos_token_ids: frozenset[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float


class ModelText:
    """The text side of the checkpoint in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
        self.longest_token_bytes = max(len(token.encode()) for token in self._tokenizer.get_vocab())
        self.defaults = read_defaults(folder)

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
        return self.tokenizer.encode(text).ids

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a chat, ready for the model's answer; ValueError where the template refuses it."""
        try:
            text: str = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is the model's own program: it may raise anything
            raise ValueError(f"the model's chat template refuses it: {error}") from error
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def read_defaults(folder: Path) -> GenerationDefaults:
    """The defaults of the checkpoint in `folder`: greedy unless its generation config asks for sampling."""
    path = folder / "generation_config.json"
    values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    eos = values.get("eos_token_id", config.get("eos_token_id"))
    eos_ids = [] if eos is None else [eos] if isinstance(eos, int) else eos
    samples = bool(values.get("do_sample", False))
    return GenerationDefaults(
        eos_token_ids=frozenset(eos_ids),
        temperature=float(values.get("temperature") or 1.0) if samples else 0.0,
        top_p=float(values.get("top_p") or 1.0),
        top_k=int(values.get("top_k") or 0),
        min_p=float(values.get("min_p") or 0.0),
    )
