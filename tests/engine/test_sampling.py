"""The same seed gives the same tokens alone, in a batch and in another layout; real ranks on gloo."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from proto import control_pb2
from router.generation import GenerationRequest
from tests.engine.test_parity import ENGINE, LAYOUTS, prompts
from tests.harness.checkpoints import Oracle
from tests.harness.running_router import RunningRouter, running_router, topology
from worker.kernels.interface import Draw
from worker.kernels.torch_sampler import draw_tokens


def sampled(prompt: tuple[int, ...], *, seed: int) -> GenerationRequest:
    return GenerationRequest(
        prompt_ids=prompt,
        max_new_tokens=40,
        stop_token_ids=frozenset(),
        sampling=control_pb2.Sampling(temperature=0.8, top_p=0.95, top_k=50, min_p=0.01, seed=seed),
    )


def tokens(router: RunningRouter, requests: list[GenerationRequest]) -> list[list[int]]:
    return [generation.token_ids for generation in router.generate_all(requests)]


@pytest.mark.timeout(120)
def test_the_same_seed_gives_the_same_tokens_alone_in_a_batch_and_in_another_layout(
    mixtral: Oracle, tmp_path: Path
) -> None:
    requests = [sampled(prompt, seed=index) for index, prompt in enumerate(prompts()[:6])]
    found = []
    for name in ("unified-dp1", "cp2-ep2"):
        pools, devices = LAYOUTS[name]
        with running_router(topology(mixtral.folder, pools=pools, devices=devices, engine=ENGINE), tmp_path) as router:
            found.append([tokens(router, [request])[0] for request in requests])
            found.append(tokens(router, requests))
    assert found[0] == found[1] == found[2] == found[3]
    assert len({tuple(row) for row in found[0]}) == len(requests)


@pytest.mark.timeout(60)
def test_each_draw_takes_the_noise_of_its_own_position(llama: Oracle, tmp_path: Path) -> None:
    pools, devices = LAYOUTS["unified-dp1"]
    requests = [
        replace(sampled(prompt, seed=9), probe=control_pb2.Probe(logits=True)) for prompt in prompts()[:3] for _ in "ab"
    ]
    with running_router(topology(llama.folder, pools=pools, devices=devices, engine=ENGINE), tmp_path) as router:
        generations = router.generate_all(requests)
    for generation in generations:
        logits = torch.stack([torch.frombuffer(bytearray(row), dtype=torch.float32) for row in generation.logits])
        first = len(generation.request.prompt_ids)  # the position of the first token that is drawn
        draws = [
            Draw(sampling=generation.request.sampling, position=first + index)
            for index in range(len(generation.token_ids))
        ]
        assert draw_tokens(logits, draws).tolist() == generation.token_ids
