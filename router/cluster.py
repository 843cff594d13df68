"""Brings a topology up and holds it: launchers, leases, assignments, streams, and the first sign that it fails.

```
local launchers -> Hello -> Watch (lease) -> Assign, all replicas at once -> Attach -> Peer -> a token through each
```
"""

import asyncio
import logging
import secrets
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from parallel.cores import RankCores
from parallel.topology import ReplicaPlan, Topology
from parallel.wire import assign_request, machine_from_wire
from proto import control_pb2
from router.config import LOCAL, TimeoutsConfig
from router.dispatcher import Dispatcher
from router.errors import ClusterError
from router.handoff_pairs import meet
from router.launcher_client import LauncherClient
from router.local_launcher import LocalLauncher
from router.machines import RankKey, cores_by_rank, cores_of, plan_cores
from router.progress import StartProgress
from router.replica_client import ReplicaClient

logger = logging.getLogger(__name__)

#: How long a first failure waits for others: of a rank that ended and a peer that noticed, the first is the cause.
_CAUSE_GRACE_S = 1.0

T = TypeVar("T")


class Cluster:
    """A running topology. `failed` gets a sentence when it cannot go on; nothing repairs it."""

    def __init__(
        self,
        topology: Topology,
        *,
        timeouts: TimeoutsConfig,
        dispatcher: Dispatcher,
        fingerprint: str,
        launcher_arguments: Sequence[str] = (),
    ) -> None:
        self._topology = topology
        self._timeouts = timeouts
        self._dispatcher = dispatcher
        self._fingerprint = fingerprint
        self._launcher_arguments = tuple(launcher_arguments)
        self._router_id = secrets.randbits(64)
        self._local: list[LocalLauncher] = []
        self._launchers: dict[str, LauncherClient] = {}
        self._replicas: dict[str, ReplicaClient] = {}
        self._cores: Mapping[RankKey, RankCores] = {}
        self._waiting_for: dict[tuple[str, int], str] = {}
        self._failures: list[tuple[bool, str]] = []
        self._epoch = 0
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start(self, progress: StartProgress) -> None:
        """Brings everything up; ClusterError with host and rank where something cannot be."""
        work = asyncio.ensure_future(self._start(progress))
        try:
            waited: set[asyncio.Future[Any]] = {work, self.failed}
            done, _ = await asyncio.wait(waited, timeout=self._timeouts.start_s, return_when=asyncio.FIRST_COMPLETED)
            if self.failed in done or (work in done and work.exception() is not None):
                # A rank's own end explains more than what its peers, or this call, saw of it.
                await self._settle()
                raise ClusterError(await self._cause(work))
            if work not in done:
                raise ClusterError(self._not_ready())
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def stop(self) -> None:
        """Ends streams, leases and local launchers, and with them every rank; idempotent."""
        self.failed.cancel()
        await asyncio.gather(*(replica.close() for replica in self._replicas.values()))
        await asyncio.gather(*(launcher.close() for launcher in self._launchers.values()))
        await asyncio.gather(*(launcher.stop() for launcher in self._local))

    @property
    def launcher_pids(self) -> tuple[int, ...]:
        """The processes of the local launchers."""
        return tuple(launcher.pid for launcher in self._local)

    async def _start(self, progress: StartProgress) -> None:
        await self._start_launchers(progress)
        plans = self._topology.replicas
        progress.begin("groups", parts=sum(plan.shape.world_size for plan in plans))
        progress.begin("weights", parts=sum(plan.shape.world_size for plan in plans))
        progress.begin("ranks", parts=sum(plan.shape.world_size for plan in plans))
        self._epoch += 1
        await _all(self._assign(plan, progress=progress) for plan in plans)
        for replica in self._replicas.values():
            replica.attach(on_events=self._dispatcher.on_events, on_gone=partial(self._on_stream_gone, replica.plan))
        self._dispatcher.set_replicas(list(self._replicas.values()))
        await self._introduce_peers()
        await self._warm_up(progress)
        self._dispatcher.open()

    async def _warm_up(self, progress: StartProgress) -> None:
        """A real token through each replica, then a hand-off between each pair of them that may meet."""
        replicas = list(self._replicas.values())
        sources, targets = _of(replicas, "prefill"), _of(replicas, "decode")
        progress.begin("warm-up", parts=len(replicas) + len(sources) * len(targets))
        await _all(self._probe(replica, progress=progress) for replica in replicas)
        for pairs in rounds(sources, targets):
            await _all(self._probe(source, target=target, progress=progress) for source, target in pairs)

    async def _probe(
        self, replica: ReplicaClient, *, target: ReplicaClient | None = None, progress: StartProgress
    ) -> None:
        self._waiting_for[replica.name, 0] = f"hand-off to {target.name}" if target else "warm-up"
        await self._dispatcher.probe(replica, target=target)
        del self._waiting_for[replica.name, 0]
        progress.advance("warm-up", (replica.name, target.name if target else ""))

    async def _start_launchers(self, progress: StartProgress) -> None:
        hosts = self._topology.hosts
        progress.begin("launchers", parts=len(hosts))
        addresses = await _all(self._address(host.name, host.address) for host in hosts)
        for host, address in zip(hosts, addresses, strict=True):
            self._launchers[host.name] = LauncherClient(host, address=address, router_id=self._router_id)
        hellos = await _all(self._hello(launcher, progress=progress) for launcher in self._launchers.values())
        _compare_hellos(list(self._launchers), hellos, fingerprint=self._fingerprint)
        self._cores = self._deal_cores(hellos)
        await _all(
            launcher.watch(
                heartbeat_timeout_s=self._timeouts.heartbeat_s,
                on_lost=partial(self._on_lost, name),
                on_gone=partial(self._on_gone, name),
            )
            for name, launcher in self._launchers.items()
        )

    async def _address(self, name: str, address: str) -> str:
        if address != LOCAL:
            return address
        launcher = await LocalLauncher.start(host=name, arguments=self._launcher_arguments)
        self._local.append(launcher)
        return launcher.address

    async def _hello(self, launcher: LauncherClient, *, progress: StartProgress) -> control_pb2.HelloResponse:
        response = await launcher.hello(self._topology.model)
        progress.advance("launchers", launcher.host.name)
        return response

    def _deal_cores(self, hellos: Sequence[control_pb2.HelloResponse]) -> Mapping[RankKey, RankCores]:
        """ClusterError where a pool's threads are more than a host has cores."""
        machines = {name: machine_from_wire(hello.machine) for name, hello in zip(self._launchers, hellos, strict=True)}
        try:
            dealt = plan_cores(self._topology, machines=machines)
        except ValueError as error:
            raise ClusterError(str(error)) from None
        for part in dealt:
            logger.info(
                "cores dealt: host=%s cores=%d nodes=%d pool=%s ranks=%d threads=%d",
                *(part.host, part.machine.num_cores, len(part.machine.nodes)),
                *(part.pool, len(part.cores), part.num_threads),
            )
        return cores_by_rank(dealt)

    async def _assign(self, plan: ReplicaPlan, *, progress: StartProgress) -> None:
        leader = self._launchers[plan.hosts[0]]
        replica = ReplicaClient(plan, epoch=self._epoch, launcher=leader)
        self._waiting_for |= {(plan.name, rank): "start" for rank in range(plan.shape.world_size)}
        secret, cores = secrets.randbits(64), cores_of(self._cores, plan)

        def on_event(event: control_pb2.AssignEvent) -> None:
            self._on_assign_event(replica, event, progress=progress)

        await _all(
            self._launchers[name].assign(
                assign_request(
                    plan,
                    host=self._launchers[name].host,
                    addresses=(self._launchers[name].ip, leader.ip),
                    rendezvous_port=leader.ports[plan.placements[0].device],
                    model=self._topology.model,
                    router_id=self._router_id,
                    epoch=self._epoch,
                    secret=secret,
                    start_timeout_s=self._timeouts.start_s,
                    cores=cores,
                ),
                on_event=on_event,
            )
            for name in plan.hosts
        )
        self._replicas[plan.name] = replica

    def _on_assign_event(
        self, replica: ReplicaClient, event: control_pb2.AssignEvent, *, progress: StartProgress
    ) -> None:
        if event.WhichOneof("event") == "progress":
            part = (replica.name, event.progress.global_rank)
            self._waiting_for[part] = event.progress.phase
            progress.advance(event.progress.phase, part, event.progress.fraction)
            return
        part = (replica.name, event.ready.global_rank)
        del self._waiting_for[part]
        for phase in ("groups", "weights", "ranks"):
            progress.advance(phase, part)
        logger.info("rank ready: replica=%s rank=%d seconds=%.2f", *part, event.ready.seconds)

    async def _introduce_peers(self) -> None:
        replicas = list(self._replicas.values())
        sources, targets = _of(replicas, "prefill"), _of(replicas, "decode")
        await _all(self._meet_all(sources, target) for target in targets)

    async def _meet_all(self, sources: Sequence[ReplicaClient], target: ReplicaClient) -> None:
        for source in sources:
            self._waiting_for[target.name, 0] = f"connection from {source.name}"
            await meet(source, target)
            del self._waiting_for[target.name, 0]

    def _on_lost(self, host: str, lost: control_pb2.RankLost) -> None:
        self._fail(f"host {host}, rank {lost.global_rank} of {lost.replica}: {lost.reason}", cause=lost.cause)

    def _on_stream_gone(self, plan: ReplicaPlan, reason: str) -> None:
        # A rank or launcher that ended says why itself: this is the cause only where nothing else is.
        self._fail(f"host {plan.hosts[0]}, {plan.name}: {reason}", cause=False)

    def _on_gone(self, host: str, reason: str) -> None:
        self._fail(f"host {host}: {reason}", cause=True)

    def _fail(self, message: str, *, cause: bool) -> None:
        logger.error("%s", message)
        self._failures.append((cause, message))
        if len(self._failures) == 1:
            asyncio.ensure_future(self._tell_failure())  # noqa: RUF006 - ends by itself within a second

    async def _tell_failure(self) -> None:
        await self._settle()
        if not self.failed.done():
            self.failed.set_result(self._first_cause() or self._failures[0][1])

    async def _settle(self) -> None:
        """Waits until a cause is known, or long enough."""
        deadline = asyncio.get_running_loop().time() + _CAUSE_GRACE_S
        while self._first_cause() is None and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)

    def _first_cause(self) -> str | None:
        return next((message for cause, message in self._failures if cause), None)

    async def _cause(self, work: "asyncio.Future[None]") -> str:
        if self._failures:
            return self._first_cause() or self._failures[0][1]
        error = work.exception()
        if error is not None and not isinstance(error, ClusterError):
            raise error
        return str(error)

    def _not_ready(self) -> str:
        (replica, rank), phase = next(iter(self._waiting_for.items()), (("launchers", 0), "start"))
        plan = next((plan for plan in self._topology.replicas if plan.name == replica), None)
        where = f"host {plan.placements[rank].host}, rank {rank} of {replica}" if plan else "a launcher"
        waited = f"is not ready after {self._timeouts.start_s:g} s (phase {phase})"
        return f"{where} {waited}: raise timeouts.start_s, or look at its host"


def _of(replicas: Iterable[ReplicaClient], pool: str) -> list[ReplicaClient]:
    return [replica for replica in replicas if replica.plan.pool == pool]


def rounds(sources: Sequence[T], targets: Sequence[T]) -> Iterator[list[tuple[T, T]]]:
    """Every pair of a source and a target, in rounds in which each has one other at most."""
    size = max(len(sources), len(targets))
    for shift in range(size if sources and targets else 0):
        yield [
            (source, targets[(index + shift) % size])
            for index, source in enumerate(sources)
            if (index + shift) % size < len(targets)
        ]


def _compare_hellos(names: Sequence[str], hellos: Sequence[control_pb2.HelloResponse], *, fingerprint: str) -> None:
    """ClusterError where hosts differ in what must be the same everywhere."""
    for name, hello in zip(names, hellos, strict=True):
        if hello.checkpoint_fingerprint != fingerprint:
            raise ClusterError(
                f"host {name} has another checkpoint: fingerprint {hello.checkpoint_fingerprint}, the router's is "
                f"{fingerprint}; copy the same model to both"
            )
        first = hellos[0]
        for what, own, other in (
            ("muster", hello.muster_version, first.muster_version),
            ("torch", hello.torch_version, first.torch_version),
        ):
            if own != other:
                raise ClusterError(
                    f"host {name} runs {what} {own}, host {names[0]} {other}: install one version on both"
                )


async def _all(work: Iterable[Coroutine[object, object, T]]) -> list[T]:
    """Runs all at once; the first error ends the others and is raised as it is."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
