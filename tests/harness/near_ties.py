"""Where an oracle's choice of a token hangs on rounding: from there on another layout may rightly go another way."""

import numpy as np
import numpy.typing as npt
import torch

from proto import control_pb2
from worker.kernels.interface import Draw
from worker.kernels.torch_sampler import filter_logits, gumbel_noise

#: Of a position's largest magnitude, in float32.
TOLERANCE = 3e-5
_TIE = 5 * TOLERANCE
Floats = npt.NDArray[np.float32]


def first_near_tie(logits: Floats) -> int:
    """The first of the positions [n, V] whose two best logits lie within five tolerances; n where there is none."""
    return _first(_gap(logits, 1) < _TIE * np.abs(logits).max(axis=1))


def first_near_draw(logits: Floats, sampling: control_pb2.Sampling, *, position: int) -> int:
    """The same of draws, the first of which has `position`: of logits with their noise, and of those that a filter
    keeps last and leaves out first.
    """
    if sampling.temperature == 0:
        return first_near_tie(logits)
    rows = torch.from_numpy(logits)
    draws = [Draw(sampling=sampling, position=position + index) for index in range(len(logits))]
    noise = gumbel_noise(draws, vocab_size=logits.shape[1], device=rows.device)
    kept = filter_logits(rows, [sampling] * len(logits)).numpy()
    near = _TIE * np.abs(logits).max(axis=1) / sampling.temperature
    counts = np.isfinite(kept).sum(axis=1)
    at_edge = np.concatenate([_gap(row[None], count) for row, count in zip(logits, counts, strict=True)])
    least = np.minimum(_gap(kept + noise.numpy(), 1), at_edge / sampling.temperature)
    return _first((least < near) | _is_near_top_p(rows, sampling, near=near))


def _is_near_top_p(rows: torch.Tensor, sampling: control_pb2.Sampling, *, near: Floats) -> npt.NDArray[np.bool_]:
    """Whether the probability of the best tokens of a row comes so near to top_p that one more or less may be kept."""
    limit = control_pb2.Sampling(temperature=sampling.temperature, top_k=sampling.top_k, top_p=1)
    best = filter_logits(rows, [limit] * len(rows)).softmax(-1).sort(dim=-1, descending=True).values
    distance = np.abs(best.cumsum(-1).numpy() - sampling.top_p).min(axis=1)
    is_near: npt.NDArray[np.bool_] = (distance < near) & (sampling.top_p < 1)
    return is_near


def _gap(values: Floats, count: int) -> Floats:
    """Of each row, between the `count`-th largest and the next; infinite where there is no next."""
    if count >= values.shape[1]:
        return np.full(len(values), np.inf, dtype=np.float32)
    ordered = np.sort(values, axis=1)[:, ::-1]
    gap: Floats = ordered[:, count - 1] - ordered[:, count]
    return gap


def _first(is_tie: npt.NDArray[np.bool_]) -> int:
    return int(is_tie.argmax()) if is_tie.any() else len(is_tie)
