"""Reads a config's rotary embedding, in transformers' own words and with its defaults. A new kind is a reader here.

Two kinds change their frequencies with the length of a sequence: beyond it, what a cached key was rotated with depends
on how the prompt was cut into chunks. A layout may not change tokens, so they end where their frequencies do.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from parallel.models.config_values import LARGEST_SIZE, Config, is_number, number, positive
from parallel.models.description import FrequencyFactors, LinearScaling, Llama3Scaling, RopeSpec, YarnScaling

#: From the spec without scaling and the rope parameters to the spec.
Reader = Callable[..., RopeSpec]


def read_rope(config: Config, *, head_dim: int, may_be_partial: bool = False) -> RopeSpec:
    """The rotary embedding of `rope_parameters`, or of the older `rope_theta` and `rope_scaling`.

    A family that rotates whole heads alone refuses a `partial_rotary_factor`: transformers would not read it.
    """
    parameters = _parameters(config)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str) or kind not in _READERS:
        raise ValueError(f"config.json asks for rope type {kind!r}: those that run are {', '.join(_READERS)}")
    rotary_dim = _rotary_dim(parameters, head_dim=head_dim, may_be_partial=may_be_partial)
    try:
        base = RopeSpec(
            theta=number(parameters, "rope_theta", least=1.0),
            rotary_dim=rotary_dim,
            max_positions=positive(parameters, _TRAINED),
        )
        spec = _READERS[kind](base, parameters)
        if spec.max_positions > LARGEST_SIZE:
            raise ValueError(
                f"config.json asks for {spec.max_positions} positions: they must be at most {LARGEST_SIZE}"
            )
        return spec
    except ValueError as error:
        raise ValueError(f"{error} (rope type {kind!r})") from error


def _parameters(config: Config) -> dict[str, Any]:
    """The parameters of the rotary embedding with what transformers takes from beside them."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise ValueError(f"config.json has rope parameters {given!r}: they must be a mapping")
    nested = [key for key, value in given.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(
            f"config.json has rope parameters by kind of layer ({', '.join(nested)}): one set for all runs yet"
        )
    trained = positive(config, _TRAINED, default=2048)
    original = config.get(_ORIGINAL) or given.get(_ORIGINAL) or trained
    beside = {"rope_theta": config.get("rope_theta") or 10000.0, _PARTIAL: config.get(_PARTIAL)}
    return {**beside, **given, _TRAINED: trained, _ORIGINAL: original}


def _rotary_dim(parameters: Config, *, head_dim: int, may_be_partial: bool) -> int:
    """How many elements of a head are rotated."""
    factor = number(parameters, _PARTIAL, least=0.0, default=1.0)
    if factor == 1.0 and head_dim % 2:
        raise ValueError(
            f"config.json has head_dim = {head_dim}: rotary embedding pairs its elements, so it must be even"
        )
    if factor != 1.0 and not may_be_partial:
        raise ValueError(f"config.json has {_PARTIAL} = {factor:g}: this family rotates whole heads")
    rotary_dim = int(head_dim * factor)
    if not 2 <= rotary_dim <= head_dim or rotary_dim % 2:
        raise ValueError(
            f"config.json has {_PARTIAL} = {factor:g}: of head_dim = {head_dim} it rotates {rotary_dim} elements, "
            f"which must be an even number from 2 to {head_dim}"
        )
    return rotary_dim


def _default(base: RopeSpec, parameters: Config) -> RopeSpec:
    return base


def _linear(base: RopeSpec, parameters: Config) -> RopeSpec:
    factor = number(parameters, "factor", least=1.0)
    return replace(base, scaling=LinearScaling(factor=factor), max_positions=int(base.max_positions * factor))


def _dynamic(base: RopeSpec, parameters: Config) -> RopeSpec:
    """Up to the trained length its frequencies are the unscaled ones; beyond, they move with every token."""
    number(parameters, "factor", least=1.0)
    return replace(base, limit_reason=_moving("dynamic", limit=base.max_positions))


def _yarn(base: RopeSpec, parameters: Config) -> RopeSpec:
    original = positive(parameters, _ORIGINAL)
    ratio = base.max_positions / original if "factor" in parameters else None
    factor = number(parameters, "factor", least=1.0, default=ratio)
    scaling = YarnScaling(
        factor=factor,
        original_positions=original,
        beta_fast=number(parameters, "beta_fast", least=0.0, default=32.0) or 32.0,
        beta_slow=number(parameters, "beta_slow", least=0.0, default=1.0) or 1.0,
        truncate=bool(parameters.get("truncate", True)),
    )
    if scaling.beta_fast < scaling.beta_slow:
        raise ValueError(
            f"config.json has beta_fast = {scaling.beta_fast:g}, less than beta_slow = {scaling.beta_slow:g}"
        )
    return replace(
        base,
        scaling=scaling,
        attention_factor=number(
            parameters, "attention_factor", least=0.0, default=_yarn_attention_factor(parameters, factor=factor)
        ),
        max_positions=max(base.max_positions, int(original * factor)),
    )


def _yarn_attention_factor(parameters: Config, *, factor: float) -> float:
    mscale = number(parameters, "mscale", least=0.0, default=0.0)
    mscale_all_dim = number(parameters, "mscale_all_dim", least=0.0, default=0.0)
    if mscale and mscale_all_dim:
        return _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
    return _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(base: RopeSpec, parameters: Config) -> RopeSpec:
    """The short factors alone: the long ones would be for sequences beyond the original length."""
    original = positive(parameters, _ORIGINAL)
    if original == 1:
        raise ValueError(f"config.json has {_ORIGINAL} = 1: it must be 2 or more, for its logarithm divides")
    factor = number(parameters, "factor", least=1.0, default=max(base.max_positions / original, 1.0))
    short = _factors(parameters, "short_factor", count=base.rotary_dim // 2)
    _factors(parameters, "long_factor", count=base.rotary_dim // 2)
    spec = replace(
        base,
        scaling=FrequencyFactors(factors=short),
        attention_factor=number(
            parameters, "attention_factor", least=0.0, default=math.sqrt(1 + math.log(factor) / math.log(original))
        ),
    )
    if original >= base.max_positions:
        return spec
    return replace(spec, max_positions=original, limit_reason=_moving("longrope", limit=original))


def _factors(parameters: Config, key: str, *, count: int) -> tuple[float, ...]:
    values = parameters.get(key)
    if not isinstance(values, list) or len(values) != count:
        found = f"a list of {len(values)}" if isinstance(values, list) else repr(values)
        raise ValueError(
            f"config.json has {key} = {found}: it must be a list of {count} numbers, one for two rotated elements"
        )
    if not all(is_number(value) and value > 0 for value in values):
        raise ValueError(f"config.json has {key} = {values!r}: they must be numbers above 0")
    return tuple(float(value) for value in values)


def _llama3(base: RopeSpec, parameters: Config) -> RopeSpec:
    scaling = Llama3Scaling(
        factor=number(parameters, "factor", least=1.0),
        low_freq_factor=number(parameters, "low_freq_factor", least=1e-6),
        high_freq_factor=number(parameters, "high_freq_factor", least=1e-6),
        original_positions=positive(parameters, _ORIGINAL),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ValueError(
            f"config.json has high_freq_factor = {scaling.high_freq_factor:g}: it must be above low_freq_factor = "
            f"{scaling.low_freq_factor:g}"
        )
    return replace(base, scaling=scaling)


def _moving(kind: str, *, limit: int) -> str:
    return (
        f"rope type {kind!r} changes its frequencies beyond {limit} positions: tokens there would depend on how a "
        f"prompt is cut into chunks"
    )


_PARTIAL = "partial_rotary_factor"
_TRAINED = "max_position_embeddings"
_ORIGINAL = "original_max_position_embeddings"
_READERS: dict[str, Reader] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
