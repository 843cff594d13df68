"""The gate: which experts a row goes to, and with which weights."""

import torch
import torch.nn.functional as F


def choose_experts(logits_TE: torch.Tensor, *, top_k: int, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over experts and the `top_k` largest, which may be renormalised to sum to one (arXiv 2401.04088).

    Returns ids [T, k] (int64) and weights [T, k] in float32.
    """
    weights_TK, ids_TK = torch.topk(F.softmax(logits_TE.float(), dim=-1), top_k, dim=-1)
    if renormalise:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return ids_TK, weights_TK
