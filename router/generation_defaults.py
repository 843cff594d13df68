"""What a request that says nothing gets: read from the model's own files, and checked before anything starts.

A value that switches something off in any of the tools that write these files is off here; what has no meaning is an
error that names the file, so that no client is ever blamed for it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.checkpoint.model_files import read_json_object

_FILE = "generation_config.json"
#: What the best token alone is kept by: a share of nothing still holds one token.
_BEST_TOKEN_ALONE = 1e-6
_LARGEST_TOP_K = 2**31 - 1
#: A rank gets it as float32, where more is infinity: logits over it are all alike.
_LARGEST_TEMPERATURE = 3e38
#: Keys that change tokens in transformers and nothing here, each with the values that ask for nothing.
_NOT_SERVED: Mapping[str, tuple[object, ...]] = {
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "num_beams": (1,),
    "min_new_tokens": (0,),
    "min_length": (0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "sequence_bias": ({}, []),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "penalty_alpha": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "stop_strings": ([], ""),
    "watermarking_config": (),
}


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What a request that says nothing gets, from the model's generation config."""

    eos_token_ids: frozenset[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float


def read_defaults(folder: Path) -> GenerationDefaults:
    """The defaults of the checkpoint in `folder`: greedy unless its generation config asks for sampling.

    ValueError names file, key and value of what cannot be a default.
    """
    values = _generation_config(folder)
    temperature = values.number("temperature", default=1.0, most=_LARGEST_TEMPERATURE)
    top_p = values.number("top_p", default=1.0, most=1.0)
    return GenerationDefaults(
        eos_token_ids=_eos_token_ids(folder, values),
        temperature=temperature if values.flag("do_sample") else 0.0,
        top_p=top_p or _BEST_TOKEN_ALONE,
        top_k=values.top_k(),
        min_p=values.number("min_p", default=0.0, most=1.0),
    )


def unserved_defaults(folder: Path) -> Iterator[str]:
    """A warning for each key of the generation config that would change tokens and is not implemented."""
    values = _generation_config(folder)
    for key, off in _NOT_SERVED.items():
        value = values.get(key)
        if value is not None and value not in off:
            yield f"{values.path} has {key} = {value!r}: nothing here does that, so it is left out"


@dataclass(frozen=True, kw_only=True)
class _Values:
    """The keys of one file; each reader gives the value of one, or says what is wrong with it."""

    path: Path
    values: Mapping[str, Any]

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, "true or false")
        return bool(value)

    def number(self, key: str, *, default: float, most: float) -> float:
        value = self.get(key)
        if value is None:
            return default
        if not _is_number(value) or not 0 <= value <= most:
            raise self.error(key, f"a number from 0 to {most:g}")
        return float(value)

    def top_k(self) -> int:
        """-1 is what other engines call off."""
        value = self.get("top_k")
        if value in (None, -1) and not isinstance(value, bool):
            return 0
        if not _is_number(value) or not 0 <= value <= _LARGEST_TOP_K or value != value // 1:
            raise self.error("top_k", f"a whole number from 0 (off) to {_LARGEST_TOP_K}, or -1 (off)")
        return int(value)

    def error(self, key: str, allowed: str) -> ValueError:
        return ValueError(f"{self.path} has {key} = {self.get(key)!r}; write {allowed}, or remove {key}")


def _generation_config(folder: Path) -> _Values:
    path = folder / _FILE
    return _Values(path=path, values=read_json_object(path) if path.exists() else {})


def _eos_token_ids(folder: Path, values: _Values) -> frozenset[int]:
    """The end tokens of the generation config, or of config.json where that names none; -1 is none."""
    path = folder / "config.json"
    config = _Values(path=path, values=read_json_object(path))
    source = values if "eos_token_id" in values.values else config
    value = source.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    # A size that is no number is told where the model is described.
    size = config.get("vocab_size") if isinstance(config.get("vocab_size"), int) else 2**31
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not -1 <= token_id < size:
            raise source.error("eos_token_id", f"one token id from 0 to {size - 1}, or a list of them")
    return frozenset(token_id for token_id in ids if token_id >= 0)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
