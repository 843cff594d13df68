"""Loads a checkpoint's tokenizer as it is served: whole prompts, no padding. A broken one is a sentence. No torch."""

from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerFast

from parallel.checkpoint.model_files import FETCH_ANEW, read_json_object, read_text

_FILE = "tokenizer.json"
#: What is read beside it, where it is there.
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TEMPLATE = "chat_template.jinja"
#: Tokenizers in forms that transformers turns into tokenizer.json.
_OTHER_FORMS = ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder` as transformers has it; ValueError names the file that is missing or broken."""
    _require_files(folder)
    try:
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"the tokenizer of {folder} cannot be loaded ({_told(error)}); {FETCH_ANEW}") from error
    if not tokenizer.get_vocab():
        raise ValueError(f"{folder / _FILE} has no tokens; {FETCH_ANEW}")
    _require_template(tokenizer, folder=folder)
    _serve_whole(tokenizer.backend_tokenizer)
    return tokenizer


def _require_files(folder: Path) -> None:
    if not (folder / _FILE).exists():
        other = next((name for name in _OTHER_FORMS if (folder / name).exists()), None)
        remedy = "load it with transformers' AutoTokenizer and save it with save_pretrained" if other else FETCH_ANEW
        raise ValueError(f"{folder} has no {_FILE}{f', only {other}' if other else ''}; {remedy}")
    for name in (_FILE, *_BESIDE):
        if (folder / name).exists():
            read_json_object(folder / name)
    if (folder / _TEMPLATE).exists():
        read_text(folder / _TEMPLATE)


def _require_template(tokenizer: Any, *, folder: Path) -> None:
    """ValueError where no chat at all can be written by the template: its clients could not help it."""
    remedy = "correct it, or remove it and serve text and token prompts"
    template = tokenizer.chat_template
    if isinstance(template, dict) and template:
        if "default" not in template:
            names = ", ".join(map(repr, template))
            raise ValueError(
                f"the chat templates of {folder} ({names}) have no 'default', which a chat is written by; {remedy}"
            )
        template = template["default"]
    if template and not isinstance(template, str):
        raise ValueError(f"the chat template of {folder} is {template!r}, no text; {remedy}")
    try:
        if template:
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ValueError(f"the chat template of {folder} is broken: line {error.lineno}: {error}; {remedy}") from None
    except Exception:  # a template is the model's own program: it may refuse this very chat, and take others
        return


def _serve_whole(backend: Any) -> None:
    """Switches off what was meant for training: a prompt is served as it was sent, and the same each time."""
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None


def _told(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
