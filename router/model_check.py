"""Everything that can be wrong with a checkpoint, told before a rank starts. Reads headers and small files only.

`router check` asks it of what is on this machine, the router of what it serves, after a hub's weights are here. A
launcher asks for the weights' half alone (parallel/checkpoint/contents.py): it has no text.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from parallel.checkpoint.contents import find_faults
from parallel.checkpoint.fault import Fault
from parallel.checkpoint.model_files import FETCH_ANEW, read_json_object
from parallel.models.description import ModelDescription
from parallel.models.registry import describe_checkpoint
from router.generation_defaults import read_defaults, unserved_defaults
from router.text import ModelText
from router.tokenizer_loading import load_tokenizer

T = TypeVar("T")

_OTHER = "name a model that is there and runs"
_USER, _ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
#: A template that writes none of these writes hardly any.
_PLAIN_CHATS = ([_USER], [{"role": "system", "content": "c"}, _USER], [_USER, _ANSWER, _USER])


@dataclass(frozen=True, kw_only=True)
class ModelCheck:
    """A checkpoint as far as it could be read, what is wrong with it, and what an operator should know of it."""

    description: ModelDescription | None
    text: ModelText | None
    faults: tuple[Fault, ...]
    warnings: tuple[str, ...]


def check_model(folder: Path, *, weights: bool) -> ModelCheck:
    """Checks the checkpoint in `folder`; without `weights`, all but its weight files."""
    faults: list[Fault] = []
    description = _try(partial(describe_checkpoint, folder), faults=faults, remedy=_OTHER)
    if weights:
        faults += find_faults(folder, description=description)
    found = len(faults)
    readers: tuple[Callable[[Path], object], ...] = (load_tokenizer, read_defaults)
    for read in readers:
        _try(partial(read, folder), faults=faults, remedy=FETCH_ANEW)
    text = ModelText(folder) if len(faults) == found else None
    warnings = _warnings(folder, description=description, text=text) if description and text else ()
    return ModelCheck(description=description, text=text, faults=tuple(dict.fromkeys(faults)), warnings=tuple(warnings))


def check_config(folder: Path) -> ModelCheck:
    """Checks config.json alone, all that a plan is made of: there may be neither weights nor a tokenizer."""
    faults: list[Fault] = []
    description = _try(partial(describe_checkpoint, folder), faults=faults, remedy=_OTHER)
    return ModelCheck(description=description, text=None, faults=tuple(faults), warnings=())


def _try(read: Callable[[], T], *, faults: list[Fault], remedy: str) -> T | None:
    """What `read` gives, or its error among the faults."""
    try:
        return read()
    except (ValueError, OSError) as error:
        faults.append(Fault.of(error, remedy=remedy))
        return None


def _warnings(folder: Path, *, description: ModelDescription, text: ModelText) -> list[str]:
    warnings = list(unserved_defaults(folder))
    if read_json_object(folder / "config.json").get("tie_word_embeddings") and not description.tied_embeddings:
        warnings.append(
            f"{folder}/config.json has tie_word_embeddings = true, but lm_head.weight differs from "
            "model.embed_tokens.weight: it is served untied, as transformers does; write false"
        )
    warnings += _template_warnings(folder, text)
    if text.unnamed_end_token is not None:
        warnings.append(text.unnamed_end_token)
    if (folder / "adapter_config.json").exists():
        warnings.append(f"{folder} holds an adapter beside the model (adapter_config.json): the adapter is not served")
    return warnings


def _template_warnings(folder: Path, text: ModelText) -> list[str]:
    """A template that refuses every plain chat is the checkpoint's fault, not that of the clients who will meet it."""
    refusals = []
    for chat in _PLAIN_CHATS if text.has_chat_template else ():
        try:
            text.encode_chat(chat)
        except ValueError as error:
            refusals.append(error)
    if len(refusals) < len(_PLAIN_CHATS):
        return []
    return [f"{folder}: {refusals[0]}; it does so of every plain chat: correct it, or serve text and token prompts"]
