"""The text of a stream of a tokenizer that writes bytes where no piece fits, over mocked ranks that draw any token."""

import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from proto import inference_pb2, inference_pb2_grpc
from tests.harness.running_router import running_router, topology
from tests.harness.tokenizer_kinds import ids_of, llama_2
from tests.tiny_models import llama, write_checkpoint
from worker.launcher.mock_rank import mock_token

TOKENIZER = llama_2()
#: Beyond the tokenizer's, as where an embedding is padded.
VOCAB_SIZE = TOKENIZER.get_vocab_size(with_added_tokens=True) + 6
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
NUM_TOKENS = 60


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), llama(vocab_size=VOCAB_SIZE))
    TOKENIZER.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    content = topology(folder, pools={"unified": {}}, devices=1)
    with (
        running_router(content, folder, launcher_arguments=("--mock",)) as router,
        grpc.insecure_channel(router.address) as channel,
    ):
        yield inference_pb2_grpc.InferenceStub(channel)


def outputs(prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    for _ in range(NUM_TOKENS):
        tokens.append(mock_token(tokens[-1], position=len(tokens), vocab_size=VOCAB_SIZE))
    return tokens[len(prompt) :]


def generate(stub: Any, *, stop: tuple[str, ...] = (), **prompt: Any) -> tuple[list[int], str, int]:
    """Tokens, text and finish reason."""
    sampling = inference_pb2.SamplingParams(max_new_tokens=NUM_TOKENS, temperature=0, stop=stop)
    responses = list(stub.Generate(inference_pb2.GenerateRequest(sampling=sampling, **prompt), timeout=30))
    tokens = [token for response in responses for token in response.delta.token_ids]
    return tokens, "".join(response.delta.text for response in responses), responses[-1].complete.finish_reason


def decoded(ids: list[int]) -> str:
    return str(TOKENIZER.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("last", ["a", "▁a", "<s>", "日本", "n't"])
def test_the_text_of_a_token_prompt_continues_the_prompts(stub: Any, last: str) -> None:
    prompt = ids_of(TOKENIZER, "<s>", "▁b", last)
    tokens, text, reason = generate(stub, token_ids=inference_pb2.TokenIds(ids=prompt))
    assert tokens == outputs(prompt)
    assert decoded(prompt) + text == decoded(prompt + tokens)
    assert reason == inference_pb2.FINISH_REASON_LENGTH


@pytest.mark.parametrize("content", ["a", "日本a", "a."])
def test_the_text_of_a_chats_answer_is_that_of_its_tokens(stub: Any, content: str) -> None:
    message = inference_pb2.ChatMessage(role="user", content=content)
    tokens, text, _ = generate(stub, chat=inference_pb2.Chat(messages=[message]))
    assert text == decoded(tokens)
    assert len(tokens) == NUM_TOKENS


def test_a_stop_string_that_is_a_special_token_ends_the_stream_before_it(stub: Any) -> None:
    special = ids_of(TOKENIZER, "</s>")[0]
    size = TOKENIZER.get_vocab_size()
    prompt = next(
        [first, second] for first in range(size) for second in range(size) if special in outputs([first, second])
    )
    before = outputs(prompt)[: outputs(prompt).index(special)]
    tokens, text, reason = generate(stub, stop=("</s>",), token_ids=inference_pb2.TokenIds(ids=prompt))
    assert tokens == [*before, special]
    assert decoded(prompt) + text == decoded(prompt + before)
    assert reason == inference_pb2.FINISH_REASON_STOP
