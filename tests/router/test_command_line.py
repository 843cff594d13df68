"""What people get wrong on a command line is one sentence and an exit code, never a traceback."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import router.cli
import worker.cli
from tests import tiny_models
from tests.harness.checkpoints import Oracle

TOPOLOGY = """model: model
listen: {listen}
hosts: [{{address: local, devices: 1}}]
pools: {{unified: {{}}}}
"""


@pytest.fixture
def taken() -> Iterator[str]:
    """An address at which something listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def topology(folder: Path, *, listen: str = "127.0.0.1:0") -> Path:
    tiny_models.write_checkpoint(folder / "model", tiny_models.llama())
    path = folder / "topo.yaml"
    path.write_text(TOPOLOGY.format(listen=listen))
    return path


def assert_one_sentence(result: object, *words: str) -> None:
    """The error's text is one line, after at most the usage; the process would end with a code that is not 0."""
    output, code = getattr(result, "output", ""), getattr(result, "exit_code", 0)
    assert code in (1, 2), output
    assert isinstance(getattr(result, "exception", None), SystemExit), result
    lines = [line for line in output.splitlines() if line and not line.startswith(("Usage:", "Try "))]
    assert len(lines) == 1, output
    assert all(word in lines[0] for word in words), output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seed", "-1"], ["--seed", "0"]),
        (["--seed", str(2**64)], ["--seed", str(2**64 - 1)]),
        (["--seed", "one"], ["--seed"]),
        (["--top-k", "99999999999"], ["--top-k", str(2**31 - 1)]),
        (["--top-p", "1.5"], ["--top-p", "1"]),
        (["--temperature", "-1"], ["--temperature", "0"]),
        (["--temperature", "nan"], ["--temperature"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens", "1"]),
        (["--max-new-tokens", "99999999999"], ["--max-new-tokens", str(2**32 - 1)]),
        (["--to", "nonsense"], ["--to nonsense has no port; write host:port"]),
        (["--to", "::1"], ["--to ::1 has no port", "[::1]:30000"]),
        (["--to", "here:99999"], ["has a port out of range"]),
        (["--to", "here:0"], ["has port 0"]),
        (["--to", "127.0.0.1:1"], ["no router answers at 127.0.0.1:1"]),
        (["--to", "no.such.host.invalid:1"], ["no router answers at no.such.host.invalid:1"]),
        (["--stop", "\udcff"], ["is no UTF-8 at its character 0"]),
    ],
)
def test_a_generation_that_cannot_be_asked_for(arguments: list[str], words: list[str]) -> None:
    arguments = arguments if "--to" in arguments else [*arguments, "--to", "127.0.0.1:1"]
    assert_one_sentence(CliRunner().invoke(router.cli.app, ["generate", "a prompt", *arguments]), *words)


def test_a_prompt_that_is_no_utf_8() -> None:
    assert_one_sentence(CliRunner().invoke(router.cli.app, ["generate", "caf\udce9"]), "no UTF-8 at its character 3")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["router --config topo.yaml"]),
        (["--log-level", "foo", "--config", "topo.yaml"], ["--log-level", "foo"]),
        (["--config", "none.yaml"], ["none.yaml", "cannot be read: No such file or directory"]),
        (["check", "--config", "."], ["cannot be read: Is a directory"]),
        (["check"], ["--config"]),
        (["explain", "--config", "topo.yaml", "--rank", "-1"], ["rank -1 is outside unified/0"]),
        (["explain", "--config", "topo.yaml", "--rank", "0", "--replica", "x"], ["there is no replica x"]),
        (["draw", "--config", "topo.yaml", "--output", "none/x.svg"], ["none/x.svg cannot be written"]),
        (["draw", "--config", "topo.yaml", "--output", "."], [". cannot be written"]),
    ],
)
def test_a_file_or_rank_that_is_not_there(
    arguments: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert_one_sentence(CliRunner().invoke(router.cli.app, arguments), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--listen", "127.0.0.1:0", "--threads", "-3"], ["--threads", "1"]),
        (["--listen", "127.0.0.1:0", "--threads", "0"], ["--threads", "1"]),
        (["--listen", "127.0.0.1:0", "--log-level", "foo"], ["--log-level", "foo"]),
        (["--listen", "127.0.0.1:0", "--mock-step-s", "-1"], ["--mock-step-s", "0"]),
        (["--listen", "127.0.0.1"], ["--listen 127.0.0.1 has no port"]),
        (["--listen", "::1:0"], ["--listen ::1:0 has no port", "[::1]:30000"]),
        (["--listen", "[::1:0"], ["has host '[::1'"]),
        (["--listen", "0.0.0.0:0"], ["is beyond loopback", "--insecure"]),
        (["--listen", "[::]:0"], ["is beyond loopback", "--insecure"]),
        (["--listen", "192.0.2.1:0", "--insecure"], ["192.0.2.1:0: this machine has no such address"]),
        (["--listen", "[2001:db8::1]:0", "--insecure"], ["[2001:db8::1]:0: this machine has no such address"]),
        (["--listen", "no.such.host.invalid:0", "--insecure"], ["the host is not known here"]),
    ],
)
def test_a_launcher_that_cannot_be_started(arguments: list[str], words: list[str]) -> None:
    assert_one_sentence(CliRunner().invoke(worker.cli.app, arguments), *words)


def test_a_port_that_is_taken_is_told_by_the_launcher(taken: str) -> None:
    assert_one_sentence(
        CliRunner().invoke(worker.cli.app, ["--listen", taken]), f"cannot listen on {taken}: something listens there"
    )


def test_a_port_that_is_taken_is_told_by_the_router_and_nothing_else_is(
    taken: str, tmp_path: Path, llama: Oracle
) -> None:
    path = topology(tmp_path, listen=taken)
    path.write_text(path.read_text().replace("model: model", f"model: {llama.folder}"))
    command = [sys.executable, "-m", "router", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        f"router: cannot listen on {taken}: something listens there already; stop it, or take another port\n"
    )


@pytest.mark.parametrize("to", ["", "nonsense"])
def test_the_demo_does_not_ask_what_listens_already(to: str, taken: str) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "examples.demo", "--to", to or taken]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    sentence = f"cannot listen on {taken}: something listens there already; stop it, or take another port"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("--to nonsense has no port; write host:port" if to else f"{sentence}\n")
    assert len(done.stderr.splitlines()) == 1


def test_a_model_without_weights_is_told_when_it_is_to_be_served(tmp_path: Path) -> None:
    path = topology(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()
    assert_one_sentence(CliRunner().invoke(router.cli.app, ["--config", str(path)]), "holds no *.safetensors file")


@pytest.mark.parametrize("command", ["check", "schema"])
def test_a_reader_that_goes_away_is_no_error(command: str, tmp_path: Path) -> None:
    arguments = [] if command == "schema" else ["--config", str(topology(tmp_path))]
    process = subprocess.Popen(
        [sys.executable, "-m", "router", command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait(timeout=30)


def test_a_terminal_that_lacks_a_character_gets_another(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "router", "check", "--config", str(topology(tmp_path))]
    done = subprocess.run(
        command, capture_output=True, timeout=60, check=False, env={"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
