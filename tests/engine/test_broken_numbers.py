"""NaN in the embedding of one token: a request with it ends with a sentence, and no other notices.

The same pages are used before, beside and after: by way of the prefix cache, of padding, of gathered parts, of blocks
in a ring and of the hand-off.
"""

import asyncio
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.bench import Bench, drain, running_bench
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape
from parallel.topology import PoolSpec
from router.errors import ModelFailedError
from router.generation import Generation, GenerationRequest
from tests.harness.checkpoints import VOCAB_SIZE, Oracle, sweep_model
from tests.harness.parity import assert_tokens_agree
from tests.harness.running_router import greedy

NUM_TOKENS = 9
EMBEDDING = "model.embed_tokens.weight"
COMMON = tuple(7 * index % VOCAB_SIZE for index in range(70))
SOUND = (COMMON, COMMON[:33], (*COMMON[:40], 3, 1, 4, 1, 5), (9, 2), (6,), COMMON[5:60])
ONE = AttentionSizes()

#: Prefill, decode (none where unified), exchange, dispatch.
LAYOUTS = {
    "one": (ReplicaShape(attention=ONE, experts=ExpertSizes()), None, "auto", "auto"),
    "tp": (ReplicaShape(attention=AttentionSizes(tp=2), experts=ExpertSizes(ep=2)), None, "auto", "gather"),
    "gather": (
        ReplicaShape(attention=AttentionSizes(cp=2), experts=ExpertSizes(ep=2)),
        ReplicaShape(attention=AttentionSizes(dp=2), experts=ExpertSizes(ep=2)),
        "gather",
        "all_to_all",
    ),
    "ring": (
        ReplicaShape(attention=AttentionSizes(cp=2), experts=ExpertSizes(moe_tp=2)),
        ReplicaShape(attention=AttentionSizes(cp=2), experts=ExpertSizes(ep=2)),
        "ring",
        "gather",
    ),
    "pass_q": (
        ReplicaShape(attention=AttentionSizes(cp=2), experts=ExpertSizes(moe_dp=2)),
        ReplicaShape(pp=2, attention=AttentionSizes(tp=2), experts=ExpertSizes(ep=2)),
        "pass_q",
        "gather",
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return sweep_model(tmp_path_factory.mktemp("sound"), family="mixtral", num_layers=2)


@pytest.fixture(scope="module")
def bad_token(sound: Oracle) -> int:
    """A token that neither a sound prompt nor its answer holds, and that no rank but the first has with tp."""
    used = {token for prompt in SOUND for token in (*prompt, *sound.answer(prompt, NUM_TOKENS).token_ids)}
    # The first of its tp rank's part: where another rank looks up what it does not have.
    wanted = [0, (VOCAB_SIZE + 1) // 2, *range(VOCAB_SIZE)]
    free: list[int] = [token for token in wanted if token not in used]
    return free[0]


@pytest.fixture(scope="module")
def broken(sound: Oracle, bad_token: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with NaN in one element of one row of its embedding."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(sound.folder, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    tensors[EMBEDDING][bad_token, 3] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def bench(broken: Path) -> Iterator[Bench]:
    with running_bench(num_devices=8, model=str(broken)) as running:
        yield running


def pools(layout: str) -> list[PoolSpec]:
    prefill, decode, exchange, dispatch = LAYOUTS[layout]
    engine = EngineSettings(
        page_size=8, max_batch_tokens=32, kv_tokens=1024, max_sequences=16, exchange=exchange, dispatch=dispatch
    )
    if decode is None:
        return [PoolSpec(name="unified", replicas=1, shape=prefill, engine=engine)]
    return [
        PoolSpec(name=name, replicas=1, shape=shape, engine=engine)
        for name, shape in (("prefill", prefill), ("decode", decode))
    ]


def with_bad_token(token: int) -> list[GenerationRequest]:
    """First, in the middle of a chunk and of a page, at the end, in a later chunk, alone."""
    prompts = [
        (token, *COMMON[1:]),
        (*COMMON[:20], token, *COMMON[21:]),
        (*COMMON, token),
        (*COMMON[:60], token, 1, 2),
        (token,),
    ]
    return [greedy(prompt, max_new_tokens=NUM_TOKENS) for prompt in prompts]


async def run_beside(bench: Bench, bad: Sequence[GenerationRequest]) -> list[Generation]:
    """Each bad request fails by its own numbers; returns the sound ones that ran beside them."""
    generations = []
    for index, prompt in enumerate(SOUND):
        if index < len(bad):
            generations.append(bench.dispatcher.submit(bad[index]))
        generations.append(bench.dispatcher.submit(greedy(prompt, max_new_tokens=NUM_TOKENS)))
    sound = []
    for generation in generations:
        if generation.request in bad:
            with pytest.raises(ModelFailedError, match="output token 0 hold NaN or infinity"):
                await drain(generation)
            assert not generation.token_ids
        else:
            assert await drain(generation) == "length"
            sound.append(generation)
    while bench.dispatcher.num_held:
        await asyncio.sleep(0.005)
    return sound


@pytest.mark.timeout(120)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_without_the_token_get_the_right_tokens_before_beside_and_after(
    layout: str, bench: Bench, broken: Path, sound: Oracle, bad_token: int
) -> None:
    with bench.pools(pools(layout), model=str(broken)):
        for bad in ((), with_bad_token(bad_token), (), with_bad_token(bad_token), ()):
            generations = bench.run(run_beside(bench, bad), timeout_s=60)
            assert_tokens_agree(generations, sound, n=NUM_TOKENS)
