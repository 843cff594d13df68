"""Clients that ask for something random, and stay to its end or do not."""

import asyncio
import random
from collections import Counter
from typing import Any

import grpc

from proto import inference_pb2

_MOST_PROMPT_TOKENS, _MOST_NEW_TOKENS, _SHARED_TOKENS = 200, 12, 64
#: How a client leaves, and how many of a hundred do.
_WAYS = {"stays": 60, "cancels": 20, "deadline": 10, "aborts": 10}
_GONE = (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)


class Traffic:
    """`concurrency` clients at once; the same `seed` asks for the same."""

    def __init__(self, stub: Any, *, vocab_size: int, concurrency: int, seed: int) -> None:
        self.ends: Counter[str] = Counter()
        self._stub = stub
        self._vocab_size = vocab_size
        self._concurrency = concurrency
        self._chance = random.Random(seed)
        self._shared = [self._tokens(_SHARED_TOKENS) for _ in range(3)]

    async def run(self, requests: int) -> None:
        """Sends so many requests and waits until each has ended for its client."""
        left = iter(range(requests))

        async def client() -> None:
            for _ in left:
                await self._one()

        await asyncio.gather(*(client() for _ in range(self._concurrency)))

    async def fill(self, *, prompt_tokens: int, copies: int, timeout_s: float) -> None:
        """`copies` prompts of that length at once, alike none that was: they need all pages of their coordinate."""

        async def one() -> None:
            asked = self._request(self._tokens(prompt_tokens), new_tokens=2)
            async for _ in self._stub.Generate(asked, timeout=timeout_s):
                pass

        await asyncio.gather(*(one() for _ in range(copies)))

    async def occupy(self, *, sequences: int, timeout_s: float) -> None:
        """So many short requests at once, each of which needs a slot of its own."""

        async def one() -> None:
            asked = self._request(self._tokens(8), new_tokens=_MOST_NEW_TOKENS)
            asked.sampling.ignore_eos = True
            del asked.sampling.stop[:], asked.sampling.stop_token_ids[:]
            async for _ in self._stub.Generate(asked, timeout=timeout_s):
                pass

        await asyncio.gather(*(one() for _ in range(sequences)))

    async def _one(self) -> None:
        way = self._chance.choices(list(_WAYS), weights=list(_WAYS.values()))[0]
        asked = self._request(self._prompt(), new_tokens=self._chance.randint(1, _MOST_NEW_TOKENS))
        timeout_s = self._chance.uniform(0.0, 0.3) if way == "deadline" else 60.0
        leaves_after = self._chance.randint(0, _MOST_NEW_TOKENS)
        call = self._stub.Generate(asked, timeout=timeout_s)
        if leaves_after == 0 and way in ("cancels", "aborts"):
            await self._leave(way, call, asked.request_id)
        try:
            self.ends[await self._read(call, way=way, leaves_after=leaves_after, request_id=asked.request_id)] += 1
        except asyncio.CancelledError:
            if not call.cancelled():
                raise
            self.ends["cancelled"] += 1
        except grpc.aio.AioRpcError as error:
            if error.code() not in _GONE:
                raise
            self.ends[error.code().name.lower()] += 1

    async def _read(self, call: Any, *, way: str, leaves_after: int, request_id: str) -> str:
        num_tokens = 0
        async for response in call:
            if response.HasField("complete"):
                return inference_pb2.FinishReason.Name(response.complete.finish_reason).lower()
            num_tokens += len(response.delta.token_ids)
            if way in ("cancels", "aborts") and num_tokens >= leaves_after > 0:
                leaves_after = 0
                await self._leave(way, call, request_id)
        return "cut"

    async def _leave(self, way: str, call: Any, request_id: str) -> None:
        if way == "cancels":
            call.cancel()
        else:
            await self._stub.Abort(inference_pb2.AbortRequest(request_id=request_id))

    def _request(self, prompt: list[int], *, new_tokens: int) -> inference_pb2.GenerateRequest:
        chance = self._chance
        sampling = inference_pb2.SamplingParams(
            max_new_tokens=new_tokens,
            temperature=chance.choice([0.0, 0.8]),
            top_p=chance.choice([1.0, 0.9]),
            seed=chance.getrandbits(64),
            stop=chance.choice([[], ["w7"]]),
            stop_token_ids=self._tokens(2),
        )
        return inference_pb2.GenerateRequest(
            request_id=f"{chance.getrandbits(64):016x}",
            token_ids=inference_pb2.TokenIds(ids=prompt),
            sampling=sampling,
        )

    def _prompt(self) -> list[int]:
        """Some begin like others, so that the prefix cache has something to find."""
        own = self._tokens(self._chance.randint(1, _MOST_PROMPT_TOKENS))
        return [*self._chance.choice(self._shared), *own] if self._chance.random() < 0.3 else own

    def _tokens(self, count: int) -> list[int]:
        return [self._chance.randrange(self._vocab_size) for _ in range(count)]
