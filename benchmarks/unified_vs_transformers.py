"""One unified rank behind gRPC against transformers, on the dense demo checkpoint, interleaved, medians of the runs.

Run: `python -m benchmarks.unified_vs_transformers` after `make demo-model`. All use all cores; decode is timed from the
last first token to the last token over all sequences of a batch, prefill from the request to the last first token.
"""

import argparse
import contextlib
import math
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
import torch
import yaml
from transformers import AutoModelForCausalLM

from benchmarks.machine_rates import MachineRates
from benchmarks.pools import DENSE
from benchmarks.report import Report
from examples.demo import wait_until_serving
from parallel.models.registry import describe_checkpoint
from parallel.process.own_packages import module_command
from proto import inference_pb2, inference_pb2_grpc

#: Muster, with weights in float32 and as the checkpoint stores them, by what `engine.weights` says.
OURS = {"float32": "float32", "auto": "as stored"}
THEIRS = ("eager", "sdpa")
_FIRST_PORT = 30100


@dataclass(frozen=True, kw_only=True)
class Work:
    """Prompts of `length` tokens at once; what is timed is their prefill, or their decode."""

    kind: str
    batch: int
    length: int

    @property
    def name(self) -> str:
        """As in the table."""
        return f"{self.kind} {self.batch} × {self.length}"


WORKS = (
    *(Work(kind="decode", batch=batch, length=128) for batch in (1, 8, 32)),
    Work(kind="decode", batch=1, length=1024),
    *(Work(kind="prefill", batch=batch, length=128) for batch in (1, 8, 32)),
    Work(kind="prefill", batch=1, length=1024),
)

#: Rows of prompts and new tokens to the seconds to the last first token, and from there to the last token.
Contender = Callable[[list[list[int]], int], tuple[float, float]]


@dataclass(kw_only=True)
class Series:
    """Of one work: tokens a second of each contender, a value a run, and bytes a second that memory gave beside it."""

    values: dict[str, list[float]] = field(default_factory=dict)
    read_rates: list[float] = field(default_factory=list)

    def add(self, name: str, value: float) -> None:
        """Adds one run."""
        self.values.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        """The median over the runs."""
        return statistics.median(self.values[name])

    def over_theirs(self, name: str) -> float:
        """Tokens a second over those of the faster of transformers' two."""
        return self.median(name) / max(map(self.median, THEIRS))


def prompts(work: Work, *, run: int) -> list[list[int]]:
    """Other prompts for each work in each run: a prefix cache must not find any."""
    generator = torch.Generator().manual_seed((run + 1) * 10_000_000 + WORKS.index(work))
    rows: list[list[int]] = torch.randint(100, 40000, (work.batch, work.length), generator=generator).tolist()
    return rows


def ours(stub: Any, rows: list[list[int]], new_tokens: int) -> tuple[float, float]:
    """All rows sent at once, each by a client of its own."""
    first: list[float] = [0.0] * len(rows)
    last: list[float] = [0.0] * len(rows)

    def one(index: int) -> None:
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=rows[index]),
            sampling=inference_pb2.SamplingParams(max_new_tokens=new_tokens, temperature=0, ignore_eos=True),
        )
        count = 0
        for response in stub.Generate(request):
            count += len(response.delta.token_ids)
            first[index] = first[index] or time.perf_counter()
        last[index] = time.perf_counter()
        assert count == new_tokens, f"{count} tokens instead of {new_tokens}"

    started = time.perf_counter()
    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(first) - started, max(last) - max(first)


@torch.inference_mode()
def theirs(model: Any, rows: list[list[int]], new_tokens: int) -> tuple[float, float]:
    """With `generate`: the decode span is a long generation less one of a single token."""
    ids = torch.tensor(rows)

    def timed(count: int) -> float:
        started = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - started

    prefill = timed(1)
    return prefill, (timed(new_tokens) - prefill if new_tokens > 1 else 0.0)


@contextlib.contextmanager
def served(weights: str, *, port: int) -> Iterator[Contender]:
    """A router with one unified rank whose `engine.weights` are `weights`."""
    content = {
        "model": str(DENSE.absolute()),
        "listen": f"127.0.0.1:{port}",
        "hosts": [{"name": "here", "address": "local", "devices": 1}],
        "pools": {"unified": {"attention": {"dp": 1}}},
        "engine": {"weights": weights},
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(content, file)
        file.flush()
        router = subprocess.Popen([*module_command("router"), "--config", file.name, "--log-level", "WARNING"])
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                wait_until_serving(router, channel)
                stub = inference_pb2_grpc.InferenceStub(channel)
                yield lambda rows, new_tokens: ours(stub, rows, new_tokens)
        finally:
            router.terminate()
            router.wait(timeout=30)


def loaded(attention: str) -> Contender:
    """transformers' model in float32, over the same weights."""
    model = AutoModelForCausalLM.from_pretrained(DENSE, dtype=torch.float32, attn_implementation=attention).eval()
    return lambda rows, new_tokens: theirs(model, rows, new_tokens)


def measure(contenders: Mapping[str, Contender], *, runs: int, new_tokens: int) -> dict[Work, Series]:
    """Every work, all contenders one after the other in each run."""
    found, rates = {work: Series() for work in WORKS}, MachineRates()
    for run in range(-1, runs):  # run -1 warms everything up and is not counted
        for work in WORKS:
            rows, series = prompts(work, run=run), found[work] if run >= 0 else Series()
            count = new_tokens if work.kind == "decode" else 1
            series.read_rates.append(rates.measure(threads=torch.get_num_threads()).read_bytes)
            for name, contender in contenders.items():
                prefill_s, decode_s = contender(rows, count)
                tokens = work.batch * (count - 1) if work.kind == "decode" else work.batch * work.length
                series.add(name, tokens / (decode_s if work.kind == "decode" else prefill_s))
    return found


def publish(found: Mapping[Work, Series]) -> None:
    """The table, the plot, and how much of what memory gives a single sequence takes."""
    headings = ["", *(f"Muster, {how}" for how in OURS.values()), *(f"transformers, {how}" for how in THEIRS)]
    report = Report(
        "unified_vs_transformers",
        title="One unified rank against transformers",
        about=(
            "The dense demo checkpoint (135 million weights, stored in bfloat16) on one unified rank through gRPC, and "
            "in `transformers` in this process, in tokens/s. All arithmetic is float32; *float32* holds the weights in "
            "it too (`engine.weights: float32`), *as stored* in the checkpoint's dtype. The ratios are over the faster "
            "of transformers' two; medians of interleaved runs."
        ),
        headings=[*headings, *(f"ratio, {how}" for how in OURS.values())],
    )
    for work, series in found.items():
        rates = [f"{series.median(name):.1f}" for name in (*OURS, *THEIRS)]
        report.add(work.name, *rates, *(f"{series.over_theirs(name):.2f}" for name in OURS))
    for work in (work for work in WORKS if work.kind == "decode" and work.batch == 1):
        report.note(_share_of_memory(work, found[work]))

    def plot(axes: Any) -> None:
        for place, (name, how) in enumerate(OURS.items()):
            heights = [series.over_theirs(name) for series in found.values()]
            axes.bar([at + 0.4 * place for at in range(len(found))], heights, width=0.4, label=f"Muster, {how}")
        axes.axhline(1.0, color="black", linewidth=0.8, label="transformers, the faster")
        axes.set_xticks([at + 0.2 for at in range(len(found))], [work.name for work in found], rotation=30)
        axes.set_ylabel("tokens/s over transformers'")
        axes.legend()

    report.publish(plot)


def _share_of_memory(work: Work, series: Series) -> str:
    """How fast a sequence alone reads weights and its own KV, over what memory gave right before."""
    description = describe_checkpoint(DENSE)
    weights = sum(math.prod(spec.shape) for spec in description.tensors if len(spec.shape) > 1)
    kv_bytes = sum(
        group.token_bytes(num_heads=group.num_kv_heads, dtype="float32") * len(group.layers)
        for group in description.cache_groups
    )
    gave = statistics.median(series.read_rates)
    shares = []
    for name, how in OURS.items():
        step_bytes = weights * (4 if name == "float32" else 2) + work.length * kv_bytes
        shares.append(f"{series.median(name) * step_bytes / gave:.0%} ({how})")
    return (
        f"{work.name}: a sequence alone reads its weights and KV through gRPC at {' and '.join(shares)} of the "
        f"{gave / 1e9:.0f} GB/s that memory gave to a product of one row in the same minutes"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=48)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        contenders: dict[str, Contender] = {}
        for place, weights in enumerate(OURS):
            contenders[weights] = stack.enter_context(served(weights, port=_FIRST_PORT + place))
        contenders |= {name: loaded(name) for name in THEIRS}
        found = measure(contenders, runs=options.runs, new_tokens=options.new_tokens)
    publish(found)


if __name__ == "__main__":
    main()
