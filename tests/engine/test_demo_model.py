"""The demo model behind gRPC against transformers on the dense checkpoint: 20 prompts of mixed lengths at once."""

from pathlib import Path
from typing import Any

import grpc
import pytest
from transformers import LlamaForCausalLM

from proto import inference_pb2, inference_pb2_grpc
from router.text import ModelText
from tests.harness.checkpoints import Oracle, from_folder
from tests.harness.near_ties import first_near_tie
from tests.harness.running_router import running_router, topology

DENSE = Path(".cache/models/smollm2-135m-llama").absolute()
MIXTRAL = Path(".cache/models/smollm2-135m-mixtral").absolute()
#: Tokens after each prompt: fewer where every run of the suite pays for them.
QUICK, FULL = 20, 64
ENGINE = {"kv_tokens": 4096, "max_batch_tokens": 512}
STORY = (
    "The lighthouse keeper counted the ships that passed each night, and wrote their names in a book that nobody read. "
)


@pytest.fixture(scope="module")
def dense() -> Oracle:
    """transformers on the dense form."""
    return from_folder(DENSE, LlamaForCausalLM)


def prompt_ids() -> list[tuple[int, ...]]:
    """Twenty prompts: questions, and stories of up to 600 tokens, which take several chunks."""
    text = ModelText(DENSE)
    questions = ["What is gravity?", "Name three rivers.", "Write a haiku about rain.", "Why is the sky blue?"]
    prompts = [text.encode_chat([{"role": "user", "content": question}]) for question in questions]
    prompts += [
        text.encode(STORY * 25)[:length] for length in (1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 100, 127, 200, 300)
    ]
    prompts += [text.encode("Once upon a time, " + STORY * count) for count in (5, 22)]
    return [tuple(prompt) for prompt in prompts]


def generate_all(address: str, prompts: list[tuple[int, ...]], *, num_tokens: int) -> list[list[int]]:
    """Sends all at once through gRPC."""
    sampling = inference_pb2.SamplingParams(max_new_tokens=num_tokens, temperature=0, ignore_eos=True)
    with grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        streams: list[Any] = [
            stub.Generate(
                inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=prompt), sampling=sampling)
            )
            for prompt in prompts
        ]
        return [[token for response in stream for token in response.delta.token_ids] for stream in streams]


def assert_tokens_of_transformers(
    oracle: Oracle, prompts: list[tuple[int, ...]], found: list[list[int]], *, num_tokens: int
) -> None:
    compared = 0
    for prompt, tokens in zip(prompts, found, strict=True):
        answer = oracle.answer(prompt, num_tokens)
        end = first_near_tie(answer.logits)
        assert len(tokens) == num_tokens
        assert tuple(tokens[:end]) == answer.token_ids[:end], f"prompt of {len(prompt)} tokens"
        compared += end
    assert compared >= 0.8 * num_tokens * len(prompts), f"only {compared} tokens could be compared"


FULL_SWEEP = [pytest.param(cp, ep, FULL, marks=pytest.mark.full) for cp in (1, 2, 4) for ep in (1, 2, 4)]


@pytest.mark.timeout(500)
@pytest.mark.parametrize(("cp", "ep", "num_tokens"), [(2, 2, QUICK), *FULL_SWEEP])
def test_twenty_prompts_at_once_give_the_tokens_of_transformers(
    cp: int, ep: int, num_tokens: int, dense: Oracle, tmp_path: Path
) -> None:
    prompts = prompt_ids()
    assert len(prompts) == 20
    pools = {"prefill": {"attention": {"cp": cp}}, "decode": {"attention": {"dp": ep}}}
    with running_router(topology(MIXTRAL, pools=pools, devices=cp + ep, engine=ENGINE), tmp_path) as router:
        found = generate_all(router.address, prompts, num_tokens=num_tokens)
        assert_tokens_of_transformers(dense, prompts, found, num_tokens=num_tokens)
        router.wait_until_empty()


@pytest.mark.timeout(300)
def test_the_combination_that_other_engines_refuse_gives_the_tokens_of_transformers(
    dense: Oracle, tmp_path: Path
) -> None:
    prompts = prompt_ids()
    pools = {
        "prefill": {"pp": 2, "attention": {"cp": 2}, "experts": {"moe_dp": 2}},
        "decode": {"attention": {"dp": 2, "cp": 2}, "experts": {"ep": 4}},
    }
    with running_router(topology(MIXTRAL, pools=pools, devices=8, engine=ENGINE), tmp_path) as router:
        found = generate_all(router.address, prompts, num_tokens=QUICK)
        assert_tokens_of_transformers(dense, prompts, found, num_tokens=QUICK)
        router.wait_until_empty()
