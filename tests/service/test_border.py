"""What enters is looked at once, at the border: tokens without an embedding, calls that end before they are known,
limits that requests do not name, and bytes that are no message.
"""

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import grpc
import pytest
from tokenizers import Tokenizer

from proto import inference_pb2, inference_pb2_grpc
from router.text import ModelText
from router.tokenising import LONG_BYTES
from tests.harness.checkpoints import VOCAB_SIZE, Oracle
from tests.harness.router_process import worker_command
from tests.harness.running_router import RunningRouter, running_router, topology

POOLS = {"prefill": {"attention": {"cp": 2}}, "decode": {}}
ENGINE = {"kv_tokens": 1024, "page_size": 16}
TEMPLATE = "{% for m in messages %}{% if m.role == 'pad' %}[PAD] {% endif %}{{ m.role }} {{ m.content }} {% endfor %}"
LONG = "w1 " * LONG_BYTES
GARBAGE = b"\xff\xff\xff\xff"


@pytest.fixture(scope="module")
def folder(llama: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokenizer has two more tokens than its embedding has rows, one of them long."""
    folder = tmp_path_factory.mktemp("padded")
    shutil.copytree(llama.folder, folder, dirs_exist_ok=True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["[PAD]"])
    assert tokenizer.token_to_id("[PAD]") == VOCAB_SIZE
    tokenizer.add_tokens(["x" * 200])  # so that a text of LONG's size might fit
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def router(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRouter]:
    content = topology(folder, pools=POOLS, devices=3, engine=ENGINE, limits={"max_waiting": 4})
    with running_router(content, tmp_path_factory.mktemp("border"), launcher_arguments=("--mock",)) as running:
        yield running


@pytest.fixture
def stub(router: RunningRouter) -> Iterator[Any]:
    with grpc.insecure_channel(router.address) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)
    router.wait_until_empty()


def request(text: str = "w3 w4", *, request_id: str = "", **sampling: Any) -> inference_pb2.GenerateRequest:
    params = inference_pb2.SamplingParams(**sampling)
    return inference_pb2.GenerateRequest(request_id=request_id, text=text, sampling=params)


def chat(*messages: tuple[str, str]) -> inference_pb2.GenerateRequest:
    parts = [inference_pb2.ChatMessage(role=role, content=content) for role, content in messages]
    return inference_pb2.GenerateRequest(chat=inference_pb2.Chat(messages=parts))


def error(call: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return caught.value


def assert_serves(stub: Any) -> None:
    responses = list(stub.Generate(request(max_new_tokens=3), timeout=20))
    assert responses[-1].complete.usage.generated_tokens == 3


@pytest.mark.parametrize(
    ("asked", "source"),
    [
        (request("w3 [PAD] w4"), "text"),
        (request("[PAD]"), "text"),
        (chat(("user", "w1"), ("user", "w2 [PAD]")), "chat.messages[1]"),
        (chat(("user", "w1"), ("[PAD]", "w2")), "chat.messages[1]"),
        (chat(("user", "w1"), ("pad", "w2")), "the model's chat template"),
    ],
)
def test_a_token_without_an_embedding_is_refused_with_its_name_and_source(stub: Any, asked: Any, source: str) -> None:
    refused: Any = error(stub.Generate(asked))
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.details() == (
        f"{source} holds the token '[PAD]', whose id is {VOCAB_SIZE}: the model has no embedding for it, its ids are 0 "
        f"to {VOCAB_SIZE - 1}"
    )
    assert_serves(stub)


class Gate:
    """Tokenising of texts as long as LONG waits here."""

    def __init__(self, encode: Callable[..., list[int]]) -> None:
        self._encode = encode
        self.entered = threading.Semaphore(0)
        self.left = threading.Semaphore(0)
        self.is_open = threading.Event()

    def wait(self, text: ModelText, prompt: str) -> list[int]:
        if len(prompt) >= LONG_BYTES:
            self.entered.release()
            assert self.is_open.wait(timeout=60)
            self.left.release()
            return [1, 2]
        return self._encode(text, prompt)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(ModelText.encode)
    monkeypatch.setattr(ModelText, "encode", lambda text, prompt: gate.wait(text, prompt))  # noqa: PLW0108 - a method
    yield gate
    gate.is_open.set()


def begun(stub: Any, gate: Gate, asked: inference_pb2.GenerateRequest) -> Any:
    """A call whose text is being tokenised."""
    call = stub.Generate(asked, timeout=60)
    assert gate.entered.acquire(timeout=20)
    return call


def test_a_call_can_be_aborted_while_it_is_tokenised_and_its_client_hears_at_once(stub: Any, gate: Gate) -> None:
    call = begun(stub, gate, request(LONG, request_id="mine"))
    assert stub.Abort(inference_pb2.AbortRequest(request_id="mine")).found
    (response,) = list(call)
    assert response.complete.finish_reason == inference_pb2.FINISH_REASON_ABORT
    assert response.request_id == "mine"
    # It is over for its client, although its thread is not.
    assert not stub.Abort(inference_pb2.AbortRequest(request_id="mine")).found
    assert [item.request_id for item in stub.Generate(request(request_id="mine", max_new_tokens=1))][-1] == "mine"


def test_a_second_call_of_an_id_is_refused_while_the_first_is_tokenised(stub: Any, gate: Gate) -> None:
    call = begun(stub, gate, request(LONG, request_id="mine", max_new_tokens=2))
    refused: Any = error(stub.Generate(request(request_id="mine")))
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT and "request_id is 'mine'" in refused.details()
    gate.is_open.set()
    assert list(call)[-1].complete.usage.generated_tokens == 2


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_client_that_goes_while_it_is_tokenised_leaves_nothing(
    router: RunningRouter, stub: Any, gate: Gate, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "cancel":
        call = begun(stub, gate, request(LONG, request_id="mine"))
        call.cancel()
    else:
        call = stub.Generate(request(LONG, request_id="mine"), timeout=0.3)
        assert gate.entered.acquire(timeout=20)
        error(call)
    deadline = time.monotonic() + 20
    while stub.Abort(inference_pb2.AbortRequest(request_id="mine")).found:  # the server hears of it a moment later
        assert time.monotonic() < deadline
    submitted: list[object] = []
    monkeypatch.setattr(router.server.dispatcher, "submit", submitted.append)
    gate.is_open.set()
    assert gate.left.acquire(timeout=20)
    stub.GetModelInfo(inference_pb2.GetModelInfoRequest())  # the router's loop has turned once more
    assert not submitted
    monkeypatch.undo()
    assert_serves(stub)


def test_long_texts_hold_up_no_short_one_and_are_bounded(stub: Any, gate: Gate) -> None:
    long = request(LONG, max_new_tokens=1)
    calls = [stub.Generate(long, timeout=60) for _ in range(5)]
    # Four may be tokenised or wait for it; the fifth is told, whichever it is, and short ones go on.
    refused: list[Any] = []
    with ThreadPoolExecutor(5) as clients:
        waiting = [clients.submit(list, call) for call in calls]
        first = next(as_completed(waiting, timeout=20))
        refused.append(first.exception())
        assert_serves(stub)
        gate.is_open.set()
        ended = [call for call in waiting if call is not first]
        assert all(call.result()[-1].complete.usage.generated_tokens == 1 for call in ended)
    assert refused[0].code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "limits.max_waiting is 4" in refused[0].details()


def test_an_unset_limit_is_what_fits_and_a_prompt_is_refused_only_where_it_itself_does_not(stub: Any) -> None:
    info = stub.GetModelInfo(inference_pb2.GetModelInfoRequest())
    assert info.context_tokens == 1024
    for prompt_tokens, generated in ((2, 256), (1000, 24), (1023, 1)):
        responses = list(stub.Generate(request("w1 " * prompt_tokens)))
        assert responses[-1].complete.usage.prompt_tokens == prompt_tokens
        assert responses[-1].complete.usage.generated_tokens == generated
    refused: Any = error(stub.Generate(request("w1 " * 1024)))
    assert "a prompt of 1024 tokens with max_new_tokens 1 needs 65 pages" in refused.details()
    refused = error(stub.Generate(request("w1 " * 1000, max_new_tokens=25)))
    assert "a prompt of 1000 tokens with max_new_tokens 25 needs 65 pages" in refused.details()


METHODS = {
    "muster.inference.v1.Inference": ("Generate", "Abort", "GetModelInfo", "GetTopology"),
    "grpc.health.v1.Health": ("Check", "Watch"),
    "grpc.reflection.v1alpha.ServerReflection": ("ServerReflectionInfo",),
}


def send(channel: Any, method: str, *payloads: bytes) -> grpc.RpcError:
    return error(channel.stream_stream(method)(iter(payloads), timeout=20))


@pytest.mark.parametrize("service", METHODS)
def test_bytes_that_are_no_message_are_an_invalid_argument_and_one_quiet_line(
    router: RunningRouter, stub: Any, service: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with grpc.insecure_channel(router.address) as channel:
        for method in METHODS[service]:
            caplog.clear()
            refused: Any = send(channel, f"/{service}/{method}", GARBAGE)
            assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT, method
            assert [record.levelname for record in caplog.records] == ["INFO"], method
    assert_serves(stub)


def test_a_launcher_refuses_bytes_that_are_no_message_without_a_traceback() -> None:
    with worker_command("--mock") as (command, address):
        with grpc.insecure_channel(address) as channel:
            for method in ("Hello", "Watch", "Assign", "Attach"):
                refused: Any = send(channel, f"/muster.control.v1.Launcher/{method}", GARBAGE)
                assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT, method
            refused = send(channel, "/muster.control.v1.Launcher/Attach")
            assert "names no replica" in refused.details()
        assert "Traceback" not in command.output
