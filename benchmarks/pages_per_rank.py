"""Pages of KV memory per rank against cp, and the longest prompt that a pool of so many ranks takes.

Run: `python -m benchmarks.pages_per_rank`. The real leader plans every chunk, the ranks' own tables count the pages;
nothing is computed, so cp may be larger than the machine.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.exchange_steps import cache_group
from benchmarks.report import Report
from parallel.admission import check_fits
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ReplicaShape
from proto import control_pb2, step_pb2
from worker.engine.leader import Leader
from worker.step.sequence_tables import SequenceTables

#: Of one token in one layer of the dense demo model at float32, and its layers: K and V of 3 heads of 64.
TOKEN_BYTES = 2 * 3 * 64 * 4 * 30
SIZES = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Pages:
    """Pages that each rank holds of a prefilled prompt, and the most that any held more than another on the way."""

    by_rank: Sequence[int]
    widest_gap: int


def hold(prompt_tokens: int, *, cp: int, settings: EngineSettings) -> Pages:
    """Prefills one prompt, the ranks answering each step at once."""
    shape = ReplicaShape(attention=AttentionSizes(cp=cp), experts=None)
    groups = [cache_group()]
    leader = Leader(shape=shape, settings=settings, groups=groups)
    tables = SequenceTables(
        shape=shape,
        coordinates=shape.coordinates(0),
        settings=settings,
        groups=groups,
        device=torch.device("cpu"),
    )
    submit = control_pb2.Submit(request_id=1, prompt_ids=[0] * prompt_tokens, max_new_tokens=1)
    leader.handle(control_pb2.ToReplica(submit=submit))
    counts: list[int] = []
    widest_gap = 0
    while (plans := leader.next_plan()) is not None:
        (plan,) = plans
        counts = tables.apply(plan).groups["full"].seen[-1].tolist()
        widest_gap = max(widest_gap, max(counts) - min(counts))
        slots = [prompt.slot for prompt in plan.prompts if prompt.sample]
        for rank in range(cp):
            drawn = slots if rank == 0 else []
            result = step_pb2.StepResult(
                step_id=plan.step_id, global_rank=rank, slots=drawn, token_ids=[0] * len(drawn)
            )
            leader.handle_result(result)
    return Pages(by_rank=counts, widest_gap=widest_gap)


def longest_prompt(*, cp: int, settings: EngineSettings) -> int:
    """The longest prompt, with one new token, that is not refused: admission counts per coordinate."""
    fits, too_long = 1, 2 * cp * settings.kv_tokens
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        try:
            check_fits(prompt_tokens=middle, max_new_tokens=1, settings=settings, cp=cp)
            fits = middle
        except ValueError:
            too_long = middle
    return fits


def report(lengths: Sequence[int], *, settings: EngineSettings) -> None:
    """The table and the plot."""
    page = Report(
        "pages_per_rank",
        title="Pages per rank against cp",
        about=f"One prompt in chunks of {settings.max_batch_tokens} tokens, page size {settings.page_size}, counted in "
        f"each rank's page tables; the dense demo model at float32, so a page is "
        f"{TOKEN_BYTES * settings.page_size / 1e6:.2f} MB over its 30 layers. `longest prompt` is what admission takes "
        f"at kv_tokens {settings.kv_tokens} a rank.",
        headings=(
            *("prompt", "cp", "fullest rank", "emptiest", "pages / cp", "of cp 1", "ideal", "MB a rank"),
            *("gap on the way", "longest prompt"),
        ),
    )
    fullest: dict[tuple[int, int], int] = {}
    for tokens in lengths:
        for cp in SIZES:
            pages = hold(tokens, cp=cp, settings=settings)
            fullest[tokens, cp] = most = max(pages.by_rank)
            page.add(
                str(tokens),
                str(cp),
                str(most),
                str(min(pages.by_rank)),
                f"{sum(pages.by_rank) / cp:.1f}",
                f"{most / fullest[tokens, 1]:.3f}",
                f"{1 / cp:.3f}",
                f"{most * settings.page_size * TOKEN_BYTES / 1e6:.1f}",
                str(pages.widest_gap),
                str(longest_prompt(cp=cp, settings=settings)),
            )
    page.note("gap on the way: the most pages that a rank held more than another after any chunk")

    def plot(axes: Any) -> None:
        for tokens in lengths:
            axes.plot(SIZES, [fullest[tokens, cp] for cp in SIZES], marker="o", label=f"{tokens} tokens")
        ideal = [fullest[max(lengths), 1] / cp for cp in SIZES]
        axes.plot(SIZES, ideal, color="grey", linestyle="--", label=f"ideal, {max(lengths)} tokens")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(SIZES, [str(cp) for cp in SIZES])
        axes.set_xlabel("cp")
        axes.set_ylabel("pages on the fullest rank")
        axes.legend()

    page.publish(plot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[100, 1001, 8100])
    parser.add_argument("--chunk-tokens", type=int, default=2048)
    parser.add_argument("--page-size", type=int, default=16)
    options = parser.parse_args()
    settings = EngineSettings(page_size=options.page_size, max_batch_tokens=options.chunk_tokens)
    report(options.tokens, settings=settings)


if __name__ == "__main__":
    main()
