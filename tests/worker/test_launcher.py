"""A launcher by its own protocol, with mocked ranks: leases, epochs, and assignments that contradict themselves."""

import asyncio
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from parallel.checkpoint.fingerprint import fingerprint
from parallel.process.cores import this_machine
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape
from parallel.topology import HostSpec, PoolSpec, Topology, plan_topology
from parallel.wire import assign_request, machine_from_wire
from proto import control_pb2, control_pb2_grpc
from tests.harness.checkpoints import Oracle
from tests.harness.router_process import worker_command
from tests.tiny_models import llama, write_checkpoint
from worker.launcher.mock_rank import MockRank
from worker.launcher.rank_handle import RankCallbacks

ROUTER = 7


@pytest.fixture
def launcher() -> Iterator[Any]:
    """The stub of a mocked launcher whose lease this test holds."""
    with worker_command("--mock") as (_, address), grpc.insecure_channel(address) as channel:
        stub = control_pb2_grpc.LauncherStub(channel)
        watch = stub.Watch(control_pb2.WatchRequest(router_id=ROUTER, heartbeat_timeout_s=10))
        next(watch)
        yield stub
        watch.cancel()


def plan() -> Topology:
    shape = ReplicaShape(attention=AttentionSizes(dp=2), experts=ExpertSizes(ep=2))
    pool = PoolSpec(name="unified", replicas=1, shape=shape, engine=EngineSettings(kv_tokens=1024))
    host = HostSpec(name="here", address="local", device="cpu", devices=(0, 1))
    return plan_topology(model="", hosts=[host], pools=[pool])


def request(oracle: Oracle, *, epoch: int = 1, router_id: int = ROUTER) -> control_pb2.AssignRequest:
    topology = plan()
    return assign_request(
        topology.replicas[0],
        host=topology.hosts[0],
        addresses=("127.0.0.1", "127.0.0.1"),
        rendezvous_port=1,
        model=str(oracle.folder),
        router_id=router_id,
        epoch=epoch,
        secret=1,
        start_timeout_s=10,
    )


def refusal(call: Any) -> str:
    """The message of a FAILED_PRECONDITION."""
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    return str(caught.value.details())


def test_a_complete_assignment_is_taken_and_a_higher_epoch_replaces_it(launcher: Any, mixtral: Oracle) -> None:
    for epoch in (1, 2, 5):
        events = list(launcher.Assign(request(mixtral, epoch=epoch), timeout=10))
        assert sorted(event.ready.global_rank for event in events) == [0, 1]


def test_a_stale_epoch_is_refused_with_both_numbers(launcher: Any, mixtral: Oracle) -> None:
    list(launcher.Assign(request(mixtral, epoch=4), timeout=10))
    for epoch in (3, 4):
        assert f"epoch {epoch} of unified/0 is stale: this host has epoch 4" in refusal(
            launcher.Assign(request(mixtral, epoch=epoch), timeout=10)
        )
    stale = control_pb2.ToReplica(replica="unified/0", epoch=3)
    assert "epoch 3 of unified/0 is not assigned here: this host has epoch 4" in refusal(
        launcher.Attach(iter([stale]), timeout=10)
    )


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("attn_dp_rank", 0, "attn_dp_rank 0, but its sizes and global rank give 1"),
        ("attn_cp_rank", 1, "attn_cp_rank 1, but its sizes and global rank give 0"),
        ("moe_ep_rank", 0, "moe_ep_rank 0, but its sizes and global rank give 1"),
        ("moe_dp_rank", 3, "moe_dp_rank 3, but its sizes and global rank give 0"),
        ("pp_rank", 2, "pp_rank 2, but its sizes and global rank give 0"),
    ],
)
def test_coordinates_that_differ_from_what_a_rank_derives_name_both_values(
    launcher: Any, mixtral: Oracle, field: str, value: int, words: str
) -> None:
    wrong = request(mixtral)
    setattr(wrong.ranks[1], field, value)
    assert words in refusal(launcher.Assign(wrong, timeout=10))


def test_groups_that_differ_are_refused(launcher: Any, mixtral: Oracle) -> None:
    wrong = request(mixtral)
    del wrong.ranks[0].groups[0]
    assert "was assigned the groups ()" in refusal(launcher.Assign(wrong, timeout=10))


def test_sizes_with_a_remainder_are_refused(launcher: Any, mixtral: Oracle) -> None:
    wrong = request(mixtral)
    wrong.sizes.experts.ep = 3
    assert "= 3 ranks" in refusal(launcher.Assign(wrong, timeout=10))


def attached(launcher: Any, *, epoch: int) -> tuple[Any, "queue.SimpleQueue[control_pb2.ToReplica | None]"]:
    """The stream of the replica's leader, and what goes to it."""
    outbox: queue.SimpleQueue[control_pb2.ToReplica | None] = queue.SimpleQueue()
    outbox.put(control_pb2.ToReplica(replica="unified/0", epoch=epoch))
    return launcher.Attach(iter(outbox.get, None), timeout=20), outbox


def submit(request_id: int) -> control_pb2.ToReplica:
    sampling = control_pb2.Sampling(top_p=1)
    return control_pb2.ToReplica(
        submit=control_pb2.Submit(request_id=request_id, prompt_ids=[1], max_new_tokens=1, sampling=sampling)
    )


def test_a_reader_that_has_gone_makes_room_for_the_next_one(launcher: Any, mixtral: Oracle) -> None:
    list(launcher.Assign(request(mixtral), timeout=10))
    for request_id in (1, 2, 3):
        stream, outbox = attached(launcher, epoch=1)
        outbox.put(submit(request_id))
        said = (event for message in stream for event in message.events)
        assert next(event for event in said if event.ended.request_id == request_id)
        second, _ = attached(launcher, epoch=1)
        assert "is attached already" in refusal(second)
        stream.cancel()
        outbox.put(None)


def test_what_a_mock_says_of_an_epoch_carries_that_epoch_whatever_was_assigned_since(mixtral: Oracle) -> None:
    said: list[control_pb2.FromRank] = []

    async def work() -> None:
        rank = MockRank(RankCallbacks(message=said.append, ended=lambda _: None), step_s=0.05)
        rank.send(control_pb2.ToRank(assign=control_pb2.AssignRank(assignment=request(mixtral, epoch=1))))
        rank.send(control_pb2.ToRank(replica=submit(1)))
        rank.send(control_pb2.ToRank(assign=control_pb2.AssignRank(assignment=request(mixtral, epoch=2))))
        await asyncio.sleep(0.2)

    asyncio.run(work())
    epochs = {message.of_epoch for message in said if message.WhichOneof("message") == "replica"}
    assert epochs == {1}


@pytest.mark.parametrize(
    ("flags", "inherited", "threads"),
    [((), None, None), ((), "7", 7), (("--threads", "3"), "7", 3)],  # the operator's word for this program stands above
)
def test_a_launcher_tells_what_it_has_and_what_its_operator_has_said(
    flags: tuple[str, ...], inherited: str | None, threads: int | None, mixtral: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if inherited is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", inherited)
    hello = control_pb2.HelloRequest(router_id=ROUTER, model=str(mixtral.folder), device_kind="cpu", devices=[0])
    with worker_command("--mock", *flags) as (_, address), grpc.insecure_channel(address) as channel:
        said = control_pb2_grpc.LauncherStub(channel).Hello(hello, timeout=20)
    assert machine_from_wire(said.machine) == this_machine(threads_per_rank=threads)


def test_a_model_that_this_host_lacks_is_told_in_a_sentence(launcher: Any) -> None:
    hello = control_pb2.HelloRequest(router_id=ROUTER, model="/models/none", device_kind="cpu", devices=[0])
    with pytest.raises(grpc.RpcError) as caught:
        launcher.Hello(hello, timeout=10)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert caught.value.details() == (
        "there is no folder /models/none on this host: every host has the model at the same path"
    )


def test_a_second_router_is_refused_while_the_lease_is_held(launcher: Any, mixtral: Oracle) -> None:
    other = control_pb2.WatchRequest(router_id=8, heartbeat_timeout_s=10)
    assert f"serves router {ROUTER:016x}" in refusal(launcher.Watch(other, timeout=10))
    assert "does not hold this launcher's lease" in refusal(launcher.Assign(request(mixtral, router_id=8), timeout=10))


def test_a_checkpoint_that_nobody_reads_whole_is_refused_before_any_rank_starts(launcher: Any, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, llama(), **{"lm_head.weight_scale": (1,), "model.norm.weight": None})
    hello = control_pb2.HelloRequest(router_id=ROUTER, model=str(folder), device_kind="cpu", devices=[0])
    with pytest.raises(grpc.RpcError) as caught:
        launcher.Hello(hello, timeout=10)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    told = str(caught.value.details())
    assert "lacks 1 tensor that its config.json calls for: model.norm.weight" in told
    assert "holds 1 tensor that llama does not read: lm_head.weight_scale" in told
    write_checkpoint(tmp_path, llama())
    assert launcher.Hello(hello, timeout=10).checkpoint_fingerprint == fingerprint(tmp_path)
