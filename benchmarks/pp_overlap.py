"""Pipeline stages with and without overlap: pp 2 over pp 1, one thread a rank, on the dense demo checkpoint.

Run: `python -m benchmarks.pp_overlap` after `make demo-model`. Without overlap one step runs at a time: a prompt that
is one chunk, or a batch of decode that goes through the stages whole. With overlap the prompt is several chunks, or the
batch is in two parts, so that a step is on each stage. What prefills is up at once and measured in turn; then decode.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.bench import LivePools, running_bench
from benchmarks.pools import DENSE, cpu_share, greedy, interleaved, pool
from benchmarks.report import Report
from parallel.models.registry import describe_checkpoint
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ReplicaShape
from parallel.sharding import stage_layers

DECODE_PROMPT = 16


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The ranks: `pp` stages, or `dp` whole models side by side. The new tokens of a step, and the pool: one of
    `prefill` has a decode rank beside it. How decode goes through the stages.
    """

    pp: int = 1
    dp: int = 1
    chunk_tokens: int
    pool: str
    pipeline: str = "auto"


@dataclass(frozen=True, kw_only=True)
class Work:
    """`batch` sequences of `prompt_tokens`; prefill is measured where they have one new token, else decode."""

    name: str
    prompt_tokens: int
    new_tokens: int
    batch: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Tokens/s, the first stage's share of step time in collectives, and the share in which a rank had no core."""

    tokens_per_s: float
    tokens_per_cpu_s: float
    collective: float
    waited: float


Samples = dict[tuple[Work, Layout], list[Sample]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the result: what runs where, and what it is compared with.

    A prompt in `steps` chunks fills and drains the pipeline once. Decode can do no better than the best of `bounds`:
    one rank with the whole batch, as whole batches keep one stage at work; and two ranks that each have all weights and
    half of the batch, as parts keep both at work and read every weight for each.
    """

    work: Work
    layout: Layout
    label: str
    base: tuple[Work, Layout]
    steps: int = 1
    bounds: tuple[tuple[Work, Layout], ...] = ()


def prefill_rows(*, prompt_tokens: int, chunk_tokens: int) -> list[Row]:
    """A prompt whole and in chunks, each on one stage and on two."""
    work = Work(name=f"prefill of {prompt_tokens}", prompt_tokens=prompt_tokens, new_tokens=1, batch=1)
    found = []
    for size in (prompt_tokens, chunk_tokens):
        steps = -(-prompt_tokens // size)
        one, two = (Layout(pp=pp, chunk_tokens=size, pool="prefill") for pp in (1, 2))
        chunks, how = ("1 chunk", "no overlap") if steps == 1 else (f"{steps} chunks", "overlap")
        found.append(Row(work=work, layout=one, label=f"pp 1, {chunks}", base=(work, one)))
        found.append(Row(work=work, layout=two, label=f"pp 2, {chunks}, {how}", base=(work, one), steps=steps))
    return found


def decode_rows(*, chunk_tokens: int, new_tokens: int, batches: Sequence[int]) -> list[Row]:
    """Batches on one rank, on two side by side, and on two stages: whole, in parts, and as the leader chooses."""
    one, side = (Layout(dp=dp, chunk_tokens=chunk_tokens, pool="unified") for dp in (1, 2))
    found = []
    for batch in batches:
        work = Work(name=f"decode of {batch}", prompt_tokens=DECODE_PROMPT, new_tokens=new_tokens, batch=batch)
        base = work, one
        found.append(Row(work=work, layout=one, label="pp 1", base=base))
        pipelines, bounds = ["auto"], [base]
        if batch > 1:
            found.append(Row(work=work, layout=side, label=f"pp 1 twice, {batch // 2} on each", base=base))
            pipelines, bounds = ["whole", "parts", "auto"], [base, (work, side)]
        for pipeline in pipelines:
            two = Layout(pp=2, chunk_tokens=chunk_tokens, pool="unified", pipeline=pipeline)
            found.append(Row(work=work, layout=two, label=f"pp 2, {pipeline}", base=base, bounds=tuple(bounds)))
    return found


@contextmanager
def running(layouts: Sequence[Layout]) -> Iterator[dict[Layout, LivePools]]:
    """All layouts, up."""
    with ExitStack() as stack:
        found = {}
        for layout in layouts:
            bench = stack.enter_context(running_bench(num_devices=layout.pp * layout.dp + 1, model=str(DENSE)))
            engine = EngineSettings(
                prefix_cache=False,
                max_batch_tokens=layout.chunk_tokens,
                kv_tokens=8192,
                step_timeout_s=600,
                pipeline=layout.pipeline,
            )
            specs = [pool(layout.pool, engine, pp=layout.pp, dp=layout.dp)]
            if layout.pool == "prefill":
                specs.append(pool("decode", engine))
            found[layout] = stack.enter_context(bench.pools(specs, model=str(DENSE)))
        yield found


def measure(pools: LivePools, work: Work, *, seed: int) -> Sample:
    """One batch at once: prefill until the last first token, decode from each sequence's first token on."""
    before = pools.load(pools.entry_pool)
    with cpu_share(pools.launcher_pid) as share:
        generations = pools.generate(
            [greedy(work.prompt_tokens, seed=seed + index, new_tokens=work.new_tokens) for index in range(work.batch)]
        )
    after = pools.load(pools.entry_pool)
    clocks = [generation.clock for generation in generations]
    if work.new_tokens == 1:
        rate = work.batch * work.prompt_tokens / max(clock.first_token_s for clock in clocks)
    else:
        rate = sum((work.new_tokens - 1) / (clock.last_token_s - clock.first_token_s) for clock in clocks)
    return Sample(
        tokens_per_s=rate,
        tokens_per_cpu_s=work.batch * (work.prompt_tokens + work.new_tokens) / share.busiest_cpu_s,
        collective=(after.collective_s - before.collective_s) / (after.step_s - before.step_s),
        waited=share.longest_wait_s / max(clock.last_token_s for clock in clocks),
    )


def run(found: Sequence[Row], *, runs: int) -> Samples:
    """Every row in each run, after one unmeasured prompt on each layout."""
    samples: Samples = defaultdict(list)
    with running(list(dict.fromkeys(row.layout for row in found))) as layouts:
        for pools in layouts.values():
            measure(pools, Work(name="warm-up", prompt_tokens=300, new_tokens=4, batch=2), seed=0)
        by_label = {f"{row.work.name} {row.label}": row for row in found}

        def one(label: str, index: int) -> None:
            row = by_label[label]
            seed = 1000 * (index + 1)
            samples[row.work, row.layout].append(measure(layouts[row.layout], row.work, seed=seed))

        interleaved(list(by_label), runs=runs, measure=one)
    return samples


def median(samples: Samples, key: tuple[Work, Layout], *, of: str) -> float:
    """The median over the runs of one field of Sample."""
    values: list[float] = [getattr(sample, of) for sample in samples[key]]
    return statistics.median(values)


def ratio(samples: Samples, row: Row, *, of: str) -> float:
    """The row's figure over that of one stage."""
    return median(samples, (row.work, row.layout), of=of) / median(samples, row.base, of=of)


def bound(samples: Samples, row: Row) -> float:
    """What two stages could reach of one: 2n / (n + 1) for n equal chunks; in decode the best of what bounds it."""
    if not row.bounds:
        return 2 * row.steps / (row.steps + 1)
    best = max(median(samples, key, of="tokens_per_s") for key in row.bounds)
    return best / median(samples, row.base, of="tokens_per_s")


def report(found: Sequence[Row], samples: Samples, *, new_tokens: int, runs: int) -> None:
    """The table and the plot."""
    page = Report(
        "pp_overlap",
        title="Pipeline stages with and without overlap",
        about="The dense demo checkpoint on one rank and on two stages, one thread a rank; prefill of one prompt, and "
        f"decode of {new_tokens} tokens after prompts of {DECODE_PROMPT}; medians of {runs} interleaved runs. A prompt "
        "that is one chunk has nothing to overlap; the bound of n equal chunks is 2n / (n + 1). A batch of decode goes "
        "through the stages *whole*, and one of them works at a time, or in two *parts*, and each part reads all "
        "weights again; *auto* is what the leader chooses. No better can be had than the faster of *pp 1* (one rank "
        "works at a time on the whole batch) and *pp 1 twice* (two ranks at once, each with all weights and half of "
        "the batch: the memory is shared by two cores as it is by two stages): that is the bound of decode. *By CPU* "
        "compares tokens a CPU second of the busier rank: as if nobody ever waited.",
        headings=("work", "layout", "tokens/s", "over pp 1", "bound", "of bound", "by CPU", "coll.", "waited"),
    )
    for row in found:
        key, over = (row.work, row.layout), ratio(samples, row, of="tokens_per_s")
        most = bound(samples, row) if row.layout.pp == 2 else None
        page.add(
            row.work.name,
            row.label,
            f"{median(samples, key, of='tokens_per_s'):.1f}",
            f"{over:.2f}",
            *(("", "") if most is None else (f"{most:.2f}", f"{over / most:.2f}")),
            f"{ratio(samples, row, of='tokens_per_cpu_s'):.2f}",
            f"{median(samples, key, of='collective'):.0%}",
            f"{median(samples, key, of='waited'):.0%}",
        )
    decode, prompts = (_stage_sizes(draws_every_token=value) for value in (True, False))
    page.note(
        f"the stages of decode have {decode[0]} and {decode[1]} layers, even in the weights that a step reads, the "
        f"output's on the last included; those of the prefill pool, where a prompt needs it once, {prompts[0]} and "
        f"{prompts[1]}"
    )
    page.note("coll.: the share of the first stage's step time in which it waited for the other stage or for sends")
    page.note("waited: the share of time in which a rank could have run but other work had the cores")

    def plot(axes: Any) -> None:
        shown = [row for row in found if row.layout.pp == 2]
        names = [f"{row.work.name}\n{row.label.removeprefix('pp 2, ')}" for row in shown]
        axes.bar(names, [ratio(samples, row, of="tokens_per_s") for row in shown], label="pp 2 over pp 1")
        reachable = [bound(samples, row) for row in shown]
        axes.scatter(names, reachable, color="black", marker="_", s=200, label="bound")
        axes.tick_params(axis="x", labelsize=5, labelrotation=60)
        axes.set_ylim(0, 2.4)
        axes.set_ylabel("tokens/s over pp 1")
        axes.legend()

    page.publish(plot)


def _stage_sizes(*, draws_every_token: bool) -> list[int]:
    """Layers of each of two stages."""
    shape = ReplicaShape(pp=2, attention=AttentionSizes(), experts=None, draws_every_token=draws_every_token)
    return [len(stage_layers(describe_checkpoint(DENSE), shape=shape, pp_rank=rank)) for rank in range(2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048, help="of the prefilled prompt")
    parser.add_argument("--chunk-tokens", type=int, default=256, help="of a step with overlap")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="of decode")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    prefill = prefill_rows(prompt_tokens=options.tokens, chunk_tokens=options.chunk_tokens)
    decode = decode_rows(
        chunk_tokens=options.chunk_tokens, new_tokens=options.new_tokens, batches=sorted(options.batches)
    )
    samples = run(prefill, runs=options.runs) | run(decode, runs=options.runs)
    report([*prefill, *decode], samples, new_tokens=options.new_tokens, runs=options.runs)


if __name__ == "__main__":
    main()
