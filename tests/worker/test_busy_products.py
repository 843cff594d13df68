"""Products of two threads on a machine whose cores others burn: they come to an end, whoever packed the weights."""

import os
import subprocess
import sys

import pytest

from worker.launcher.rank_child import OPENMP_WAITS

KERNELS = ("torch", "native")


@pytest.mark.timeout(200)
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("kernels", KERNELS)
def test_weights_packed_by_one_thread_are_stepped_over_by_others_while_the_cores_are_burnt(kernels: str) -> None:
    step_while_cores_are_burnt(kernels, steps=20, timeout_s=180)


@pytest.mark.full
@pytest.mark.timeout(1000)
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("kernels", KERNELS)
def test_hundreds_of_steps_come_to_an_end_too(kernels: str) -> None:
    step_while_cores_are_burnt(kernels, steps=400, timeout_s=900)


def step_while_cores_are_burnt(kernels: str, *, steps: int, timeout_s: float) -> None:
    """In a process of its own: one that stands still is ended."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.worker.busy_products", kernels, str(steps)],
        env={**os.environ, **OPENMP_WAITS},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.stdout == "done\n", done.stdout + done.stderr[-2000:]
