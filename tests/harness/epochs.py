"""A launcher with real ranks, driven by its own protocol: epochs of one unified replica in its living processes."""

import queue
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grpc

from parallel.cores import RankCores
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape
from parallel.topology import HostSpec, PoolSpec, plan_topology
from parallel.wire import assign_request
from proto import control_pb2, control_pb2_grpc
from tests.harness.checkpoints import Oracle
from tests.harness.router_process import Command, worker_command

ROUTER = 9
PROMPT = tuple(range(5, 45))


class Replica:
    """The stream of one epoch."""

    def __init__(self, stub: Any, *, epoch: int) -> None:
        self._outbox: queue.SimpleQueue[control_pb2.ToReplica | None] = queue.SimpleQueue()
        self._found: list[int] = []
        self.send(control_pb2.ToReplica(replica="unified/0", epoch=epoch))
        self._events = stub.Attach(iter(self._outbox.get, None))

    def send(self, message: control_pb2.ToReplica) -> None:
        """Sends to the leader."""
        self._outbox.put(message)

    def submit(self, request_id: int, *, count: int) -> None:
        """Starts a greedy generation."""
        sampling = control_pb2.Sampling(top_p=1)
        submit = control_pb2.Submit(request_id=request_id, prompt_ids=PROMPT, max_new_tokens=count, sampling=sampling)
        self.send(control_pb2.ToReplica(submit=submit))

    def tokens(self, request_id: int) -> list[int]:
        """Reads until the generation ends; no event is of another. All its tokens."""
        for message in self._events:
            for event in message.events:
                assert set(event.tokens.request_ids) <= {request_id}
                self._found.extend(event.tokens.token_ids)
                if event.ended.request_id == request_id:
                    found, self._found = self._found, []
                    return found
        raise AssertionError("the stream ended")

    def wait_for_tokens(self, count: int) -> None:
        """Reads until there are `count` of a generation; they are among its `tokens`."""
        while len(self._found) < count:
            for event in next(self._events).events:
                assert event.WhichOneof("event") != "ended"
                self._found.extend(event.tokens.token_ids)

    def close(self) -> None:
        """Ends the stream."""
        self._outbox.put(None)
        self._events.cancel()


def assign(
    stub: Any,
    ports: list[int],
    oracle: Oracle,
    *,
    epoch: int,
    dp: int,
    cores: Mapping[int, RankCores] | None = None,
    kernels: str = "auto",
) -> None:
    """Brings the replica, of `dp` ranks, to `epoch`."""
    shape = ReplicaShape(attention=AttentionSizes(dp=dp), experts=ExpertSizes(ep=dp))
    host = HostSpec(name="here", address="local", device="cpu", devices=tuple(range(4)))
    pool = PoolSpec(name="unified", replicas=1, shape=shape, engine=EngineSettings(kv_tokens=2048, kernels=kernels))
    topology = plan_topology(model=str(oracle.folder), hosts=[host], pools=[pool])
    request = assign_request(
        topology.replicas[0],
        host=host,
        addresses=("127.0.0.1", "127.0.0.1"),
        rendezvous_port=ports[0],
        model=str(oracle.folder),
        router_id=ROUTER,
        epoch=epoch,
        secret=epoch,
        start_timeout_s=60,
        cores=cores,
    )
    events = list(stub.Assign(request, timeout=60))
    assert sum(event.WhichOneof("event") == "ready" for event in events) == dp


@contextmanager
def running_launcher(oracle: Oracle) -> Iterator[tuple[Any, list[int], Command]]:
    """A launcher with real ranks, whose lease is held: its stub, its ports, its command."""
    with worker_command() as (command, address), grpc.insecure_channel(address) as channel:
        stub = control_pb2_grpc.LauncherStub(channel)
        hello = control_pb2.HelloRequest(
            router_id=ROUTER, model=str(oracle.folder), device_kind="cpu", devices=range(4)
        )
        ports = [device.rendezvous_port for device in stub.Hello(hello, timeout=20).devices]
        watch = stub.Watch(control_pb2.WatchRequest(router_id=ROUTER, heartbeat_timeout_s=20))
        next(watch)
        yield stub, ports, command
        watch.cancel()
