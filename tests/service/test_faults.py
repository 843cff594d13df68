"""What happens when processes die, hang or are told to stop: a clear end for every client, and nothing left running."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from proto import inference_pb2, inference_pb2_grpc
from tests.harness.checkpoints import Oracle
from tests.harness.router_process import (
    Command,
    assert_all_gone,
    descendants,
    rank_pids,
    router_command,
    worker_command,
)
from tests.harness.running_router import topology

POOLS = {"prefill": {"attention": {"cp": 2}}, "decode": {"attention": {"dp": 2}}}
ENGINE = {"kv_tokens": 4096}


def content(oracle: Oracle, **more: Any) -> dict[str, Any]:
    return topology(oracle.folder, pools=POOLS, devices=4, engine=ENGINE, **more)


def long_stream(address: str) -> Any:
    """A generation that is under way: its first token has been read."""
    channel = grpc.insecure_channel(address)
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[5, 6, 7]),
        sampling=inference_pb2.SamplingParams(max_new_tokens=1900, temperature=0, ignore_eos=True),
    )
    stream = inference_pb2_grpc.InferenceStub(channel).Generate(request)
    next(stream)
    return stream


def end_of(stream: Any) -> grpc.RpcError:
    """The error that a stream ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        for _ in stream:
            pass
    return caught.value


def assert_ends_with(command: Command, stream: Any, *names: str) -> None:
    """The client's status and the router's last words name what was lost, and the router exits 1."""
    error = end_of(stream)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert command.wait() == 1
    for name in names:
        assert name in str(error.details())
        assert name in command.output


@pytest.mark.timeout(90)
@pytest.mark.parametrize("index", [1, 2])
def test_a_killed_rank_ends_every_stream_with_its_name_and_the_router_with_1(
    index: int, mixtral: Oracle, tmp_path: Path
) -> None:
    names = {1: "rank 1 of prefill/0", 2: "rank 0 of decode/0"}
    with router_command(content(mixtral), tmp_path) as (command, address):
        stream = long_stream(address)
        os.kill(rank_pids(command.pid)[index], signal.SIGKILL)
        assert_ends_with(command, stream, "host here", names[index], "SIGKILL")


@pytest.mark.timeout(90)
def test_a_stopped_rank_is_found_like_a_dead_one(mixtral: Oracle, tmp_path: Path) -> None:
    with router_command(content(mixtral, timeouts={"heartbeat_s": 2}), tmp_path) as (command, address):
        stream = long_stream(address)
        os.kill(rank_pids(command.pid)[3], signal.SIGSTOP)
        assert_ends_with(command, stream, "host here", "rank 1 of decode/0", "has not answered for")


@pytest.mark.timeout(90)
def test_a_step_that_does_not_end_in_its_time_names_the_ranks_that_are_silent(mixtral: Oracle, tmp_path: Path) -> None:
    slow = content(mixtral, timeouts={"heartbeat_s": 80})
    slow["engine"] = {**ENGINE, "step_timeout_s": 3}
    with router_command(slow, tmp_path) as (command, address):
        stream = long_stream(address)
        os.kill(rank_pids(command.pid)[3], signal.SIGSTOP)
        assert_ends_with(command, stream, "host here", "of decode/0: StepTimeoutError: ranks 1 did not answer step")
        assert "within 3 s; ranks 0 wait for them in a collective" in command.output


@pytest.mark.timeout(90)
def test_a_killed_launcher_ends_its_ranks_and_the_router(mixtral: Oracle, tmp_path: Path) -> None:
    with router_command(content(mixtral), tmp_path) as (command, address):
        stream = long_stream(address)
        (launcher,) = [pid for pid in descendants(command.pid) if rank_pids(pid)]
        os.kill(launcher, signal.SIGKILL)
        assert_ends_with(command, stream, "host here", "its launcher")


@pytest.mark.timeout(90)
def test_a_killed_router_leaves_no_local_process_and_its_clients_see_unavailable(
    mixtral: Oracle, tmp_path: Path
) -> None:
    with router_command(content(mixtral), tmp_path) as (command, address):
        family = descendants(command.pid)
        stream = long_stream(address)
        command.send_signal(signal.SIGKILL)
        assert end_of(stream).code() is grpc.StatusCode.UNAVAILABLE
        assert_all_gone(family)


@pytest.mark.timeout(90)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_router_that_is_told_to_stop_ends_everything_within_seconds(
    number: signal.Signals, llama: Oracle, tmp_path: Path
) -> None:
    with router_command(content(llama), tmp_path) as (command, address):
        family = descendants(command.pid)
        stream = long_stream(address)
        started = time.monotonic()
        command.send_signal(number)
        assert command.wait() == 0
        assert time.monotonic() - started < 8
        assert end_of(stream).code() is grpc.StatusCode.UNAVAILABLE
        assert_all_gone(family, timeout_s=1)


@pytest.mark.timeout(120)
def test_a_remote_launcher_outlives_its_router_and_serves_the_next_one(llama: Oracle, tmp_path: Path) -> None:
    with worker_command() as (worker, host):
        hosts = [{"name": "far", "address": host, "devices": 4}]
        with router_command({**content(llama), "hosts": hosts}, tmp_path) as (command, _):
            ranks = rank_pids(worker.pid)
            assert len(ranks) == 4
            command.send_signal(signal.SIGKILL)
            assert_all_gone(ranks)
        with router_command({**content(llama), "hosts": hosts}, tmp_path) as (_, address):
            long_stream(address).cancel()


def starting(topology_: dict[str, Any], folder: Path) -> Command:
    """A router that is on its way up."""
    path = folder / "topo.yaml"
    path.write_text(yaml.safe_dump(topology_))
    return Command(["router", "--config", str(path)])


@pytest.mark.timeout(60)
def test_a_launcher_that_cannot_be_reached_is_named(llama: Oracle, tmp_path: Path) -> None:
    hosts = [{"name": "far", "address": "127.0.0.1:1", "devices": 4}]
    command = starting({**content(llama), "hosts": hosts}, tmp_path)
    assert command.wait(timeout_s=40) == 1
    assert "host far: no launcher answers at 127.0.0.1:1" in command.output


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("number", "timeouts", "words"),
    [
        (signal.SIGKILL, {}, "host here, rank 1 of prefill/0: its process"),
        (signal.SIGSTOP, {"start_s": 8}, "is not ready after 8 s (phase"),
    ],
)
def test_a_rank_that_dies_or_hangs_while_it_starts_is_named_and_nothing_is_left(
    number: signal.Signals, timeouts: dict[str, Any], words: str, llama: Oracle, tmp_path: Path
) -> None:
    command = starting(content(llama, timeouts=timeouts), tmp_path)
    while len(rank_pids(command.pid)) < 4:
        time.sleep(0.01)
    family = descendants(command.pid)
    os.kill(rank_pids(command.pid)[1], number)
    assert command.wait(timeout_s=30) == 1
    assert words in command.output
    assert_all_gone(family, timeout_s=2)
