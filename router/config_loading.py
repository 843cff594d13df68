"""From a file to a `Config`, or to every fault of its structure: unknown keys, wrong types, values out of range."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from router.config import Config, config_schema
from router.config_source import ConfigSource, read_source
from router.problem import ConfigError, KeyPath, Problem, value_text

Schema = Mapping[str, Any]

_WHAT = {
    "missing": "is missing",
    "int_type": "is no whole number",
    "int_from_float": "is no whole number",
    "float_type": "is no number",
    "bool_type": "is neither true nor false",
    "finite_number": "is no finite number",
    "string_type": "is no text",
    "model_type": "is no mapping",
    "tuple_type": "is no list",
    "too_short": "is empty",
    "string_too_short": "is empty",
    "greater_than": "is too small",
    "greater_than_equal": "is too small",
    "less_than_equal": "is too large",
    "literal_error": "is none of the legal values",
}

#: Errors that are put in words: a list may have a hundred thousand items of a wrong kind.
_MOST_ERRORS = 1000

#: What text is read as where its quotes are left out, by the error of a key that wants it.
_READ_FROM_TEXT: Mapping[str, type | UnionType] = {"int_type": int, "float_type": int | float, "bool_type": bool}


def load_config(path: Path) -> Config:
    """The configuration in `path`; ConfigError with every fault of its structure."""
    return parse_config(read_source(path))


def parse_config(source: ConfigSource) -> Config:
    """The configuration that `source` says; ConfigError with every fault of its structure."""
    problems = list(source.problems)
    try:
        config = Config.model_validate(source.data)
    except ValidationError as error:
        # What could not be read is None in the data: its first cause has been told.
        told = {problem.path for problem in problems}
        schema = config_schema()
        errors = [details for details in error.errors(include_url=False) if not _is_echo(details)]
        found = [_problem(details, source=source, schema=schema) for details in errors[:_MOST_ERRORS]]
        problems += [problem for problem in found if problem.path not in told]
    if problems:
        raise ConfigError(problems)
    return config


def did_you_mean(word: object, legal: list[str]) -> str:
    """`did you mean X? ` where a legal word is near, else nothing."""
    near = get_close_matches(str(word), legal, n=1)
    return f"did you mean {near[0]}? " if near else ""


def _is_echo(details: ErrorDetails) -> bool:
    """Whether pydantic says this beside the true fault: `or None` of what may be left out, a list of faulty items."""
    return details["type"] == "none_required" or (details["type"] == "too_short" and bool(details["input"]))


def _problem(details: ErrorDetails, *, source: ConfigSource, schema: Schema) -> Problem:
    path = _path(details, data=source.data)
    kind = details["type"]
    if kind == "value_error":
        what, _, remedy = str(details["ctx"]["error"]).partition("; ")
        return source.problem(path, what=what, remedy=remedy)
    if kind == "extra_forbidden":
        legal = list(_at(schema, path[:-1])["properties"])
        hint = did_you_mean(path[-1], legal) or "remove it "
        return source.problem(path, what="unknown key", remedy=f"{hint}(legal: {', '.join(legal)})")
    wanted = _at(schema, path)
    hint = did_you_mean(details["input"], wanted.get("enum", [])) if kind == "literal_error" else ""
    quotes = _about_quotes(details["input"], kind=kind)
    remedy = f"{hint}write {_expected(wanted, schema)}{quotes} ({wanted['description']})"
    return source.problem(path, what=_WHAT.get(kind, details["msg"]), remedy=remedy)


def _about_quotes(value: object, *, kind: str) -> str:
    """What is said of quotes, where they are what is wrong."""
    if kind == "string_type" and isinstance(value, int | float):
        return f", in quotes: '{value_text(value)}'"
    if kind in _READ_FROM_TEXT and isinstance(value, str):
        try:
            meant = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):
            return ""
        return ", without quotes" if isinstance(meant, _READ_FROM_TEXT[kind]) else ""
    return ""


def _path(details: ErrorDetails, *, data: object) -> KeyPath:
    """pydantic's `loc` without what the file does not have: the tags of union members."""
    path: list[str | int] = []
    here: Any = data
    for part in details["loc"]:
        if _holds(here, part):
            here = here[part]
            path.append(part)
    return (*path, details["loc"][-1]) if details["type"] == "missing" else tuple(path)


def _holds(data: object, part: str | int) -> bool:
    return part in data if isinstance(data, dict) else isinstance(data, list) and isinstance(part, int)


def _at(schema: Schema, path: KeyPath) -> Schema:
    """The part of `schema` for the value at `path`; an item of a list has its list's description."""
    here: Schema = schema
    for part in path:
        if isinstance(part, int):
            forms = [here, *here.get("oneOf", [])]
            items = next(form["items"] for form in forms if "items" in form)
            here = {**_resolved(items, schema), "description": here["description"]}
        else:
            here = _resolved(here["properties"][part], schema)
    return here


def _resolved(part: Schema, schema: Schema) -> Schema:
    """`part` with what it refers to; its own description counts."""
    if "$ref" in part:
        return {**schema["$defs"][part["$ref"].rpartition("/")[2]], **part}
    return part


def _expected(part: Schema, schema: Schema) -> str:
    """What a value may be, in words."""
    if "enum" in part:
        return f"one of {', '.join(part['enum'])}"
    if "oneOf" in part:
        return " or ".join(_expected(_resolved(form, schema), schema) for form in part["oneOf"])
    match part.get("type"):
        case "integer":
            return f"a whole number from {part['minimum']} to {part['maximum']}"
        case "number":
            return f"a number above {part['exclusiveMinimum']}"
        case "array":
            return "a list with one item or more"
        case "boolean":
            return "true or false"
        case "object":
            return f"a mapping of {', '.join(part['properties'])}"
        case _:
            return "text"
