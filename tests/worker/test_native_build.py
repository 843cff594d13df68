"""The launcher builds native kernels before ranks start, and goes on without where it cannot."""

import asyncio
import logging
from pathlib import Path

import pytest

from native.build import Build
from proto import control_pb2
from worker.launcher import native_build
from worker.launcher.native_build import build_native


def request(*, device: str = "cpu", kernels: str = "auto") -> control_pb2.AssignRequest:
    return control_pb2.AssignRequest(device_kind=device, engine=control_pb2.Engine(kernels=kernels))


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """What the launcher builds in these tests: a library of one function."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "one.cpp").write_text('extern "C" { int one() { return 1; } }\n')
    build = Build(sources=tmp_path / "src", folders=(tmp_path / "built",))
    monkeypatch.setattr(native_build, "Build", lambda: build)
    return build


def test_an_assignment_on_a_cpu_finds_the_library_built(build: Build) -> None:
    asyncio.run(build_native(request()))
    assert build.find() is not None


@pytest.mark.parametrize("given", [request(device="cuda"), request(kernels="torch")])
def test_nothing_is_built_for_ranks_that_would_not_load_it(build: Build, given: control_pb2.AssignRequest) -> None:
    asyncio.run(build_native(given))
    assert build.find() is None


def test_a_build_that_fails_is_a_warning(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    (build.sources / "one.cpp").write_text("nonsense\n")
    with caplog.at_level(logging.WARNING):
        asyncio.run(build_native(request()))
    (record,) = caplog.records
    assert record.getMessage().startswith("no native kernels, ranks use torch's: ")
