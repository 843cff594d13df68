"""Starts and ends the launcher of a host whose address is `local`: a child that ends with the router."""

import asyncio
import contextlib
from collections.abc import Sequence

from parallel.process.address import Address
from parallel.process.listening import loopback_host
from parallel.process.own_packages import module_command
from router.errors import ClusterError

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 5.0


class LocalLauncher:
    """A `worker` process whose standard input is held open: the system closes it when the router dies."""

    def __init__(self, process: asyncio.subprocess.Process, *, address: str) -> None:
        self._process = process
        self.address = address

    @classmethod
    async def start(cls, *, host: str, arguments: Sequence[str] = ()) -> "LocalLauncher":
        """Starts a launcher on a free loopback port; ClusterError naming `host` where it does not come up."""
        process = await asyncio.create_subprocess_exec(
            *module_command("worker"),
            *("--listen", str(Address(host=loopback_host(), port=0)), "--exit-with-stdin", "--log-level", "WARNING"),
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # A group of its own: Ctrl-C in a terminal reaches the router alone, which ends things in order.
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            line = await asyncio.wait_for(process.stdout.readline(), timeout=_START_TIMEOUT_S)
        except TimeoutError:
            line = b""
        if not line:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            raise ClusterError(f"host {host}: its local launcher did not come up; its own messages are above")
        return cls(process, address=line.decode().strip())

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    async def stop(self) -> None:
        """Ends the launcher, and with it its ranks; idempotent."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), timeout=_STOP_TIMEOUT_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
