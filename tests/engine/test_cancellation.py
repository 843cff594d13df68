"""Requests that end early on real ranks, in every phase: each leaves every page free on both pools."""

import asyncio
from pathlib import Path

import pytest

from tests.engine.test_parity import ENGINE, LAYOUTS, prompts
from tests.harness.checkpoints import Oracle
from tests.harness.running_router import greedy, running_router, topology


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["cp2-ep2", "unified-dp2"])
def test_an_abort_in_any_phase_leaves_every_page_free_and_the_next_answers_right(
    name: str, mixtral: Oracle, tmp_path: Path
) -> None:
    pools, devices = LAYOUTS[name]
    with running_router(topology(mixtral.folder, pools=pools, devices=devices, engine=ENGINE), tmp_path) as router:
        dispatcher = router.server.dispatcher

        async def abort_after(prompt: tuple[int, ...], delay_s: float) -> None:
            generation = dispatcher.submit(greedy(prompt, max_new_tokens=400))
            await asyncio.sleep(delay_s)
            dispatcher.abort(generation)

        async def many() -> None:
            # Delays from the first chunk of a long prompt over its hand-off to the middle of decode.
            await asyncio.gather(
                *(abort_after(prompt, 0.002 * index**2) for index in range(18) for prompt in prompts()[index % 2 :: 2])
            )

        router.run(many())
        router.wait_until_empty()
        for replica in dispatcher.replicas:
            engine = replica.plan.engine
            shape = replica.plan.shape.attention
            assert replica.load.free_pages == engine.num_pages * shape.cp * shape.dp
        prompt = prompts()[6]
        (generation,) = router.generate_all([greedy(prompt, max_new_tokens=20)])
        assert tuple(generation.token_ids) == mixtral.answer(prompt, 64).token_ids[:20]
