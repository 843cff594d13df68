"""A higher epoch in living processes: other sizes and groups, the same tokens, and nothing heard of the old one."""

import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape
from parallel.topology import HostSpec, PoolSpec, plan_topology
from parallel.wire import assign_request
from proto import control_pb2, control_pb2_grpc
from tests.harness.checkpoints import Oracle
from tests.harness.process_usage import Usage, usage
from tests.harness.router_process import rank_pids, worker_command

ROUTER = 9
NUM_TOKENS = 12
PROMPT = tuple(range(5, 45))


class Replica:
    """The stream of one epoch."""

    def __init__(self, stub: Any, *, epoch: int) -> None:
        self._outbox: queue.SimpleQueue[control_pb2.ToReplica | None] = queue.SimpleQueue()
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
        """Reads until the generation ends; no event is of another."""
        found: list[int] = []
        for message in self._events:
            for event in message.events:
                assert set(event.tokens.request_ids) <= {request_id}
                found.extend(event.tokens.token_ids)
                if event.ended.request_id == request_id:
                    return found
        raise AssertionError("the stream ended")

    def close(self) -> None:
        """Ends the stream."""
        self._outbox.put(None)
        self._events.cancel()


def assign(stub: Any, ports: list[int], oracle: Oracle, *, epoch: int, dp: int) -> None:
    shape = ReplicaShape(attention=AttentionSizes(dp=dp), experts=ExpertSizes(ep=dp))
    host = HostSpec(name="here", address="local", device="cpu", devices=tuple(range(4)))
    pool = PoolSpec(name="unified", replicas=1, shape=shape, engine=EngineSettings(kv_tokens=2048))
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
    )
    events = list(stub.Assign(request, timeout=60))
    assert sum(event.WhichOneof("event") == "ready" for event in events) == dp


@pytest.fixture
def launcher(mixtral: Oracle) -> Iterator[tuple[Any, list[int], int]]:
    """A launcher with real ranks: its stub, its ports, its process."""
    with worker_command() as (command, address), grpc.insecure_channel(address) as channel:
        stub = control_pb2_grpc.LauncherStub(channel)
        hello = control_pb2.HelloRequest(
            router_id=ROUTER, model=str(mixtral.folder), device_kind="cpu", devices=range(4)
        )
        ports = [device.rendezvous_port for device in stub.Hello(hello, timeout=20).devices]
        watch = stub.Watch(control_pb2.WatchRequest(router_id=ROUTER, heartbeat_timeout_s=20))
        next(watch)
        yield stub, ports, command.pid
        watch.cancel()


@pytest.mark.timeout(120)
def test_a_higher_epoch_rebuilds_a_replica_in_its_living_processes(
    launcher: tuple[Any, list[int], int], mixtral: Oracle
) -> None:
    stub, ports, pid = launcher
    wanted = list(mixtral.answer(PROMPT, 64).token_ids[:NUM_TOKENS])
    processes: list[int] = []
    for epoch, dp in enumerate((2, 4, 1, 2), 1):
        assign(stub, ports, mixtral, epoch=epoch, dp=dp)
        replica = Replica(stub, epoch=epoch)
        replica.submit(epoch, count=NUM_TOKENS)
        assert replica.tokens(epoch) == wanted
        # This one is under way when the next epoch comes; no token of it may be heard there.
        replica.submit(100 + epoch, count=1500)
        assert rank_pids(pid)[: len(processes)] == processes
        processes = rank_pids(pid)
        # The groups of this epoch, ep of all ranks, and none of an earlier one.
        assert [num_group_memories(process) for process in processes] == [int(rank < dp > 1) for rank in range(4)][
            : len(processes)
        ]
        replica.close()
    assert len(processes) == 4


def num_group_memories(pid: int) -> int:
    """Mapped by that process."""
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:muster-group")


@pytest.mark.timeout(120)
def test_twenty_epochs_take_no_more_than_the_first_ones(launcher: tuple[Any, list[int], int], mixtral: Oracle) -> None:
    stub, ports, pid = launcher
    early: list[Usage] = []
    for epoch in range(1, 21):
        assign(stub, ports, mixtral, epoch=epoch, dp=2)
        replica = Replica(stub, epoch=epoch)
        replica.submit(epoch, count=2)
        replica.tokens(epoch)
        replica.close()
        if epoch == 5:
            early = [usage(rank) for rank in rank_pids(pid)]
    late = [usage(rank) for rank in rank_pids(pid)]
    for before, after in zip(early, late, strict=True):
        assert after.resident_bytes < 1.05 * before.resident_bytes
        assert after.threads <= before.threads
        assert after.files <= before.files


@pytest.mark.timeout(60)
def test_a_second_reader_of_a_replicas_stream_is_refused(launcher: tuple[Any, list[int], int], mixtral: Oracle) -> None:
    stub, ports, _ = launcher
    assign(stub, ports, mixtral, epoch=1, dp=1)
    replica = Replica(stub, epoch=1)
    replica.submit(1, count=2)
    replica.tokens(1)
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Attach(iter([control_pb2.ToReplica(replica="unified/0", epoch=1)]), timeout=10))
    assert "is attached already" in str(caught.value.details())
    replica.close()
