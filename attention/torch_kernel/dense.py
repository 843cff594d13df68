"""Attention of query rows over contiguous K and V with its log-sum-exp: torch's fused CPU kernel, or plain softmax.

Shapes: H KV heads, G query heads of a KV head, T rows, L positions, D head size.
"""

import math

import torch

State = tuple[torch.Tensor, torch.Tensor]
"""An output [H, G, T, D] in the dtype of q, and its natural log-sum-exp [H, G, T] in float32 or better."""


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, causal: bool) -> State:
    """Attention of q [H, G, T, Dk] over k [H, L, Dk] and v [H, L, Dv], L at least 1; a causal mask needs T = L.

    Any strides, the last dimension contiguous.
    """
    assert not causal or q.shape[2] == k.shape[1], "torch aligns causal masks to the top left: pass the square alone"
    # Of a single key the fused kernel makes a finite answer also where that key is NaN; it takes one head size alone.
    is_fused = q.device.type == "cpu" and k.shape[1] > 1 and k.shape[2] == v.shape[2]
    if is_fused and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return _attend_fused(q, k, v, scale=scale, causal=causal)
    hidden = torch.ones((q.shape[2], k.shape[1]), dtype=torch.bool, device=q.device).triu_(1) if causal else None
    return attend_plain(q, k, v, scale=scale, hidden=hidden)


def _attend_fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, causal: bool) -> State:
    # KV heads are its batch and their query heads share K and V at stride 0: nothing is copied.
    shape = (-1, q.shape[1], -1, -1)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k.unsqueeze(1).expand(shape), v.unsqueeze(1).expand(shape), 0.0, causal, scale=scale
    )
    return output, lse


def attend_plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, hidden: torch.Tensor | None
) -> State:
    """Attention of q [H, G, T, D] over k [H, L, D] and v in elementary operations that any device has, but for the keys
    that are `hidden` bool [T, L] from a row; each row sees one or more. Holds the scores [H, G, T, L].
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).transpose(1, 2).unsqueeze(1) * scale
    if hidden is not None:
        scores.masked_fill_(hidden, -math.inf)
    lse = scores.logsumexp(dim=-1)
    weights = scores.sub_(lse.unsqueeze(-1)).exp_()
    return (weights @ v.to(wide).unsqueeze(1)).to(q.dtype), lse
