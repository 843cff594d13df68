"""What is built and installed is whole: a source archive, a wheel from it, and from that a router that serves."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZipFile

import pytest

from parallel.process.own_packages import PACKAGES
from tests.harness.checkpoints import Oracle
from tests.harness.router_process import Command

ROOT = Path(__file__).parents[1]
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
TOPOLOGY = """model: {model}
listen: 127.0.0.1:0
hosts: [{{address: "{worker}", devices: 2}}]
pools: {{prefill: {{}}, decode: {{}}}}
engine: {{kv_tokens: 512}}
"""


def run(arguments: Sequence[object], *, cwd: Path, code: int = 0) -> str:
    """Runs a command, which ends with `code`, without this checkout on its path; returns what it printed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, arguments)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    output = f"{done.stdout}{done.stderr}"
    assert done.returncode == code, output
    return output


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a source archive of this tree, in which nothing has been generated."""
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    generated = shutil.ignore_patterns("__pycache__", "*_pb2*")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tree / name, ignore=generated)
    for name in FILES:
        shutil.copy(ROOT / name, tree)
    build = "from setuptools import build_meta; build_meta.build_sdist('..')"
    run([sys.executable, "-c", build], cwd=tree)
    (archive,) = folder.glob("muster-*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", archive], cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands of an environment that has the wheel, and sees the libraries that are installed here.

    A folder that a .pth file names has no .pth files of its own read: what is installed editable here is not seen.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run([*pip, "install", "--no-index", "--no-deps", wheel], cwd=folder)
    place = run([python, "-P", "-c", "import router, proto; print(router.__file__, proto.__file__)"], cwd=folder)
    assert place.split() == [str(site / name / "__init__.py") for name in ("router", "proto")]
    return folder / "bin"


def test_a_wheel_has_every_module_and_the_generated_ones(wheel: Path) -> None:
    sources = {str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    protos = [path.stem for path in (ROOT / "proto").glob("*.proto")]
    generated = {f"proto/{name}_{kind}" for name in protos for kind in ("pb2.py", "pb2.pyi", "pb2_grpc.py")}
    with ZipFile(wheel) as archive:
        assert sources | generated <= set(archive.namelist())


def test_a_wheel_has_the_licence_and_says_which(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        assert "License-Expression: Apache-2.0\n" in archive.read(metadata).decode()
        assert archive.read(metadata.replace("METADATA", "licenses/LICENSE")) == (ROOT / "LICENSE").read_bytes()


@pytest.fixture
def proto_plus(commands: Path) -> Iterator[None]:
    """As though it had been installed later: its files are written over those of ours that have their names."""
    (ours,) = commands.parent.glob("lib/python*/site-packages/proto/__init__.py")
    text = ours.read_bytes()
    theirs = ours.parents[1] / "proto_plus-1.27.2.dist-info"
    theirs.mkdir()
    (theirs / "METADATA").write_text("Metadata-Version: 2.1\nName: proto-plus\nVersion: 1.27.2\n")
    (theirs / "RECORD").write_text("proto/__init__.py,,\n")
    ours.write_text("from .fields import Field\n")
    yield
    ours.write_bytes(text)
    shutil.rmtree(theirs)


@pytest.mark.usefixtures("proto_plus")
@pytest.mark.parametrize("command", ["router", "worker"])
def test_an_installed_command_says_who_has_taken_the_place_of_its_messages(
    command: str, commands: Path, tmp_path: Path
) -> None:
    (sentence,) = run([commands / command, "--help"], cwd=tmp_path, code=1).splitlines()
    assert "proto/__init__.py, of proto-plus, is in the way of Muster's own package proto: install Muster" in sentence


@contextmanager
def running(program: Path, *arguments: str, cwd: Path) -> Iterator[Command]:
    command = Command(arguments, program=[str(program)], cwd=cwd, environment={"PYTHONPATH": ""})
    try:
        yield command
    finally:
        command.kill()


@pytest.mark.timeout(120)
def test_an_installed_router_checks_and_serves_from_any_folder(commands: Path, llama: Oracle, tmp_path: Path) -> None:
    assert "Usage: router" in run([commands / "router", "--help"], cwd=tmp_path)
    with running(commands / "worker", "--listen", "127.0.0.1:0", "--mock", cwd=tmp_path) as worker:
        address = worker.wait_for(r"(127\.0\.0\.1:\d+)\n")
        (tmp_path / "topo.yaml").write_text(TOPOLOGY.format(model=llama.folder, worker=address))
        assert "hand-off" in run([commands / "router", "check", "--config", "topo.yaml"], cwd=tmp_path)
        with running(commands / "router", "--config", "topo.yaml", cwd=tmp_path) as router:
            to = router.wait_for(r"serving on (\S+)")
            generate = [commands / "router", "generate", "--raw", "--to", to, "--max-new-tokens", "5", "w5 w6 w7"]
            assert run(generate, cwd=tmp_path).strip()


def test_an_installed_router_says_where_the_demo_is_made(commands: Path, tmp_path: Path) -> None:
    (tmp_path / "topo.yaml").write_text(TOPOLOGY.format(model="demo", worker="local"))
    output = run([commands / "router", "check", "--config", "topo.yaml"], cwd=tmp_path, code=1)
    assert "run `make demo-model` in a checkout" in output
