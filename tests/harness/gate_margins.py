"""How clearly an oracle's gates choose: near a tie, rounding may send a row to another expert, and logits differ."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from parallel.models.gates import GateSpec, GroupScore, Scoring
from parallel.models.registry import describe_checkpoint
from tests.harness.checkpoints import Oracle


def least_margin(oracle: Oracle, sequences: Iterable[Sequence[int]]) -> float:
    """The least distance between the last that a gate chose and the first that it did not, expert or group.

    Over all rows of `sequences`, in all layers, in sigmoids or, under a softmax, in logits.
    """
    experts = describe_checkpoint(oracle.folder).experts
    assert experts is not None
    margins: list[float] = []

    def see(module: Any, args: Any, output: Any) -> None:
        correction = getattr(module, "e_score_correction_bias", torch.zeros(experts.num_experts))
        margins.append(_margin(output[0].float(), experts.gate, correction))

    hooks = [gate.register_forward_hook(see) for gate in oracle.gates()]
    assert len(hooks) == len(experts.layers)
    for sequence in sequences:
        oracle.run(sequence)
    for hook in hooks:
        hook.remove()
    return min(margins)


def _margin(logits_TE: torch.Tensor, spec: GateSpec, correction_E: torch.Tensor) -> float:
    # Of small probabilities a small distance may be a large one of logits: there those are compared themselves.
    choice = logits_TE.sigmoid() + correction_E if spec.scoring is Scoring.SIGMOID else logits_TE
    groups = choice.unflatten(1, (spec.num_groups, -1)).sort(dim=-1, descending=True).values
    judged = groups[..., : 1 if spec.group_score is GroupScore.BEST else 2].sum(-1)
    least = _gap(judged, spec.kept_groups) if spec.kept_groups < spec.num_groups else float("inf")
    kept = judged >= judged.sort(dim=-1, descending=True).values[:, spec.kept_groups - 1, None]
    allowed = choice.masked_fill(~kept.repeat_interleave(spec.num_experts // spec.num_groups, dim=1), float("-inf"))
    return min(least, _gap(allowed, spec.top_k))


def _gap(values: torch.Tensor, count: int) -> float:
    """Between the `count`-th largest of each row and the next: the least."""
    ordered = values.sort(dim=-1, descending=True).values
    return float((ordered[:, count - 1] - ordered[:, count]).min())
