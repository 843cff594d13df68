"""A launcher whose rank processes live on while layouts come and go: each is a higher epoch of its replicas."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from parallel.topology import HostSpec, PoolSpec, ReplicaPlan, plan_topology
from parallel.wire import assign_request
from proto import control_pb2
from router.dispatcher import Dispatcher
from router.errors import ClusterError
from router.generation import Generation, GenerationRequest
from router.launcher_client import LauncherClient
from router.replica_client import ReplicaClient
from tests.harness.router_process import worker_command
from tests.harness.running_router import drain

_ROUTER_ID = 11


class Bench:
    """All its work runs in a loop of its own thread."""

    def __init__(self, address: str, *, num_devices: int, model: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._host = HostSpec(name="bench", address=address, device="cpu", devices=tuple(range(num_devices)))
        self._epoch = 0
        self._lost: list[str] = []
        self._dispatcher = Dispatcher(max_waiting=1000)
        self._launcher = self._run(self._connect(address, model=model), timeout_s=60)

    def generate(
        self, pools: Sequence[PoolSpec], requests: Sequence[GenerationRequest], *, model: str, timeout_s: float
    ) -> list[Generation]:
        """Brings `pools` up on the model in folder `model` and runs all requests at once, until nothing is held."""
        work = self._generate(pools, requests, model=model)
        result: list[Generation] = self._run(work, timeout_s=timeout_s)
        return result

    def close(self) -> None:
        """Ends the lease, and with it every rank."""
        self._run(self._launcher.close(), timeout_s=20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, Any], *, timeout_s: float) -> Any:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout=timeout_s)
        except TimeoutError:
            future.cancel()
            raise AssertionError(f"nothing came within {timeout_s:g} s; lost so far: {self._lost}") from None

    async def _connect(self, address: str, *, model: str) -> LauncherClient:
        launcher = LauncherClient(self._host, address=address, router_id=_ROUTER_ID)
        await launcher.hello(model)
        await launcher.watch(
            heartbeat_timeout_s=60,
            on_lost=lambda lost: self._lose(f"rank {lost.global_rank} of {lost.replica}: {lost.reason}"),
            on_gone=self._lose,
        )
        return launcher

    async def _generate(
        self, pools: Sequence[PoolSpec], requests: Sequence[GenerationRequest], *, model: str
    ) -> list[Generation]:
        self._epoch += 1
        topology = plan_topology(model=model, hosts=[self._host], pools=pools)
        replicas = list(await asyncio.gather(*(self._assign(plan, model=model) for plan in topology.replicas)))
        dispatcher = self._dispatcher = Dispatcher(max_waiting=1000)
        try:
            for replica in replicas:
                replica.attach(on_events=dispatcher.on_events, on_gone=self._lose)
            dispatcher.set_replicas(replicas)
            for replica in replicas[:-1]:
                replica.send(control_pb2.ToReplica(peer=replicas[-1].peer()))
            dispatcher.open()
            generations = [dispatcher.submit(request) for request in requests]
            for generation in generations:
                await drain(generation)
            while dispatcher.num_held:
                await asyncio.sleep(0.005)
            return generations
        finally:
            for replica in replicas:
                await replica.close()

    async def _assign(self, plan: ReplicaPlan, *, model: str) -> ReplicaClient:
        replica = ReplicaClient(plan, epoch=self._epoch, launcher=self._launcher)

        def on_event(event: control_pb2.AssignEvent) -> None:
            if event.WhichOneof("event") == "ready":
                replica.endpoints[event.ready.global_rank] = event.ready.endpoint

        request = assign_request(
            plan,
            host=self._host,
            addresses=("127.0.0.1", "127.0.0.1"),
            rendezvous_port=self._launcher.ports[plan.placements[0].device],
            model=model,
            router_id=_ROUTER_ID,
            epoch=self._epoch,
            secret=self._epoch,
            start_timeout_s=100,
        )
        await self._launcher.assign(request, on_event=on_event)
        return replica

    def _lose(self, reason: str) -> None:
        """Ends what runs at once: a rank that is gone never answers."""
        self._lost.append(reason)
        self._dispatcher.fail_all(ClusterError("; ".join(self._lost)))


@contextmanager
def running_bench(*, num_devices: int, model: str) -> Iterator[Bench]:
    """A launcher process with room for `num_devices` ranks, which start when first assigned; `model` is any folder."""
    with worker_command("--threads", "1") as (_, address):
        bench = Bench(address, num_devices=num_devices, model=model)
        try:
            yield bench
        finally:
            bench.close()
