"""Packages that are not ours under our names, and what generated code lacks: one sentence each."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.process import own_packages


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with Muster's packages, as they are when they are installed; `worker` says that it runs."""
    for name in own_packages.PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("OWNER = 'muster'\n")
    (tmp_path / "proto" / "inference_pb2.py").touch()
    (tmp_path / "worker" / "__main__.py").write_text("import sys; print('runs', sys.argv[1:], sys.path[0])\n")
    (tmp_path / "parallel" / "process").mkdir()
    (tmp_path / "parallel" / "process" / "__init__.py").touch()
    shutil.copy(own_packages.__file__, tmp_path / "parallel" / "process")
    return tmp_path


def run(folder: Path) -> "subprocess.CompletedProcess[str]":
    script = folder / "parallel" / "process" / "own_packages.py"
    command = [sys.executable, "-P", str(script), "worker", "--some", "argument"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_a_module_runs_with_its_arguments_and_an_unchanged_path(installed: Path) -> None:
    done = run(installed)
    assert done.stdout.startswith("runs ['--some', 'argument']"), done.stderr
    assert str(installed) not in done.stdout


def test_a_package_that_was_installed_over_ours_is_told_in_a_sentence(installed: Path) -> None:
    (installed / "proto" / "__init__.py").write_text("Message = object\n")
    information = installed / "proto_plus-1.27.2.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: proto-plus\nVersion: 1.27.2\n")
    (information / "RECORD").write_text("proto/__init__.py,,\n")
    done = run(installed)
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith(f"{installed}/proto/__init__.py, of proto-plus, is in the way of Muster's own package")
    assert "virtual environment of its own" in sentence


def test_a_package_that_cannot_be_imported_is_told_in_a_sentence(installed: Path) -> None:
    (installed / "proto" / "__init__.py").write_text("from proto.marshal import Marshal\n")
    done = run(installed)
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert "is in the way of Muster's own package proto" in sentence


def test_a_package_of_which_a_part_was_removed_is_told_in_a_sentence(installed: Path) -> None:
    (installed / "proto" / "__init__.py").unlink()
    done = run(installed)
    assert done.returncode == 1
    assert done.stderr == f"Muster's own package proto is not whole in {installed}: install Muster anew\n"


def test_ctrl_c_ends_a_command_quietly_from_its_first_import_on(installed: Path) -> None:
    (installed / "worker" / "cli.py").write_text("raise KeyboardInterrupt\n")
    program = "from parallel.process.own_packages import run_command; run_command('worker.cli')"
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(
        command, env={"PYTHONPATH": str(installed)}, capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == (130, "")


def test_messages_that_were_not_generated_are_told_in_a_sentence(installed: Path) -> None:
    (installed / "proto" / "inference_pb2.py").unlink()
    done = run(installed)
    assert done.returncode == 1
    assert done.stderr == (f"the generated messages are not in {installed}/proto: run `make proto` in {installed}\n")
