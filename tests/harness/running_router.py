"""A whole router in this process, over real launchers: the same code as `router --config`, with a handle to look in."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from benchmarks.bench import drain
from proto import control_pb2
from router.check import check_file
from router.errors import ClusterError
from router.generation import Generation, GenerationRequest
from router.server import RouterServer

_TIMEOUT_S = 120.0


class RunningRouter:
    """A serving router, its event loop in a thread of its own."""

    def __init__(self, server: RouterServer, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        self._loop = loop

    @property
    def address(self) -> str:
        """Where clients reach it."""
        return self.server.address

    def run(self, work: Coroutine[Any, Any, Any], *, timeout_s: float = _TIMEOUT_S) -> Any:
        """Runs `work` in the router's loop and returns its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=timeout_s)

    def generate_all(self, requests: Sequence[GenerationRequest], *, stagger_s: float = 0.0) -> list[Generation]:
        """Submits all, `stagger_s` apart, and waits until all are finished."""

        async def work() -> list[Generation]:
            generations = []
            for request in requests:
                generations.append(self.server.dispatcher.submit(request))
                await asyncio.sleep(stagger_s)
            for generation in generations:
                await drain(generation)
            return generations

        result: list[Generation] = self.run(work())
        return result

    def wait_until_empty(self) -> None:
        """Waits until no replica holds anything of any generation; their leaders prove the pages' integrity then."""

        async def work() -> None:
            while self.server.dispatcher.num_held:
                await asyncio.sleep(0.01)

        self.run(work(), timeout_s=20)


def greedy(
    prompt_ids: Sequence[int], *, max_new_tokens: int, forced_ids: Sequence[int] = (), logits: bool = False
) -> GenerationRequest:
    """A greedy request without end tokens."""
    return GenerationRequest(
        prompt_ids=tuple(prompt_ids),
        max_new_tokens=max_new_tokens,
        stop_token_ids=frozenset(),
        sampling=control_pb2.Sampling(temperature=0, top_p=1),
        probe=control_pb2.Probe(forced_ids=forced_ids, logits=logits),
    )


def topology(model: Path | str, *, pools: dict[str, Any], devices: int, **more: Any) -> dict[str, Any]:
    """A file's content: one local host with `devices` ranks on a free port."""
    return {
        "model": str(model),
        "listen": "127.0.0.1:0",
        "hosts": [{"name": "here", "address": "local", "devices": devices}],
        "pools": pools,
        **more,
    }


@contextmanager
def running_router(
    content: dict[str, Any], folder: Path, *, launcher_arguments: Sequence[str] = ()
) -> Iterator[RunningRouter]:
    """Starts a router of the topology `content`, written to `folder`; ends it and all its processes after."""
    path = folder / "topo.yaml"
    path.write_text(yaml.safe_dump(content))
    checked = check_file(path)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def make() -> RouterServer:
        return RouterServer(checked, launcher_arguments=launcher_arguments)

    server = asyncio.run_coroutine_threadsafe(make(), loop).result()
    router = RunningRouter(server, loop)
    try:
        router.run(server.start(Console(stderr=True)))
        yield router
    finally:
        router.run(server.stop(ClusterError("the test is over")), timeout_s=30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=10)
        loop.close()
