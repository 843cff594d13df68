"""A launcher whose rank processes live on while layouts come and go: each is a higher epoch of its replicas.

Benchmarks keep one layout up and measure it again and again; the sweep of the tests changes it with every case.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

from parallel.cores import RankCores
from parallel.topology import HostSpec, PoolSpec, ReplicaPlan, plan_topology
from parallel.wire import assign_request, machine_from_wire
from proto import control_pb2
from router.dispatcher import Dispatcher
from router.errors import ClusterError
from router.generation import FailedEvent, FinishedEvent, Generation, GenerationRequest
from router.handoff_pairs import bury, meet, part
from router.launcher_client import LauncherClient
from router.local_launcher import LocalLauncher
from router.machines import RankKey, cores_by_rank, cores_of, plan_cores
from router.replica_client import ReplicaClient

_ROUTER_ID = 11


class Bench:
    """All its work runs in a loop of its own thread; each of its ranks has `threads` threads."""

    def __init__(self, *, num_devices: int, model: str, threads: int = 1, outlives_ranks: bool = False) -> None:
        """Starts a launcher with room for `num_devices` ranks, which start when first assigned; any `model` will do.

        A rank that is lost ends everything, unless it `outlives_ranks`.
        """
        self._outlives_ranks = outlives_ranks
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._num_devices = num_devices
        self._epoch = 0
        self._lost: list[str] = []
        self._replicas: list[ReplicaClient] = []
        self._cores: Mapping[RankKey, RankCores] = {}
        self._dispatcher = Dispatcher(max_waiting=1000)
        self.run(self._connect(model, threads=threads), timeout_s=60)

    @property
    def launcher_pid(self) -> int:
        """The process whose children are the ranks."""
        return self._process.pid

    @contextmanager
    def pools(self, pools: Sequence[PoolSpec], *, model: str, timeout_s: float = 120.0) -> Iterator["LivePools"]:
        """Brings `pools` up on the model in folder `model` and keeps them until the end."""
        up = self._up(pools, model=model)
        self.run(up.__aenter__(), timeout_s=timeout_s)
        try:
            yield LivePools(self)
        finally:
            self.run(up.__aexit__(None, None, None), timeout_s=20)

    def generate(
        self, pools: Sequence[PoolSpec], requests: Sequence[GenerationRequest], *, model: str, timeout_s: float
    ) -> list[Generation]:
        """Brings `pools` up on the model in folder `model` and runs all requests at once, until nothing is held."""

        async def work() -> list[Generation]:
            async with self._up(pools, model=model):
                return await self._finish(requests)

        result: list[Generation] = self.run(work(), timeout_s=timeout_s)
        return result

    def finish(self, requests: Sequence[GenerationRequest], *, timeout_s: float) -> list[Generation]:
        """Runs all requests at once on the pools that are up, until nothing is held."""
        result: list[Generation] = self.run(self._finish(requests), timeout_s=timeout_s)
        return result

    def load(self, pool: str) -> control_pb2.Load:
        """What the leader of the pool's first replica said last."""
        replica = next(replica for replica in self._dispatcher.replicas if replica.plan.pool == pool)
        load = control_pb2.Load()
        load.CopyFrom(replica.load)
        return load

    @property
    def entry_pool(self) -> str:
        """The pool that takes prompts: `prefill` or `unified`."""
        return self._dispatcher.replicas[0].plan.pool

    def close(self) -> None:
        """Ends the lease, and with it every rank."""
        self.run(self._disconnect(), timeout_s=20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    @property
    def lost(self) -> Sequence[str]:
        """The ranks whose end the launcher has told so far."""
        return self._lost

    @property
    def dispatcher(self) -> Dispatcher:
        """That of the pools that are up."""
        return self._dispatcher

    def run(self, work: Coroutine[Any, Any, Any], *, timeout_s: float) -> Any:
        """Runs `work` in the bench's loop and returns its result; AssertionError with what was lost meanwhile."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout=timeout_s)
        except TimeoutError:
            future.cancel()
            raise AssertionError(f"nothing came within {timeout_s:g} s; lost so far: {self._lost}") from None

    async def _connect(self, model: str, *, threads: int) -> None:
        self._process = await LocalLauncher.start(host="bench", arguments=("--threads", str(threads)))
        address = self._process.address
        self._host = HostSpec(name="bench", address=address, device="cpu", devices=tuple(range(self._num_devices)))
        self._launcher = LauncherClient(self._host, address=address, router_id=_ROUTER_ID)
        hello = await self._launcher.hello(model)
        self._machines = {self._host.name: machine_from_wire(hello.machine)}
        await self._launcher.watch(
            heartbeat_timeout_s=60,
            on_lost=lambda lost: self._lose(f"rank {lost.global_rank} of {lost.replica}: {lost.reason}"),
            on_gone=self._lose,
        )

    async def _disconnect(self) -> None:
        await self._launcher.close()
        await self._process.stop()

    @asynccontextmanager
    async def _up(self, pools: Sequence[PoolSpec], *, model: str) -> AsyncIterator[None]:
        topology = plan_topology(model=model, hosts=[self._host], pools=pools)
        self._epoch += 1
        self._cores = cores_by_rank(plan_cores(topology, machines=self._machines))
        self._dispatcher = Dispatcher(max_waiting=1000)
        self._replicas = list(await asyncio.gather(*(self._assign(plan, model=model) for plan in topology.replicas)))
        try:
            await self._introduce()
            self._dispatcher.open()
            yield
            # The next epoch takes the target's memory: late writes must have landed, or never will.
            await self._part()
        finally:
            for replica in self._replicas:
                await replica.close()

    async def replace_decode(self, *, model: str, is_dead: bool = False) -> None:
        """Brings decode up in a higher epoch while prefill goes on; what it held fails. Where it `is_dead`, all of its
        processes have ended.
        """
        source, target = self._replicas
        await (bury(source, target) if is_dead else self._part())
        await target.close()
        self._dispatcher.fail_on(target, ClusterError(f"{target.name} is replaced"))
        self._epoch += 1
        self._replicas = [source, await self._assign(target.plan, model=model)]
        await self._introduce()

    async def _introduce(self) -> None:
        """Makes the replicas, the one that takes prompts first, known to each other and to the dispatcher."""
        self._dispatcher.set_replicas(self._replicas)
        source, *targets = self._replicas
        for target in targets:
            await meet(source, target)

    async def _part(self) -> None:
        source, *targets = self._replicas
        for target in targets:
            await part(source, target, released=partial(self._dispatcher.release_quarantined, source, target))

    async def _finish(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        generations = [self._dispatcher.submit(request) for request in requests]
        for generation in generations:
            await drain(generation)
        while self._dispatcher.num_held:
            await asyncio.sleep(0.005)
        return generations

    async def _assign(self, plan: ReplicaPlan, *, model: str) -> ReplicaClient:
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
            cores=cores_of(self._cores, plan),
        )
        await self._launcher.assign(request, on_event=lambda _: None)
        replica = ReplicaClient(plan, epoch=self._epoch, launcher=self._launcher)
        replica.attach(on_events=self._dispatcher.on_events, on_gone=self._lose)
        return replica

    def _lose(self, reason: str) -> None:
        """Ends what runs at once: a rank that is gone never answers."""
        self._lost.append(reason)
        if self._outlives_ranks:
            return
        self._dispatcher.fail_all(ClusterError("; ".join(self._lost)))


class LivePools:
    """Pools that are up."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def generate(self, requests: Sequence[GenerationRequest], *, timeout_s: float = 600.0) -> list[Generation]:
        """Runs all requests at once until nothing is held."""
        return self._bench.finish(requests, timeout_s=timeout_s)

    @property
    def entry_pool(self) -> str:
        """The pool that takes prompts: `prefill` or `unified`."""
        return self._bench.entry_pool

    def load(self, pool: str) -> control_pb2.Load:
        """What the leader of `pool` said last: steps and their seconds since the assignment."""
        return self._bench.load(pool)

    @property
    def launcher_pid(self) -> int:
        """The process whose children are the ranks."""
        return self._bench.launcher_pid


async def drain(generation: Generation) -> str:
    """Waits for the end of a generation and returns its reason; raises what it failed with."""
    while True:
        event = await generation.events.get()
        if isinstance(event, FailedEvent):
            raise event.error
        if isinstance(event, FinishedEvent):
            return event.reason


@contextmanager
def running_bench(*, num_devices: int, model: str, threads: int = 1, outlives_ranks: bool = False) -> Iterator[Bench]:
    """A bench that is closed at the end."""
    bench = Bench(num_devices=num_devices, model=model, threads=threads, outlives_ranks=outlives_ranks)
    try:
        yield bench
    finally:
        bench.close()
