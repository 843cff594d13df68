"""A service under random traffic: real ranks of a tiny model in two pools, behind `router --config`."""

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc

from proto import inference_pb2, inference_pb2_grpc
from tests.harness.checkpoints import tiny_mixtral
from tests.harness.router_process import router_command
from tests.harness.running_router import topology
from tests.soak.traffic import Traffic
from tests.soak.watch import Look, growth, look, table

#: After so many requests everything that is used at all has been used.
FIRST = 500
_LOOKS = 12
_DP, _SPARE_TOKENS = 2, 2
_POOLS: dict[str, Any] = {
    "prefill": {"attention": {"cp": 2}},
    "decode": {"attention": {"dp": _DP}},
}
_ENGINE = {"kv_tokens": 2048, "max_batch_tokens": 256, "max_sequences": 16}
_FILL_TIMEOUT_S = 60.0


def soak(
    requests: int, *, folder: Path, concurrency: int = 16, seed: int = 0, say: Callable[[str], None] = print
) -> list[str]:
    """Runs so many requests; returns a sentence for everything that is not as it was after the first 500.

    AssertionError or the client's own error where a request ends as none should, or capacity is lost.
    """
    oracle = tiny_mixtral(folder / "model")
    content = topology(oracle.folder, pools=_POOLS, devices=4, engine=_ENGINE)
    with router_command(content, folder) as (command, address):
        looks = asyncio.run(
            _drive(address, command.pid, requests=requests, concurrency=concurrency, seed=seed, say=say)
        )
    found = growth(looks[0], looks[-1])
    say(table(looks))
    for sentence in found or ["nothing has grown"]:
        say(sentence)
    return found


async def _drive(
    address: str, pid: int, *, requests: int, concurrency: int, seed: int, say: Callable[[str], None]
) -> list[Look]:
    looks: list[Look] = []
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        info = await stub.GetModelInfo(inference_pb2.GetModelInfoRequest())
        traffic = Traffic(stub, vocab_size=info.vocab_size, concurrency=concurrency, seed=seed)
        started, done = time.monotonic(), 0
        for until in _moments(requests):
            await traffic.run(until - done)
            done = until
            # Every page of decode at once: one that was lost would leave a request waiting.
            await traffic.fill(prompt_tokens=info.context_tokens - _SPARE_TOKENS, copies=_DP, timeout_s=_FILL_TIMEOUT_S)
            await traffic.occupy(sequences=_DP * _ENGINE["max_sequences"], timeout_s=_FILL_TIMEOUT_S)
            looks.append(look(pid, requests=done))
            ends = ", ".join(f"{count} {end}" for end, count in sorted(traffic.ends.items()))
            say(f"{done} requests, {done / (time.monotonic() - started):.0f} a second: {ends}")
        assert not traffic.ends["cut"], "a stream ended without a word"
    return looks


def _moments(requests: int) -> Sequence[int]:
    """When to look: after the first ones, then at even distances."""
    step = max((requests - FIRST) // _LOOKS, 1)
    return sorted({min(FIRST, requests), *range(FIRST, requests, step), requests})
