"""The tokenizer's own end token, which a checkpoint's configs may fail to name."""

from typing import Any

_ANSWER = "answer"


def end_of_turn(tokenizer: Any) -> frozenset[int]:
    """The tokenizer's end token where its chat template ends the model's turns with it, else nothing.

    There the model says it and means the end, whatever the configs name: without it a chat would run on.
    """
    end = tokenizer.eos_token
    if not end or tokenizer.eos_token_id is None or not tokenizer.chat_template:
        return frozenset()
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text: str = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # a template is the model's own program: it may refuse this very chat
        return frozenset()
    _, found, after = text.rpartition(_ANSWER)
    return frozenset({tokenizer.eos_token_id}) if found and after.lstrip().startswith(end) else frozenset()


def unnamed_end_token(tokenizer: Any, *, eos_token_ids: frozenset[int]) -> str | None:
    """A warning where the tokenizer names an end token that does not end a generation."""
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id in eos_token_ids:
        return None
    return (
        f"the tokenizer's end token {tokenizer.eos_token!r} ({tokenizer.eos_token_id}) is named by no config as "
        "eos_token_id, and the chat template does not end turns with it: it does not end a generation; add it to "
        "eos_token_id in generation_config.json where it should"
    )
