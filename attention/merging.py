"""Merging attention over disjoint parts of the KV by their log-sum-exps, in torch. Natural logarithms.

With s_i the log-sum-exp of part i, softmax over the whole is the parts' outputs weighted by exp(s_i - s), where
s = log Σ exp(s_i): "Online normalizer calculation for softmax", arXiv 1805.02867; "FlashInfer", arXiv 2501.01005, §2.2.
"""

import torch


def merge_partials(outputs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges outputs [S, ..., D] with log-sum-exps [S, ...] into [..., D] and [...]; S is at least 1.

    A part that saw nothing has -inf and zeros; where all have, so has the result.
    """
    largest = lses.amax(dim=0)
    # Not -inf as the subtrahend: (-inf) - (-inf) is NaN.
    shift = torch.where(largest.isneginf(), 0.0, largest)
    weights = (lses - shift).exp()
    total = weights.sum(dim=0)
    shares = weights / total.clamp_min(torch.finfo(total.dtype).tiny)
    merged = (outputs * shares.unsqueeze(-1)).sum(dim=0)
    return merged.to(outputs.dtype), shift + total.log()


def merge_pair(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges two (output [..., D], log-sum-exp [...]) that both saw something: without -inf no guard is needed."""
    (output_a, lse_a), (output_b, lse_b) = first, second
    share_b = torch.sigmoid(lse_b - lse_a).to(output_a.dtype).unsqueeze(-1)
    return torch.lerp(output_a, output_b, share_b), torch.logaddexp(lse_a, lse_b)
