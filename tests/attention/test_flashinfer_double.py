"""The double has no parameter that the installed FlashInfer does not have, in the same place and of the same kind."""

import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any, cast

import pytest

from tests.attention import flashinfer_double

flashinfer = pytest.importorskip("flashinfer")

CALLS = [
    "BatchDecodeWithPagedKVCacheWrapper.__init__",
    "BatchDecodeWithPagedKVCacheWrapper.plan",
    "BatchDecodeWithPagedKVCacheWrapper.run",
    "BatchPrefillWithPagedKVCacheWrapper.__init__",
    "BatchPrefillWithPagedKVCacheWrapper.plan",
    "BatchPrefillWithPagedKVCacheWrapper.run",
    "append_paged_kv_cache",
    "merge_states",
]
PLAN_OF_DECODE = "BatchDecodeWithPagedKVCacheWrapper.plan"


def find(module: Any, name: str) -> Callable[..., object]:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return cast(Callable[..., object], found)


def real_parameters(name: str) -> dict[str, Parameter]:
    parameters = dict(inspect.signature(find(flashinfer, name)).parameters)
    if name == PLAN_OF_DECODE:
        # It hands its keywords on to this one, where they are declared.
        hidden = inspect.signature(flashinfer.BatchDecodeWithPagedKVCacheWrapper._plan_impl).parameters
        parameters |= {key: value for key, value in hidden.items() if key not in parameters}
    return parameters


@pytest.mark.parametrize("name", CALLS)
def test_what_the_backend_passes_exists_in_the_installed_library(name: str) -> None:
    real = real_parameters(name)
    places = [key for key, value in real.items() if value.kind is Parameter.POSITIONAL_OR_KEYWORD]
    for place, parameter in enumerate(inspect.signature(find(flashinfer_double, name)).parameters.values()):
        if parameter.kind is Parameter.POSITIONAL_OR_KEYWORD:
            assert places[place] == parameter.name
        else:
            assert real[parameter.name].kind in (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


@pytest.mark.parametrize("name", CALLS)
def test_what_the_library_requires_the_backend_passes(name: str) -> None:
    required = {
        key
        for key, value in real_parameters(name).items()
        if value.default is Parameter.empty and value.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    }
    assert required <= set(inspect.signature(find(flashinfer_double, name)).parameters)


def test_an_unset_base_and_layout_of_the_log_sum_exp_are_what_the_backend_expects() -> None:
    defaults = {key: value.default for key, value in real_parameters("BatchPrefillWithPagedKVCacheWrapper.run").items()}
    assert (defaults["lse_base"], defaults["lse_layout"]) == ("log2", "NH")
