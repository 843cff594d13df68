"""`python -m tests.sweep.mutants [NAME ...]`: breaks one line at a time and shows that the sweep fails each time.

Each mutant is a copy of the source tree with one replacement. It first has to change the result of a single layer, in a
pair that meets the broken line; then the spread of pairs runs until one fails. A mutant that lives exits with 1. A copy
without any replacement has to pass the same pairs before, so that nothing but the broken line can fail them.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.sweep.pairs import parse_pair

ROOT = Path(__file__).resolve().parents[2]
_FOLDERS = ("native", "proto", "parallel", "attention", "moe", "worker", "router", "tests", "examples", "benchmarks")
_TIMEOUT_S = 1800


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """`before`, found once in the file `path`, becomes `after`; `pair` is a layout that meets it."""

    name: str
    path: str
    before: str
    after: str
    pair: str

    @property
    def num_layers(self) -> int:
        """Of the model that shows it alone: one, or one a stage."""
        return max(shape.pp for shape in parse_pair(self.pair).shapes)


MUTANTS = (
    Mutant(
        name="a segment computed by another rank than its pages' owner",
        path="parallel/chunk.py",
        before="Segments(cp_rank=owner[begins],",
        after="Segments(cp_rank=np.roll(owner[begins], 1),",
        pair="llama prefill=cp2 decode=1",
    ),
    Mutant(
        name="a segment that begins a page late",
        path="parallel/chunk.py",
        before="starts = (first_page + begins) * page_size",
        after="starts = (first_page + begins + (begins > 0)) * page_size",
        pair="llama prefill=cp2 decode=1",
    ),
    Mutant(
        name="log-sum-exp of the merge",
        path="attention/merging.py",
        before="weights = (lses - shift).exp()",
        after="weights = (lses - shift).exp2()",
        pair="llama unified=cp2 exchange=pass_q",
    ),
    Mutant(
        name="a group's ranks",
        path="parallel/shape.py",
        before='return self.expert_mesh, ("moe_ep", "moe_tp")',
        after='return self.expert_mesh, ("moe_dp", "moe_tp")',
        pair="mixtral unified=dp4.moe_dp2.ep2",
    ),
    Mutant(
        name="an expert's owner",
        path="parallel/expert_table.py",
        before="found[expert].append(slot)",
        after="found[23 - expert if expert in (11, 12) else expert].append(slot)",
        pair="mixtral unified=dp2.ep2",
    ),
    Mutant(
        name="a gate weight's place",
        path="moe/gate.py",
        before="rows.weights[:num_rows] = weights",
        after="rows.weights[:num_rows] = weights.flip(1)",
        pair="mixtral unified=dp2.ep2 kernels=torch",
    ),
    Mutant(
        name="a gate weight's place in the native gate",
        path="native/src/gate.cpp",
        before="weights[at] = (gate.renorm",
        after="weights[gate.top_k - 1 - at] = (gate.renorm",
        pair="mixtral unified=dp2.ep2 kernels=native",
    ),
    Mutant(
        name="the correction of a choice as a weight",
        path="moe/gate.py",
        before="weights_TK = scores_TE.gather(1, ids_TK)",
        after="weights_TK = choice_TE.gather(1, ids_TK)",
        pair="glm4_moe unified=pp2 kernels=torch",
    ),
    Mutant(
        name="the correction of a choice as a weight in the native gate",
        path="native/src/gate.cpp",
        before="? logits[expert] / (sum + 1e-20f)",
        after="? choice.values[expert] / (sum + 1e-20f)",
        pair="glm4_moe unified=pp2 kernels=native",
    ),
    Mutant(
        name="a copy of the hand-off",
        path="parallel/handoff.py",
        before="num_tokens=np.diff(starts, append=end),",
        after="num_tokens=np.maximum(np.diff(starts, append=end) - 1, 1),",
        pair="llama prefill=1 decode=1 pages=8.4",
    ),
    Mutant(
        name="a page's owner in decode",
        path="worker/engine/group_pages.py",
        before="cp_ranks=packed(holding.cp_ranks)",
        after="cp_ranks=packed(holding.cp_ranks[:1] * len(holding.cp_ranks))",
        pair="llama prefill=1 decode=cp2",
    ),
    Mutant(
        name="keys seen of another coordinate",
        path="attention/exchange/rows.py",
        before="kv_len=(self.seen[:, cp_rank] - skipped) * self.page_size - tail,",
        after="kv_len=np.maximum(self.seen[:, cp_rank] - skipped - (~is_owner), 0) * self.page_size - tail,",
        pair="llama unified=cp2 exchange=ring",
    ),
    Mutant(
        name="a tp rank's vocabulary",
        path="worker/blocks/vocabulary.py",
        before="- self._tp.index * size",
        after="- (self._tp.size - 1 - self._tp.index) * size",
        pair="llama unified=tp2",
    ),
    Mutant(
        name="a rank's part of a shared output",
        path="parallel/model_share.py",
        before="parts=len(ranks), index=ranks.index(self.coordinates.global_rank)",
        after="parts=len(ranks), index=ranks[::-1].index(self.coordinates.global_rank)",
        pair="llama unified=dp2",
    ),
    Mutant(
        name="draws that the plan does not count",
        path="worker/engine/chunk_planner.py",
        before="step.rows[home] = step.draws[home] = len(slots) - others",
        after="step.rows[home], step.draws[home] = len(slots) - others, min(len(slots) - others, 1)",
        pair="llama unified=dp2",
    ),
    Mutant(
        name="a token on its way to the first stage",
        path="worker/step/slot_tokens.py",
        before="self._tokens[[slots[index] for index in kept]] = message[kept]",
        after="self._tokens[[slots[index] for index in kept]] = message[kept].flip(0)",
        pair="llama unified=pp2",
    ),
    Mutant(
        name="a window one too wide",
        path="attention/torch_kernel/short_rows.py",
        before="np.maximum(visible - window, 0), 0)",
        after="np.maximum(visible - window - 1, 0), 0)",
        pair="gpt_oss unified=1 kernels=torch",
    ),
    Mutant(
        name="a window one too wide in the native kernel",
        path="native/src/attention.cpp",
        before="std::max<int64_t>(end - shape.window, 0)",
        after="std::max<int64_t>(end - shape.window - 1, 0)",
        pair="gpt_oss unified=1 kernels=native",
    ),
    Mutant(
        name="a page border",
        path="native/src/attention.cpp",
        before="std::min(shape.page_size - offset, block.count - at)",
        after="std::min(shape.page_size - offset + 1, block.count - at)",
        pair="llama unified=1 kernels=native",
    ),
    Mutant(
        name="the last partial vector of a product",
        path="native/src/product.h",
        before="store_part(y + at + kLanes, right, count - kLanes);",
        after="store_part(y + at + kLanes, right, (count - kLanes) / kLanes * kLanes);",
        pair="mixtral unified=1 kernels=native",
    ),
    Mutant(
        name="an expert's visit",
        path="native/src/experts.cpp",
        before="width + choices + at % choices]);",
        after="width + choices]);",
        pair="mixtral unified=1 kernels=native",
    ),
    Mutant(
        name="a window one too wide in a long chunk",
        path="attention/torch_kernel/block_rows.py",
        before="hidden = (keys > own) | (keys <= own - self.spec.window)",
        after="hidden = (keys > own) | (keys < own - self.spec.window)",
        pair="gpt_oss unified=1",
    ),
    Mutant(
        name="a window's page freed while it is seen",
        path="worker/engine/pages.py",
        before="group.release_before(request_id, group.first_seen(end))",
        after="group.release_before(request_id, group.first_seen(end) + 1)",
        pair="gpt_oss prefill=1 decode=1 pages=8.4",
    ),
    Mutant(
        name="a plane's stride",
        path="parallel/storage.py",
        before="head_stride=page_size * position_stride,",
        after="head_stride=(page_size - 1) * position_stride,",
        pair="llama unified=1",
    ),
    Mutant(
        name="a sink counted once per coordinate",
        path="worker/blocks/attention.py",
        before="torch.sigmoid(lse_TH - sinks_H)",
        after="torch.sigmoid(lse_TH - sinks_H - 0.6931)",
        pair="gpt_oss unified=cp2",
    ),
    Mutant(
        name="a home's row stored at home, whoever owns the page",
        path="worker/step/sequence_tables.py",
        before="stored_by=padded(stored_by, self._cp_rank),",
        after="stored_by=padded(segments.computed_by, self._cp_rank),",
        pair="llama prefill=1 decode=cp2",
    ),
)


def main() -> None:
    """Runs the mutants named, or all."""
    chosen = [mutant for mutant in MUTANTS if not sys.argv[1:] or mutant.name in sys.argv[1:]]
    for num_layers in sorted({mutant.num_layers for mutant in chosen}):
        check_control([mutant.pair for mutant in chosen if mutant.num_layers == num_layers], num_layers=num_layers)
    alive = [mutant.name for mutant in chosen if not is_killed(mutant)]
    print(f"{len(chosen) - len(alive)} of {len(chosen)} mutants were found" + f"; alive: {alive}" * bool(alive))
    sys.exit(bool(alive))


def is_killed(mutant: Mutant) -> bool:
    """Whether a single layer shows the mutant, and the sweep fails on it."""
    with tempfile.TemporaryDirectory() as folder:
        plant(mutant, Path(folder))
        single = failure_of(Path(folder), "--layers", str(mutant.num_layers), mutant.pair)
        swept = failure_of(Path(folder), "--spread")
    for what, said in (("single layer", single), ("sweep", swept)):
        print(f"{mutant.name}: {what}: {said or 'NOT FOUND'}", flush=True)
    return bool(single and swept)


def check_control(pairs: Sequence[str], *, num_layers: int) -> None:
    """AssertionError where a copy of the tree fails one of `pairs` with nothing broken."""
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        said = failure_of(Path(folder), "--layers", str(num_layers), *pairs)
        assert not said, f"the tree fails without any mutant: {said}"


def copy_tree(folder: Path) -> None:
    """Copies what a sweep runs from to `folder`."""
    for name in _FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


def plant(mutant: Mutant, folder: Path) -> None:
    """Copies the tree to `folder` with the mutant's line broken; AssertionError where it is not there once."""
    copy_tree(folder)
    replace_once(folder / mutant.path, before=mutant.before, after=mutant.after)


def replace_once(path: Path, *, before: str, after: str) -> None:
    """Writes `after` in the place of `before`; AssertionError where that is not once in the file `path`."""
    text = path.read_text()
    count = text.count(before)
    assert count == 1, f"{before!r} is {count} times in {path}"
    path.write_text(text.replace(before, after))


def failure_of(folder: Path, *arguments: str) -> str:
    """The pair that the sweep in `folder` fails with; empty where all pass. AssertionError where it does not run."""
    started = time.monotonic()
    command = [sys.executable, "-m", "tests.sweep", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode == 0:
        return ""
    failure = next((line for line in done.stdout.splitlines() if "FAILS" in line), "")
    assert failure, f"the sweep did not run: {done.stderr[-1000:]}"
    return f"{failure} [{time.monotonic() - started:.0f} s]"


if __name__ == "__main__":
    main()
