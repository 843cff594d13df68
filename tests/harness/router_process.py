"""The command `router` as an operator runs it, and every process under it."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml


class Command:
    """A running command whose output is read as it comes: `python -m` with `arguments`, or `program` with them."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        program: Sequence[str] = (sys.executable, "-m"),
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._process = subprocess.Popen(
            [*program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd,
            env={**os.environ, **(environment or {})},
        )
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def output(self) -> str:
        """What it has printed."""
        return "".join(self.lines)

    def wait_for(self, pattern: str, *, timeout_s: float = 60) -> str:
        """Waits until a line matches and returns the first group."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = re.search(pattern, self.output)
            if found:
                return found.group(1)
            if self._process.poll() is not None:
                time.sleep(0.2)
                break
            time.sleep(0.02)
        found = re.search(pattern, self.output)
        assert found, f"no {pattern!r} in:\n{self.output}"
        return found.group(1)

    def wait(self, *, timeout_s: float = 20) -> int:
        """Waits for its end and returns the exit code."""
        return self._process.wait(timeout=timeout_s)

    def send_signal(self, number: int) -> None:
        """Sends it a signal."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """Ends it whatever state it is in; idempotent."""
        self._process.kill()
        self._process.wait(timeout=10)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line)


@contextmanager
def router_command(
    content: dict[str, Any],
    folder: Path,
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[tuple[Command, str]]:
    """`router --config` with the topology `content`: the command and its address. Leaves no process behind."""
    path = folder / "topo.yaml"
    path.write_text(yaml.safe_dump(content))
    command = Command(["router", "--config", str(path)], cwd=cwd, environment=environment)
    family: list[int] = []
    try:
        address = command.wait_for(r"serving on (\S+)")
        family = descendants(command.pid)
        yield command, address
    finally:
        command.kill()
        assert_all_gone(family)


@contextmanager
def worker_command(*arguments: str, host: str = "127.0.0.1") -> Iterator[tuple[Command, str]]:
    """`worker --listen` on a free port of `host`, which is loopback; gives the command and its address."""
    command = Command(["worker", "--listen", f"{host}:0", *arguments])
    try:
        yield command, command.wait_for(rf"({re.escape(host)}:\d+)\n")
    finally:
        command.send_signal(signal.SIGTERM)
        try:
            command.wait(timeout_s=10)
        finally:
            command.kill()


def descendants(pid: int) -> list[int]:
    """Every process under `pid`, children first."""
    found = [int(child) for child in _children_file(pid).split()]
    return found + [deeper for child in found for deeper in descendants(child)]


def command_line(pid: int) -> str:
    """The arguments of a process, '' where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def rank_pids(pid: int) -> list[int]:
    """The rank processes under `pid`, in the order of their devices: replicas are assigned side by side."""
    lines = {child: command_line(child) for child in descendants(pid)}
    ranks = {child: line for child, line in lines.items() if "worker.rank" in line}
    return sorted(ranks, key=lambda child: int(ranks[child].split("--device ")[1].split()[0]))


def assert_all_gone(pids: Sequence[int], *, timeout_s: float = 10) -> None:
    """Waits until every process is gone; fails with the ones that stay, and ends them."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and any(_is_alive(pid) for pid in pids):
        time.sleep(0.05)
    left = {pid: command_line(pid) for pid in pids if _is_alive(pid)}
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"processes left behind: {left}"


def _children_file(pid: int) -> str:
    try:
        return " ".join(task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/children"))
    except OSError:
        return ""


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
