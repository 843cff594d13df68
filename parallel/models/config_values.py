"""Reads values of a checkpoint's config.json; a ValueError names the key and the value that cannot be served."""

from collections.abc import Mapping
from typing import Any, TypeGuard

Config = Mapping[str, Any]

#: No size and no other number of a model is beyond these. What a file says by mistake may be, and is refused before
#: it is counted out.
LARGEST_SIZE = 2**31 - 1
_LARGEST_NUMBER = 1e30


def positive(config: Config, key: str, *, default: int | None = None, most: int = LARGEST_SIZE) -> int:
    """The positive integer at `key`, at most `most`; `default` where it is absent or null."""
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json has {key} = {value!r}: it must be a positive integer")
    return _at_most(value, key=key, most=most)


def count(config: Config, key: str) -> int:
    """The integer at `key`, 0 or more; 0 where it is absent or null."""
    value = config.get(key)
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"config.json has {key} = {value!r}: it must be an integer of 0 or more")
    return _at_most(value, key=key, most=LARGEST_SIZE)


def number(config: Config, key: str, *, least: float, default: float | None = None) -> float:
    """The finite number at `key`, at least `least`; `default` where it is absent or null."""
    value = config.get(key)
    if value is None:
        value = default
    if not is_number(value) or value < least:
        raise ValueError(f"config.json has {key} = {value!r}: it must be a number of {least:g} or more")
    return float(value)


def require(config: Config, key: str, *allowed: object) -> None:
    """ValueError unless `key` is absent or one of `allowed`: the forward computes nothing else."""
    if key in config and config[key] not in allowed:
        raise ValueError(f"config.json has {key} = {config[key]!r}: only {', '.join(map(repr, allowed))} runs yet")


def _at_most(value: int, *, key: str, most: int) -> int:
    if value > most:
        raise ValueError(f"config.json has {key} = {value}: it must be at most {most}")
    return value


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a number that can be computed with: JSON's integers have no end, its floats may be infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST_NUMBER
