"""The library in builds with sanitizers: no byte outside, no undefined step, no race."""

import subprocess
import sys
from pathlib import Path

import pytest

from native.build import AVX2, NATIVE, Build


@pytest.mark.timeout(120)
@pytest.mark.parametrize("march", [NATIVE, AVX2])
def test_no_byte_is_touched_that_is_not_the_call_s_own(march: str, tmp_path: Path) -> None:
    """The same products in a build with sanitizers, over memory that begins and ends where it must."""
    build = Build(
        march=march,
        extra=("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"),
        folders=(tmp_path,),
    )
    run_sanitized(build, runtime="libasan.so", environment={"ASAN_OPTIONS": "detect_leaks=0"})


@pytest.mark.timeout(120)
def test_the_ranks_of_a_group_and_what_moves_their_messages_never_race(tmp_path: Path) -> None:
    """Ranks as threads of one process, for the sanitizer to see both sides of each access."""
    build = Build(extra=("-fsanitize=thread", "-g", "-O1"), folders=(tmp_path,))
    run_sanitized(build, "group", runtime="libtsan.so", environment={"TSAN_OPTIONS": "exitcode=66"})


def run_sanitized(build: Build, *arguments: str, runtime: str, environment: dict[str, str]) -> None:
    path = subprocess.run(["g++", f"-print-file-name={runtime}"], capture_output=True, text=True, check=True).stdout
    done = subprocess.run(
        [sys.executable, "-m", "tests.native.sanitized", str(build.make()), *arguments],
        env={"LD_PRELOAD": path.strip(), "PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-2000:]
