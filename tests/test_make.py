"""Set-up on machines that lack something, and what its steps print: a sentence, and all of it only where one fails."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECK = ROOT / "tools" / "check_machine.sh"
QUIETLY = ROOT / "tools" / "quietly.sh"


def run(
    arguments: Sequence[object], *, path: str | None = None, cwd: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, **({"PATH": path} if path is not None else {})}
    # What `make test` itself hands down: a make under it would announce the folders that it enters.
    for name in ("CXX", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
        environment.pop(name, None)
    command = list(map(str, arguments))
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A PATH on which nothing is found but what the script itself runs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sh").symlink_to("/bin/sh")
    return folder


def copy_of_make(folder: Path) -> None:
    """What `make` reads before anything is set up."""
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("tools", "examples", "native"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("built", "__pycache__"))
    (folder / "proto").mkdir()


def fake_python(folder: Path, *, version: str, lacks: str = "nothing") -> Path:
    """A python3 that says that it is of `version`, and has no module whose name is in `lacks`."""
    script = folder / "python3"
    script.write_text(
        f"""#!/bin/sh
case "$2" in
*print*) echo {version} ;;
*sys.exit*) exec {sys.executable} -c "import sys; sys.exit(tuple(map(int, '{version}'.split('.'))) < (3, 11))" ;;
*{lacks}*) exit 1 ;;
esac
"""
    )
    script.chmod(0o755)
    return script


def test_a_machine_that_has_all_is_told_nothing(bare: Path) -> None:
    (bare / "g++").symlink_to("/bin/true")
    done = run([CHECK, sys.executable], path=str(bare))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_compiler_is_a_hint_and_not_an_end(bare: Path) -> None:
    done = run([CHECK, fake_python(bare, version="3.12")], path=str(bare))
    assert done.returncode == 0
    assert done.stdout == "hint: there is no C++ compiler here; everything works without one\n"


def test_a_machine_without_python_is_told_what_to_install(bare: Path) -> None:
    done = run([CHECK, "python3"], path=str(bare))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Muster needs Python 3.11 or newer, and there is no python3 here: install it")


def test_a_python_that_is_too_old_is_told_with_its_version(bare: Path) -> None:
    fake_python(bare, version="3.9")
    done = run([CHECK, "python3"], path=str(bare))
    assert done.returncode == 1
    assert done.stderr.startswith("Muster needs Python 3.11 or newer, and python3 is 3.9: install a newer one")


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_a_python_without_virtual_environments_is_told_how_to_get_them(module: str, bare: Path) -> None:
    fake_python(bare, version="3.12", lacks=module)
    done = run([CHECK, "python3"], path=str(bare))
    assert done.returncode == 1
    assert "python3 cannot make virtual environments" in done.stderr
    assert "apt install python3-venv" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_python_that_does_not_run_is_told(bare: Path) -> None:
    done = run([CHECK, "/bin/false"], path=str(bare))
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert done.stderr.startswith("/bin/false does not run")


def test_a_step_that_goes_well_prints_what_it_does_alone(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "install.log"
    done = run([QUIETLY, log, "a step (1 s)", "sh", "-c", "echo noise; echo ERROR: more noise >&2"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "a step (1 s)\n", "")
    assert "noise\nERROR: more noise\n" in log.read_text()


def test_a_step_that_fails_prints_all_of_its_own_and_keeps_its_code(tmp_path: Path) -> None:
    log = tmp_path / "install.log"
    run([QUIETLY, log, "one", "echo", "of the step before"])
    done = run([QUIETLY, log, "two", "sh", "-c", "echo first; echo ERROR: last >&2; exit 3"])
    assert done.returncode == 3
    assert done.stdout == "two\n"
    assert done.stderr.startswith("first\nERROR: last\nfailed with exit code 3: sh -c")
    assert "of the step before" not in done.stderr


def test_make_checks_the_machine_before_it_does_anything(tmp_path: Path) -> None:
    copy_of_make(tmp_path)
    done = run(["make", "demo", "PYTHON=no-such-python"], cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[0].startswith("Muster needs Python 3.11 or newer, and there is no no-such-python")
    assert not (tmp_path / ".venv").exists()


def test_make_stops_at_a_step_that_fails_and_shows_it(tmp_path: Path) -> None:
    copy_of_make(tmp_path)
    (tmp_path / ".venv").touch()  # no folder can be made here
    done = run(["make", "install", f"PYTHON={sys.executable}"], cwd=tmp_path)
    assert done.returncode == 2
    assert "set-up 1/5" in done.stdout and "set-up 2/5" not in done.stdout
    assert ".venv" in done.stderr and "failed with exit code 1" in done.stderr


def test_an_old_make_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "old.mk").write_text(f"override .FEATURES :=\nMAKE_VERSION := 3.81\ninclude {ROOT / 'Makefile'}\n")
    done = run(["make", "-f", "old.mk", "demo"], cwd=tmp_path)
    assert done.returncode == 2
    assert "Muster needs GNU make 4.3 or newer, and this is 3.81" in done.stderr


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_a_target_that_a_page_names_is_there(page: str) -> None:
    named = set(re.findall(r"`make ([a-z-]+)`", (ROOT / page).read_text()))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named and named <= targets


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_a_file_that_a_page_links_is_there(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing
