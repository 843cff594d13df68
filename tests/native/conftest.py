"""The library in each build that this processor can run."""

from pathlib import Path

import pytest

from native.build import AVX2, NATIVE, Build
from native.library import NativeLibrary


@pytest.fixture(scope="module", params=[NATIVE, AVX2])
def library(request: pytest.FixtureRequest) -> NativeLibrary:
    flags = Path("/proc/cpuinfo").read_text()
    if request.param == AVX2 and " avx2 " not in flags:
        pytest.skip("this processor has no AVX2")
    found = NativeLibrary(Build(march=request.param).make())
    assert found.lanes() == (16 if request.param == NATIVE and " avx512f " in flags else 8)
    return found
