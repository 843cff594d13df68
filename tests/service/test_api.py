"""The Inference service over real gRPC, with mocked ranks behind it: what clients may send and what they get."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from proto import inference_pb2, inference_pb2_grpc
from tests.harness.checkpoints import VOCAB_SIZE, Oracle
from tests.harness.running_router import RunningRouter, running_router, topology
from worker.launcher.mock_rank import mock_token

POOLS = {"prefill": {"attention": {"cp": 2}}, "decode": {"attention": {"dp": 2}}}
ENGINE = {"kv_tokens": 1024, "max_sequences": 8}
SLOW = ("--mock", "--mock-step-s", "0.02")


def mocked(oracle: Oracle, folder: Path, *, arguments: tuple[str, ...] = ("--mock",), **more: Any) -> Any:
    content = topology(oracle.folder, pools=POOLS, devices=4, engine=ENGINE, **more)
    return running_router(content, folder, launcher_arguments=arguments)


@pytest.fixture(scope="module")
def slow(llama: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRouter]:
    """A router whose mocked steps take 20 ms, and four waiting requests at most."""
    folder = tmp_path_factory.mktemp("slow")
    with mocked(llama, folder, arguments=SLOW, limits={"max_waiting": 4, "max_message_bytes": 65536}) as router:
        yield router


@pytest.fixture
def stub(slow: RunningRouter) -> Iterator[Any]:
    with grpc.insecure_channel(slow.address) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)
    slow.wait_until_empty()


def prompt(*ids: int, **sampling: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=ids), sampling=inference_pb2.SamplingParams(**sampling)
    )


def tokens_of(responses: list[inference_pb2.GenerateResponse]) -> list[int]:
    return [token for response in responses for token in response.delta.token_ids]


def expected(ids: tuple[int, ...], count: int) -> list[int]:
    tokens = list(ids)
    for _ in range(count):
        tokens.append(mock_token(tokens[-1], position=len(tokens), vocab_size=VOCAB_SIZE))
    return tokens[len(ids) :]


def test_a_stream_has_every_token_once_and_in_order_and_ends_with_usage_and_timings(stub: Any) -> None:
    responses = list(stub.Generate(prompt(3, 4, 5, max_new_tokens=20)))
    assert tokens_of(responses) == expected((3, 4, 5), 20)
    complete = responses[-1].complete
    assert complete.finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert (complete.usage.prompt_tokens, complete.usage.generated_tokens) == (3, 20)
    timings = complete.timings
    assert 0 < timings.queue_s <= timings.first_token_s <= timings.total_s
    assert timings.handoff_s > 0
    assert len({response.request_id for response in responses}) == 1


def test_text_and_token_prompts_are_one_and_text_comes_back(stub: Any) -> None:
    request = inference_pb2.GenerateRequest(text="w3 w4 w6", sampling=inference_pb2.SamplingParams(max_new_tokens=5))
    responses = list(stub.Generate(request))
    assert tokens_of(responses) == expected((3, 4, 6), 5)
    text = "".join(response.delta.text for response in responses)
    assert text.split() == [f"w{token}" for token in expected((3, 4, 6), 5)]


def test_a_stop_string_ends_the_text_before_itself(stub: Any) -> None:
    third = expected((3, 4, 5), 3)[2]
    responses = list(stub.Generate(prompt(3, 4, 5, max_new_tokens=50, stop=[f" w{third}"])))
    text = "".join(response.delta.text for response in responses)
    assert text.split() == [f"w{token}" for token in expected((3, 4, 5), 2)]
    assert responses[-1].complete.finish_reason == inference_pb2.FINISH_REASON_STOP


def test_a_stop_token_ends_the_generation_and_is_its_last_token(stub: Any) -> None:
    tokens = expected((9,), 4)
    responses = list(stub.Generate(prompt(9, max_new_tokens=50, stop_token_ids=[tokens[3]])))
    assert tokens_of(responses) == tokens
    assert responses[-1].complete.finish_reason == inference_pb2.FINISH_REASON_STOP


def test_a_stop_at_the_first_token_gives_the_reservation_back(stub: Any) -> None:
    responses = list(stub.Generate(prompt(9, max_new_tokens=50, stop_token_ids=[expected((9,), 1)[0]])))
    assert tokens_of(responses) == expected((9,), 1)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (inference_pb2.GenerateRequest(), ["prompt", "text, token_ids and chat"]),
        (prompt(), ["token_ids", "empty"]),
        (inference_pb2.GenerateRequest(text=""), ["text", "empty"]),
        (prompt(*[1] * 2048), ["2048 tokens", "1 to 2047"]),
        (prompt(1, VOCAB_SIZE), ["token_ids.ids[1]", str(VOCAB_SIZE), f"0 to {VOCAB_SIZE - 1}"]),
        (prompt(1, temperature=-0.5), ["temperature", "-0.5", "0 (greedy) or more"]),
        (prompt(1, temperature=float("nan")), ["temperature", "nan"]),
        (prompt(1, top_p=0.0), ["top_p", "0.0", "above 0, at most 1"]),
        (prompt(1, top_p=1.5), ["top_p", "1.5"]),
        (prompt(1, top_k=-1), ["top_k", "-1"]),
        (prompt(1, min_p=2.0), ["min_p", "2.0"]),
        (prompt(1, max_new_tokens=0), ["max_new_tokens", "0", "1 or more"]),
        (prompt(1, stop=[""]), ["sampling.stop", "empty"]),
        (prompt(1, stop_token_ids=[VOCAB_SIZE]), ["stop_token_ids[0]", str(VOCAB_SIZE)]),
        (inference_pb2.GenerateRequest(chat=inference_pb2.Chat()), ["chat", "template"]),
        (prompt(*[1] * 2000, max_new_tokens=40), ["pages", "kv_tokens"]),
    ],
)
def test_what_a_client_gets_wrong_is_told_with_field_value_and_range(
    stub: Any, request_: inference_pb2.GenerateRequest, words: list[str]
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(request_))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    for word in words:
        assert word in str(caught.value.details())


def test_a_message_over_the_limit_is_refused(stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(inference_pb2.GenerateRequest(text="w1 " * 40000)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_cancelling_frees_everything_on_both_pools(slow: RunningRouter, stub: Any) -> None:
    for reads in (0, 1, 5):
        stream = stub.Generate(prompt(*range(1, 40), max_new_tokens=500))
        for _ in range(reads):
            next(stream)
        stream.cancel()
    slow.wait_until_empty()


def test_a_deadline_frees_everything(slow: RunningRouter, stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(prompt(1, 2, max_new_tokens=900), timeout=0.3))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    slow.wait_until_empty()


def test_abort_ends_a_stream_with_its_reason(stub: Any) -> None:
    request = prompt(1, 2, max_new_tokens=900)
    request.request_id = "mine"
    stream = stub.Generate(request)
    next(stream)
    assert stub.Abort(inference_pb2.AbortRequest(request_id="mine")).found
    assert list(stream)[-1].complete.finish_reason == inference_pb2.FINISH_REASON_ABORT
    assert not stub.Abort(inference_pb2.AbortRequest(request_id="mine")).found


def test_of_requests_that_come_at_once_with_one_id_one_runs(stub: Any) -> None:
    request = prompt(9, max_new_tokens=50)
    request.request_id = "same"
    calls = [stub.Generate(request) for _ in range(6)]
    refused = 0
    for call in calls:
        try:
            assert tokens_of(list(call)) == expected((9,), 50)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and "'same'" in str(error.details())
            refused += 1
    assert refused == 5


def test_requests_wait_for_room_in_decode_and_none_is_lost(slow: RunningRouter, stub: Any) -> None:
    # Each takes 40 of the 64 pages of a decode coordinate: two run, the others wait until those are gone.
    running = [stub.Generate(prompt(index, max_new_tokens=630)) for index in (1, 2)]
    for stream in running:
        next(stream)
    waiting = [stub.Generate(prompt(index, max_new_tokens=630)) for index in (3, 4, 5)]
    for stream in running:
        stream.cancel()
    for index, stream in zip((3, 4, 5), waiting, strict=True):
        assert tokens_of([next(stream)])[:1] == expected((index,), 1)
        stream.cancel()
    slow.wait_until_empty()


def test_too_many_waiting_requests_are_refused_with_a_retry_hint(slow: RunningRouter, stub: Any) -> None:
    streams = [stub.Generate(prompt(1, max_new_tokens=630)) for _ in range(12)]
    refused: list[Any] = []
    for stream in streams:
        try:
            next(stream)
        except grpc.RpcError as error:
            refused.append(error)
        stream.cancel()
    assert refused
    assert all(error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED for error in refused)
    status = rpc_status.from_call(refused[0])
    hint = error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(hint)
    assert hint.retry_delay.seconds > 0
    slow.wait_until_empty()


def test_health_reflection_model_and_topology_answer(slow: RunningRouter, llama: Oracle) -> None:
    with grpc.insecure_channel(slow.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        service = "muster.inference.v1.Inference"
        request = health_pb2.HealthCheckRequest(service=service)
        assert health.Check(request).status == health_pb2.HealthCheckResponse.SERVING
        assert service in ProtoReflectionDescriptorDatabase(channel).get_services()
        stub = inference_pb2_grpc.InferenceStub(channel)
        info = stub.GetModelInfo(inference_pb2.GetModelInfoRequest())
        # The model has 2048 positions, the pools hold fewer.
        assert (info.family, info.vocab_size, info.context_tokens) == ("llama", VOCAB_SIZE, 1024)
        topology = stub.GetTopology(inference_pb2.GetTopologyRequest())
        assert [(row.pool, row.attn_cp_rank) for row in topology.ranks[:2]] == [("prefill", 0), ("prefill", 1)]
        assert not topology.ranks[0].HasField("moe_ep_rank")


@pytest.mark.timeout(120)
def test_sixty_four_hosts_of_eight_ranks_start_and_serve_within_a_minute(mixtral: Oracle, tmp_path: Path) -> None:
    hosts = [{"name": f"host{index}", "address": "local", "devices": 8} for index in range(64)]
    pools = {
        "prefill": {"replicas": 32, "attention": {"cp": 8}},
        "decode": {"replicas": 32, "attention": {"dp": 8}},
    }
    content = {**topology(mixtral.folder, pools=pools, devices=1, engine=ENGINE), "hosts": hosts}
    started = time.monotonic()
    with running_router(content, tmp_path, launcher_arguments=("--mock",)) as router:
        assert time.monotonic() - started < 60
        with grpc.insecure_channel(router.address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            streams = [stub.Generate(prompt(index, max_new_tokens=30)) for index in range(1, 25)]
            for index, stream in enumerate(streams, 1):
                assert tokens_of(list(stream)) == expected((index,), 30)
        router.wait_until_empty()
