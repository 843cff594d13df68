"""Runs pairs of the sweep in living processes and compares each with transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import cycle
from pathlib import Path

import numpy as np

from benchmarks.bench import Bench, running_bench
from parallel.settings import EngineSettings
from parallel.shape import ReplicaShape
from parallel.topology import PoolSpec
from proto import control_pb2
from router.generation import GenerationRequest
from tests.harness.checkpoints import VOCAB_SIZE, Oracle, sweep_model
from tests.harness.parity import assert_probes_agree, assert_tokens_agree, probes
from tests.harness.running_router import greedy
from tests.sweep.pairs import MAX_WORLD, Pair

NUM_TOKENS = 9
#: One token, the ends of pages, and several chunks of MAX_BATCH_TOKENS.
LENGTHS = (1, 2, 7, 8, 17, 33, 70, 101)
MAX_BATCH_TOKENS = 40
_SHALLOW, _DEEP = 2, 8
_TIMEOUT_S = 100.0


class Sweep:
    """The checkpoints, made when first asked for, and the processes that every pair runs in."""

    def __init__(self, folder: Path, bench: Bench) -> None:
        self._folder = folder
        self._bench = bench
        self.oracle = cache(self._oracle)

    def run(self, pair: Pair, *, num_layers: int | None = None) -> int:
        """AssertionError where a logit or a token of `pair` is not transformers'. Returns how many tokens of prompts
        were found in the prefix cache, where the probes left them.
        """
        num_layers = num_layers or (_SHALLOW if max(shape.pp for shape in pair.shapes) <= _SHALLOW else _DEEP)
        oracle = self.oracle(pair.family, num_layers)
        with self._bench.pools(pools(pair), model=str(oracle.folder), timeout_s=_TIMEOUT_S) as up:
            probed = up.generate(probes(oracle, prompts(), n=NUM_TOKENS), timeout_s=_TIMEOUT_S)
            found = up.generate(copies(), timeout_s=_TIMEOUT_S)
        assert_probes_agree(probed, oracle, n=NUM_TOKENS)
        assert_tokens_agree(found, oracle, n=NUM_TOKENS)
        return sum(generation.cached_tokens for generation in found)

    def _oracle(self, family: str, num_layers: int) -> Oracle:
        folder = self._folder / f"{family}-{num_layers}"
        return sweep_model(folder, family=family, num_layers=num_layers)


@contextmanager
def running_sweep(folder: Path) -> Iterator[Sweep]:
    """A sweep over processes of its own; `folder` takes the checkpoints."""
    any_model = sweep_model(folder / "any", family="llama", num_layers=1)
    with running_bench(num_devices=2 * MAX_WORLD, model=str(any_model.folder)) as bench:
        yield Sweep(folder, bench)


def pools(pair: Pair) -> list[PoolSpec]:
    """The pools of a pair, each with its own page size. An exchange holds little, so that rings take several blocks."""
    names = ("unified",) if pair.decode is None else ("prefill", "decode")
    return [
        _pool(name, shape, pair=pair, page_size=page_size)
        for name, shape, page_size in zip(names, pair.shapes, pair.pages, strict=False)
    ]


def _pool(name: str, shape: ReplicaShape, *, pair: Pair, page_size: int) -> PoolSpec:
    engine = EngineSettings(
        page_size=page_size,
        max_batch_tokens=MAX_BATCH_TOKENS,
        max_sequences=16,
        kv_tokens=pair.kv,
        exchange=pair.exchange,
        dispatch=pair.dispatch,
        kernels=pair.kernels,
        pipeline=pair.pipeline,
        exchange_tokens=128,
    )
    return PoolSpec(name=name, replicas=1, shape=shape, engine=engine)


def copies() -> list[GenerationRequest]:
    """The prompts again, each greedy and each with tokens drawn from all or, of every other, from the most likely."""
    requests = [greedy(prompt, max_new_tokens=NUM_TOKENS) for prompt in prompts()]
    drawn = [
        replace(request, sampling=control_pb2.Sampling(temperature=0.8, top_p=top_p, top_k=top_k, seed=seed))
        for seed, (request, (top_p, top_k)) in enumerate(zip(requests, cycle([(1, 0), (0.9, 8)]), strict=False))
    ]
    return [*requests, *drawn]


def prompts() -> list[tuple[int, ...]]:
    """Random prompts of LENGTHS tokens, the same each time."""
    random = np.random.default_rng(11)
    return [tuple(int(token) for token in random.integers(0, VOCAB_SIZE, length)) for length in LENGTHS]
