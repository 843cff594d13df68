"""The threads that calls make, by whatever library: none for one thread, one team for each thread that calls."""

import os
import subprocess
import sys

import pytest

from native.library import NativeLibrary


@pytest.mark.timeout(120)
def test_one_thread_makes_none_two_make_one_team_and_a_second_caller_makes_its_own(library: NativeLibrary) -> None:
    """The third is why a rank computes in its main thread alone: teams of two callers wait for each other's cores."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.native.teams", str(library.path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as a rank's process is started: what is loaded starts none
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout.split() == ["0", "1", "2", "1"], done.stdout + done.stderr[-2000:]
