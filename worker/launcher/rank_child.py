"""A rank as a child process of the launcher, behind a socket pair."""

import asyncio
import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass

from parallel.process.cores import THREADS_VARIABLE
from parallel.process.logs import LogLevel
from parallel.process.own_packages import module_command
from proto import control_pb2
from worker.launcher.rank_handle import RankCallbacks

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, kw_only=True)
class ChildSettings:
    """How rank processes are started. Hand-offs are kept on this machine where `is_loopback`."""

    is_loopback: bool
    log_level: LogLevel


class RankChild:
    """A `worker.rank` process. All its methods belong to the launcher's event loop."""

    def __init__(
        self,
        *,
        device: int,
        num_threads: int,
        rendezvous: socket.socket,
        settings: ChildSettings,
        callbacks: RankCallbacks,
    ) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._callbacks = callbacks
        self._writer: asyncio.StreamWriter | None = None
        self._backlog: list[bytes] = []
        command = [*module_command("worker.rank"), "--link-fd", str(theirs.fileno())]
        command += ["--rendezvous-fd", str(rendezvous.fileno()), "--parent", str(os.getpid())]
        command += ["--log-level", settings.log_level.value, "--device", str(device)]
        self._process = subprocess.Popen(
            command,
            pass_fds=(theirs.fileno(), rendezvous.fileno()),
            stdin=subprocess.DEVNULL,
            # The launcher's own output is read for one line only: what a rank or its libraries print goes to the log.
            stdout=sys.stderr,
            env=_environment(settings, num_threads=num_threads),
        )
        theirs.close()
        self._task = asyncio.create_task(self._serve(ours))

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def send(self, message: control_pb2.ToRank) -> None:
        """See RankHandle."""
        payload = message.SerializeToString()
        frame = _LENGTH.pack(len(payload)) + payload
        if self._writer is None:
            self._backlog.append(frame)
        elif not self._writer.is_closing():  # a rank that has ended may not have been seen to end yet
            self._writer.write(frame)

    async def stop(self) -> None:
        """See RankHandle. SIGKILL: it works on a stopped process too, and a rank has nothing to save."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await asyncio.wait([self._task])

    async def _serve(self, connection: socket.socket) -> None:
        reader, self._writer = await asyncio.open_connection(sock=connection, limit=1 << 24)
        for frame in self._backlog:
            self._writer.write(frame)
        try:
            while True:
                header = await reader.readexactly(_LENGTH.size)
                payload = await reader.readexactly(_LENGTH.unpack(header)[0])
                self._callbacks.message(control_pb2.FromRank.FromString(payload))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the process is ending
        finally:
            self._writer.close()
            self._process.kill()  # whatever ended this task, a rank that nobody hears must not go on
            code = await asyncio.to_thread(self._process.wait)
            self._callbacks.ended(describe_exit(self.pid, code))


def describe_exit(pid: int, code: int) -> str:
    """How a process ended, in words."""
    if code < 0:
        return f"its process {pid} was ended by {signal.Signals(-code).name}"
    return f"its process {pid} exited with code {code}"


#: How many products oneDNN keeps compiled, half a megabyte each: its own cache, and torch's in front of it. By default
#: each keeps 1024. A rank has about seven kinds of weight, and at a time few numbers of rows
#: (`worker/kernels/torch_kernels.py`).
_COMPILED_PRODUCTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}

#: What a step frees, the next one takes again: glibc would give it back to the system in between, and up to 270,000
#: page faults of a rank were 7% of a prefill of 3,072 tokens. Blocks of more than 32 MB are mapped in any case.
KEPT_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}


#: How often an OpenMP thread that waits for the others of its team looks again before it sleeps: for about as long as a
#: step is busy between two calls. By default it looks for 5 ms, and where other processes want the cores, who is waited
#: for goes without them meanwhile: a product took 20 ms, and a step of hundreds of them seemed to stand still.
OPENMP_WAITS = {"GOMP_SPINCOUNT": "10000"}


def _environment(settings: ChildSettings, *, num_threads: int) -> dict[str, str]:
    """The child's environment. The threads are for what libraries start when they are loaded; `worker/rank_cores.py`
    follows what later assignments say.
    """
    defaults = {"NIXL_LOG_LEVEL": "WARN", **_COMPILED_PRODUCTS, **KEPT_MEMORY, **OPENMP_WAITS}
    # Else it would listen on every interface, although whoever reaches the launcher is here.
    defaults |= {"UCX_NET_DEVICES": "lo"} if settings.is_loopback else {}
    return {**defaults, "UCX_LOG_LEVEL": "error", **os.environ, THREADS_VARIABLE: str(num_threads)}
