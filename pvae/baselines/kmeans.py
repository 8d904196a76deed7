"""k-means++ and Lloyd's iterations: where the mixtures of continuous data start."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assign", "kmeans"]

_ITERATIONS = 50
_BLOCK_ENTRIES = 2**21


def kmeans(x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Centres of rows ``(N, D)``: ``(size, D)`` float64.

    The first centres are drawn in turn with probability proportional to the squared distance to
    the nearest one before (Arthur & Vassilvitskii 2007); a centre that loses all its rows moves to
    the row farthest from its own.
    """
    rows = x.double()
    rows = rows - (shift := rows.mean(0))
    centres = _plus_plus(rows, size, generator)
    before = None
    for _ in range(_ITERATIONS):
        distance, label = assign(rows, centres)
        if before is not None and torch.equal(label, before):
            break
        counts = torch.bincount(label, minlength=size)
        sums = torch.zeros_like(centres).index_add_(0, label, rows)
        centres = sums / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero().flatten()
        if len(empty):
            centres[empty] = rows[distance.topk(len(empty)).indices]
        before = label
    return centres + shift


def assign(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance to the nearest centre and its number, ``(N,)`` each."""
    # Made beforehand: small results kept between large blocks would leave the heap in holes.
    distance = torch.empty(len(x)).to(centres)
    label = torch.empty(len(x), dtype=torch.long, device=centres.device)
    half, size = centres.square().sum(1) / 2, max(1, _BLOCK_ENTRIES // max(centres.shape))
    blocks = (torch.split(each, size) for each in (x, distance, label))
    for block, to_distance, to_label in zip(*blocks, strict=True):
        rows = block.to(centres)
        closest, nearest = (half - rows @ centres.T).min(1)
        to_distance.copy_(2 * closest + rows.square().sum(1))
        to_label.copy_(nearest)
    return distance.clamp_(min=0), label


def _plus_plus(x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    norms = x.square().sum(1)
    chosen = [int(torch.randint(len(x), (), generator=generator))]
    nearest = torch.full_like(norms, float("inf"))
    for _ in range(size - 1):
        last = x[chosen[-1]]
        nearest = torch.minimum(nearest, (norms - 2 * (x @ last) + last @ last).clamp(min=0))
        nearest[chosen[-1]] = 0.0
        total = nearest.cumsum(0)
        # Where only copies of centres are left, any row will do.
        weight = total if total[-1] > 0 else torch.arange(1, len(x) + 1).to(total)
        at = torch.rand((), generator=generator, dtype=torch.float64).to(total) * weight[-1]
        chosen.append(min(int(torch.searchsorted(weight, at, right=True)), len(x) - 1))
    return x[torch.tensor(chosen, device=x.device)]
