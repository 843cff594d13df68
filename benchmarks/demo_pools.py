"""The demo's two pools: tokens per second of prefill and of decode, and what collectives take of a step.

Run: `python -m benchmarks.demo_pools` after `make demo-model`. The router runs in this process, its ranks in theirs.
"""

import argparse
import asyncio
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.bench import drain
from benchmarks.pools import greedy
from proto import control_pb2
from router.check import check_file
from router.dispatcher import Dispatcher
from router.errors import ClusterError
from router.generation import Generation
from router.server import RouterServer

PROMPT_TOKENS = 256
BATCHES = (1, 16)


async def measure(
    dispatcher: Dispatcher, *, batch: int, new_tokens: int, seeds: Iterator[int]
) -> tuple[float, float, float, float]:
    """Tokens/s of prefill and of decode, decode's seconds a step, and the share of it inside collectives.

    Every prompt has a seed of its own: none finds another in the prefix cache.
    """

    def submit(num_tokens: int) -> Generation:
        return dispatcher.submit(greedy(PROMPT_TOKENS, seed=next(seeds), new_tokens=num_tokens))

    (decode,) = (replica for replica in dispatcher.replicas if replica.plan.pool == "decode")
    started = time.perf_counter()
    for generation in [submit(1) for _ in range(batch)]:
        await drain(generation)
    prefill_s = time.perf_counter() - started
    generations = [submit(new_tokens) for _ in range(batch)]
    while not all(generation.clock.handed_off_s for generation in generations):
        await asyncio.sleep(0.001)
    before, started = control_pb2.Load(), time.perf_counter()
    before.CopyFrom(decode.load)
    tokens = sum(len(generation.token_ids) for generation in generations)
    for generation in generations:
        await drain(generation)
    decode_s = time.perf_counter() - started
    tokens = sum(len(generation.token_ids) for generation in generations) - tokens
    after = decode.load
    step_s = after.step_s - before.step_s
    share = (after.collective_s - before.collective_s) / step_s
    return (
        batch * PROMPT_TOKENS / prefill_s,
        tokens / decode_s,
        step_s / (after.num_steps - before.num_steps),
        share,
    )


async def run(config: Path, *, new_tokens: int) -> Table:
    """Starts the topology, measures each batch after one unmeasured run, ends it."""
    console = Console(stderr=True)
    server, seeds = RouterServer(check_file(config)), count()
    table = Table(title=f"{config.name}, prompts of {PROMPT_TOKENS} tokens, {new_tokens} new")
    for heading in ("batch", "prefill tokens/s", "decode tokens/s", "decode ms a step", "in collectives"):
        table.add_column(heading, justify="right")
    try:
        await server.start(console)
        await measure(server.dispatcher, batch=max(BATCHES), new_tokens=8, seeds=seeds)
        for batch in BATCHES:
            found = await measure(server.dispatcher, batch=batch, new_tokens=new_tokens, seeds=seeds)
            prefill, decode, step_s, share = found
            table.add_row(str(batch), f"{prefill:.0f}", f"{decode:.1f}", f"{step_s * 1e3:.1f}", f"{share:.0%}")
    finally:
        await server.stop(ClusterError("the benchmark is over"))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("examples/local.yaml"))
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    Console().print(uvloop.run(run(options.config, new_tokens=options.new_tokens)))


if __name__ == "__main__":
    main()
