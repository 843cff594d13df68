"""One unified rank behind gRPC against transformers, on the dense demo checkpoint, interleaved, medians of the runs.

Run: `python -m benchmarks.unified_vs_transformers` after `make demo-model`. Both sides use all cores; decode is timed
from the first token to the last over all sequences of a batch, prefill from the request to the first token.
"""

import argparse
import statistics
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from examples.demo import wait_until_serving
from parallel.process.own_packages import module_command
from proto import inference_pb2, inference_pb2_grpc

MODEL = Path(".cache/models/smollm2-135m-llama")
DECODE_PROMPT = 128
PREFILL_PROMPT = 1024
BATCHES = (1, 8, 32)


@dataclass(kw_only=True)
class Series:
    """Tokens per second of one shape, by contender, a value a run."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        """Adds one run."""
        self.values.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        """The median over the runs."""
        return statistics.median(self.values[name])


def prompts(batch: int, length: int, *, run: int) -> list[list[int]]:
    """Equal-length prompts, other ones in each run and for each length: a prefix cache must not find any."""
    generator = torch.Generator().manual_seed((run + 1) * 10_000_000 + length * 1000 + batch)
    rows: list[list[int]] = torch.randint(100, 40000, (batch, length), generator=generator).tolist()
    return rows


def ours(stub: Any, rows: list[list[int]], *, new_tokens: int) -> tuple[float, float]:
    """Seconds to the last first token, and from there to the last token, of all rows sent at once."""
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
def theirs(model: Any, rows: list[list[int]], *, new_tokens: int) -> tuple[float, float]:
    """As `ours`, with `generate`: the decode span is a long generation less one of a single token."""
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


def measure(stub: Any, models: dict[str, Any], *, runs: int, new_tokens: int) -> dict[str, Series]:
    """Every shape, all contenders one after the other in each run."""
    table: dict[str, Series] = {f"decode B{batch} P{DECODE_PROMPT}": Series() for batch in BATCHES}
    table[f"prefill B1 P{PREFILL_PROMPT}"] = Series()
    for run in range(-1, runs):  # run -1 warms everything up and is not counted
        for batch in BATCHES:
            rows = prompts(batch, DECODE_PROMPT, run=run)
            series = table[f"decode B{batch} P{DECODE_PROMPT}"] if run >= 0 else Series()
            series.add("muster", batch * (new_tokens - 1) / ours(stub, rows, new_tokens=new_tokens)[1])
            for name, model in models.items():
                series.add(name, batch * (new_tokens - 1) / theirs(model, rows, new_tokens=new_tokens)[1])
        rows = prompts(1, PREFILL_PROMPT, run=run)
        series = table[f"prefill B1 P{PREFILL_PROMPT}"] if run >= 0 else Series()
        series.add("muster", PREFILL_PROMPT / ours(stub, rows, new_tokens=1)[0])
        for name, model in models.items():
            series.add(name, PREFILL_PROMPT / theirs(model, rows, new_tokens=1)[0])
    return table


def render(table: dict[str, Series], names: list[str]) -> Table:
    """Tokens per second, and muster over the faster of the others."""
    out = Table(title=f"tokens/s, medians; {torch.get_num_threads()} threads, torch {torch.__version__}, float32")
    for heading in ("shape", "muster", *names, "ratio"):
        out.add_column(heading, justify="left" if heading == "shape" else "right")
    for shape, series in table.items():
        best = max(series.median(name) for name in names)
        others = [f"{series.median(name):.1f}" for name in names]
        out.add_row(shape, f"{series.median('muster'):.1f}", *others, f"{series.median('muster') / best:.2f}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=48)
    options = parser.parse_args()
    config = "examples/unified.yaml"
    router = subprocess.Popen([*module_command("router"), "--config", config, "--log-level", "WARNING"])
    try:
        models = {
            name: AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation=name).eval()
            for name in ("eager", "sdpa")
        }
        with grpc.insecure_channel("127.0.0.1:30000") as channel:
            wait_until_serving(router, channel)
            stub = inference_pb2_grpc.InferenceStub(channel)
            table = measure(stub, models, runs=options.runs, new_tokens=options.new_tokens)
    finally:
        router.terminate()
        router.wait(timeout=30)
    Console().print(render(table, list(models)))


if __name__ == "__main__":
    main()
