"""What a gate is, and what the experts behind it compute, without torch. moe/gate.py and moe/activation.py run them."""

from dataclasses import dataclass
from enum import Enum


class Scoring(Enum):
    """How an expert's logit becomes its score."""

    SOFTMAX = "over all experts"
    SIGMOID = "of each by itself"


class GroupScore(Enum):
    """By what a group of experts is judged."""

    BEST = "its best expert"
    BEST_TWO = "the sum of its two best"


@dataclass(frozen=True, kw_only=True)
class GateSpec:
    """`top_k` of `num_experts`, chosen by score; a chosen expert's weight is its score, `renormalise`d, times `scale`.

    The bias of `has_bias` is part of the logits, so it counts in the weight as well (gpt-oss). The one of
    `has_correction` is added to the scores when experts are chosen, and never to a weight (arXiv 2408.15664). With
    `num_groups` above 1 the experts are that many equal groups in order, of which the best `kept_groups` take part.
    """

    num_experts: int
    top_k: int
    scoring: Scoring
    renormalise: bool
    scale: float = 1.0
    has_bias: bool = False
    has_correction: bool = False
    num_groups: int = 1
    kept_groups: int = 1
    group_score: GroupScore = GroupScore.BEST_TWO


@dataclass(frozen=True, kw_only=True)
class Activation:
    """(up + up_offset) * gate * sigmoid(alpha * gate).

    With a `limit`, gate is cut to at most it and up to between -limit and limit, before anything else.
    """

    alpha: float = 1.0
    up_offset: float = 0.0
    limit: float | None = None


#: silu(gate) * up (arXiv 2002.05202).
SWIGLU = Activation()
