"""The gate: which experts a row goes to, and with which weights. One function for every family's."""

from typing import Protocol

import torch
import torch.nn.functional as F

from moe.linear import RowOperation
from moe.routed_rows import NO_SLOT, RoutedRows, RowFormat
from moe.slots import SlotMap
from parallel.models.gates import GateSpec, GroupScore, Scoring


class Gate(Protocol):
    """The gate of one layer, the norm before it included."""

    def __call__(self, x_TH: torch.Tensor, *, first_row: int, padded_rows: int) -> RoutedRows:
        """Rows x [T, H] of the residual, which are `first_row` and following of the block, to padded_rows messages."""
        ...


class TorchGate:
    """See Gate. The product is made in float32: what it rounds decides where a whole row goes."""

    def __init__(
        self,
        spec: GateSpec,
        *,
        norm: RowOperation,
        logits: RowOperation,
        correction_E: torch.Tensor | None,
        slots: SlotMap,
    ) -> None:
        """`logits` is the product with float32 weights, its bias included; `correction_E` float32 [E]."""
        assert (correction_E is not None) == spec.has_correction
        self._spec = spec
        self._norm = norm
        self._logits = logits
        self._correction_E = correction_E
        self._slots = slots

    def __call__(self, x_TH: torch.Tensor, *, first_row: int, padded_rows: int) -> RoutedRows:
        """See Gate."""
        normed_TH, num_rows = self._norm(x_TH), x_TH.shape[0]
        ids, weights = choose_experts(self._logits(normed_TH.float()), spec=self._spec, correction_E=self._correction_E)
        form = RowFormat(hidden_size=x_TH.shape[1], dtype=x_TH.dtype, top_k=self._spec.top_k)
        rows = form.empty(padded_rows, device=x_TH.device)
        rows.x[:num_rows] = normed_TH
        rows.slots[:num_rows] = self._slots.choose(ids, first_row=first_row)
        rows.slots[num_rows:] = NO_SLOT
        rows.weights[:num_rows] = weights
        return rows


def choose_experts(
    logits_TE: torch.Tensor, *, spec: GateSpec, correction_E: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each row and their weights (see GateSpec): ids [T, k] (int64), weights [T, k] in float32.

    A softmax over the chosen logits alone, as gpt-oss has it, is the softmax over all, renormalised.
    """
    logits_TE = logits_TE.float()
    scores_TE = logits_TE.sigmoid() if spec.scoring is Scoring.SIGMOID else F.softmax(logits_TE, dim=-1)
    choice_TE = scores_TE if correction_E is None else scores_TE + correction_E
    if spec.kept_groups < spec.num_groups:
        choice_TE = _without_other_groups(choice_TE, spec=spec)
    ids_TK = choice_TE.topk(spec.top_k, dim=-1).indices
    weights_TK = scores_TE.gather(1, ids_TK)
    if spec.renormalise:
        # Sigmoids may all be next to nothing; a softmax's best k are never so small that this changes them.
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return ids_TK, weights_TK * spec.scale


def _without_other_groups(choice_TE: torch.Tensor, *, spec: GateSpec) -> torch.Tensor:
    """What experts are chosen by, -inf in all groups but the best: a correction may make any number a good one."""
    choice_TGE: torch.Tensor = choice_TE.unflatten(1, (spec.num_groups, -1))
    best = choice_TGE.topk(1 if spec.group_score is GroupScore.BEST else 2, dim=-1).values
    kept = best.sum(dim=-1).topk(spec.kept_groups, dim=-1).indices
    is_other = torch.ones(choice_TGE.shape[:2], dtype=torch.bool, device=choice_TE.device).scatter_(1, kept, False)
    return choice_TGE.masked_fill(is_other.unsqueeze(2), float("-inf")).flatten(1)
