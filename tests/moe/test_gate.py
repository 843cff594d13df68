"""The gate against its definition in plain loops, for every combination that a description can ask for."""

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config, Glm4MoeConfig, GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moe.gate import TorchGate, choose_experts
from moe.routed_rows import NO_SLOT
from moe.slots import SlotMap
from parallel.expert_table import expert_table
from parallel.models.gates import GateSpec, GroupScore, Scoring
from worker.kernels.torch_kernels import PlainLinear

NUM_EXPERTS, TOP_K, HIDDEN, ROWS = 12, 3, 10, 40
#: Groups, and how many of them are kept.
GROUPS = ((1, 1), (4, 1), (4, 2), (4, 4), (3, 2), (2, 1), (6, 2))
SPECS = [
    GateSpec(
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        scoring=scoring,
        renormalise=renormalise,
        scale=scale,
        has_correction=has_correction,
        num_groups=groups[0],
        kept_groups=groups[1],
        group_score=group_score,
    )
    for scoring, renormalise, scale, has_correction, groups, group_score in product(
        Scoring, (True, False), (1.0, 2.5), (True, False), GROUPS, GroupScore
    )
    if groups[1] * (NUM_EXPERTS // groups[0]) >= TOP_K
]


def reference(logits: list[float], spec: GateSpec, correction: list[float]) -> dict[int, float]:
    """The experts of one row with their weights, by the definition."""
    if spec.scoring is Scoring.SIGMOID:
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    else:
        total = sum(math.exp(logit) for logit in logits)
        scores = [math.exp(logit) / total for logit in logits]
    choice = [score + added for score, added in zip(scores, correction, strict=True)]
    size, judged = spec.num_experts // spec.num_groups, 1 if spec.group_score is GroupScore.BEST else 2
    groups = [range(first, first + size) for first in range(0, spec.num_experts, size)]
    groups.sort(key=lambda group: -sum(sorted((choice[index] for index in group), reverse=True)[:judged]))
    allowed = [index for group in groups[: spec.kept_groups] for index in group]
    chosen = sorted(allowed, key=lambda index: -choice[index])[: spec.top_k]
    total = sum(scores[index] for index in chosen) + 1e-20 if spec.renormalise else 1.0
    return {index: scores[index] / total * spec.scale for index in chosen}


def by_expert(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weights [T, E] of all experts: the order in which a gate names its choice says nothing."""
    assert all(len(set(row)) == len(row) for row in ids.tolist()), "an expert is chosen once"
    return torch.zeros(len(ids), NUM_EXPERTS).scatter_(1, ids, weights.float())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_gate_chooses_and_weighs_as_its_definition_says(spec: GateSpec) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(ROWS, NUM_EXPERTS, generator=generator) * 2
    correction = torch.randn(NUM_EXPERTS, generator=generator) * spec.has_correction
    ids, weights = choose_experts(logits, spec=spec, correction_E=correction if spec.has_correction else None)
    assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
    expected = torch.zeros(ROWS, NUM_EXPERTS)
    for row in range(ROWS):
        for index, weight in reference(logits[row].tolist(), spec, correction.tolist()).items():
            expected[row, index] = weight
    torch.testing.assert_close(by_expert(ids, weights), expected, rtol=1e-5, atol=1e-7)


def test_a_correction_below_every_score_still_never_chooses_outside_the_kept_groups() -> None:
    spec = GateSpec(
        num_experts=4,
        top_k=2,
        scoring=Scoring.SIGMOID,
        renormalise=True,
        has_correction=True,
        num_groups=2,
        kept_groups=1,
    )
    ids, _ = choose_experts(torch.tensor([[9.0, 9.0, 1.0, 1.0]]), spec=spec, correction_E=torch.full((4,), -20.0))
    assert sorted(ids[0].tolist()) == [0, 1]


def test_sigmoids_that_are_next_to_nothing_renormalise_to_no_more_than_they_are_worth() -> None:
    spec = GateSpec(num_experts=4, top_k=2, scoring=Scoring.SIGMOID, renormalise=True)
    _, weights = choose_experts(torch.full((1, 4), -200.0), spec=spec)
    assert torch.equal(weights, torch.zeros(1, 2))


def _spec(**values: object) -> GateSpec:
    defaults: dict[str, object] = {"num_experts": NUM_EXPERTS, "top_k": TOP_K, "scoring": Scoring.SOFTMAX}
    return GateSpec(**{**defaults, **values})  # type: ignore[arg-type]


_GROUPED = {"n_routed_experts": NUM_EXPERTS, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5}
_COUNTS = {"hidden_size": HIDDEN, "num_experts_per_tok": TOP_K}
_DEEP = _spec(scoring=Scoring.SIGMOID, renormalise=True, scale=1.5, has_correction=True, num_groups=4, kept_groups=2)
#: transformers' own gates of each family, and the description of the same.
ROUTERS: dict[str, tuple[Callable[[], nn.Module], GateSpec]] = {
    "glm4_moe": (lambda: Glm4MoeTopkRouter(Glm4MoeConfig(**_COUNTS, **_GROUPED)), _DEEP),
    "deepseek_v3": (lambda: DeepseekV3TopkRouter(DeepseekV3Config(**_COUNTS, **_GROUPED)), _DEEP),
    "gpt_oss": (
        lambda: GptOssTopKRouter(GptOssConfig(**_COUNTS, num_local_experts=NUM_EXPERTS)),
        _spec(renormalise=True, has_bias=True),
    ),
    "mixtral": (
        lambda: MixtralTopKRouter(MixtralConfig(**_COUNTS, num_local_experts=NUM_EXPERTS)),
        _spec(renormalise=True),
    ),
    "qwen3_moe": (
        lambda: Qwen3MoeTopKRouter(Qwen3MoeConfig(**_COUNTS, num_experts=NUM_EXPERTS, norm_topk_prob=False)),
        _spec(renormalise=False),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("family", ROUTERS)
def test_a_gate_is_that_of_transformers(family: str) -> None:
    make, spec = ROUTERS[family]
    torch.manual_seed(7)
    router = make()
    drawn = {name: torch.randn_like(value) for name, value in router.state_dict().items()}
    router.load_state_dict(drawn)
    x = torch.randn(ROWS, HIDDEN)
    _, weights, ids = router(x)
    gate = TorchGate(
        spec,
        norm=lambda rows: rows,
        logits=PlainLinear(drawn["weight"], drawn.get("bias")),
        correction_E=drawn.get("e_score_correction_bias"),
        slots=SlotMap(expert_table(num_experts=NUM_EXPERTS, ep=1, placement=()), device=torch.device("cpu")),
    )
    rows = gate(x, first_row=0, padded_rows=ROWS + 2)
    found = by_expert(rows.slots[:ROWS].long(), rows.weights[:ROWS])
    torch.testing.assert_close(found, by_expert(ids, weights), rtol=1e-5, atol=1e-7)
    assert torch.equal(rows.x[:ROWS], x) and (rows.slots[ROWS:] == NO_SLOT).all()
