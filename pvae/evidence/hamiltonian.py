"""Hamiltonian moves that leave a density of the path invariant, and how their steps are found.

Duane et al. (1987), Hybrid Monte Carlo; Neal (2011), MCMC using Hamiltonian dynamics. Every move
draws its momentum anew and ends with a Metropolis decision, so it is reversible for any step size
that does not depend on where the chain stands. Steps are found on pilot chains and then frozen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.evidence.paths import Point

__all__ = ["Steps", "leapfrog", "move", "tune"]

Evaluate = Callable[[Tensor], Point]

_WARM_UP = 30  # moves at the path's start, by which the first step size is found
_GAIN = 0.25  # of the log step size, for each unit that the acceptance is off its target
_MEMORY = 0.9  # share of the running variance that is kept at the next temperature
_JITTER = (0.5, 1.2)  # a trajectory's step is multiplied by between these, against closed orbits


def leapfrog(
    evaluate: Evaluate, start: Point, momentum: Tensor, beta: Tensor, step: Tensor, number: int
) -> tuple[Point, Tensor]:
    """``number`` leapfrog steps under ``-log f_beta``: where a trajectory ends, and its momentum.

    Args:
        evaluate: ``u -> Point``.
        start: Points ``(K, B)``.
        momentum: ``(K, B, L)``.
        beta: ``(B,)``.
        step: Step size that broadcasts against ``(K, B, L)``.
        number: Of leapfrog steps.
    """
    end = start
    momentum = momentum + 0.5 * step * start.gradient(beta)
    for index in range(number):
        end = evaluate(end.flat + step * momentum)
        share = 0.5 if index == number - 1 else 1.0
        momentum = momentum + share * step * end.gradient(beta)
    return end, momentum


def move(
    evaluate: Evaluate, start: Point, beta: Tensor, step: Tensor, num_leapfrog: int
) -> tuple[Point, Tensor]:
    """One Hamiltonian move of every chain: the points after it, and acceptances ``(K, B)``.

    It leaves ``f_beta`` invariant. A trajectory that ends in a NaN is rejected.
    """
    shape = (*start.log_f0.shape, 1)
    jitter = torch.empty(shape, dtype=step.dtype, device=step.device).uniform_(*_JITTER)
    momentum = torch.randn_like(start.flat)
    end, final = leapfrog(evaluate, start, momentum, beta, step * jitter, num_leapfrog)
    gain = end.log_density(beta) - start.log_density(beta)
    gain = gain + 0.5 * (momentum.square() - final.square()).sum(-1)
    gain = torch.nan_to_num(gain, nan=-math.inf, posinf=-math.inf)
    accepted = torch.rand_like(gain).log() < gain
    after = [
        torch.where(accepted if new.dim() == 2 else accepted[..., None], new, old)
        for new, old in zip(end, start, strict=True)
    ]
    return Point(*after), gain.exp().clamp(max=1)


@dataclass(frozen=True)
class Steps:
    """Step sizes along the path, frozen: a function of the temperature, for each datum.

    Attributes:
        betas: ``(P, B)`` temperatures at which they were found, rising.
        size: ``(P, B)`` step sizes in units of ``scale``.
        scale: ``(P, B, L)`` spread of the chains in each coordinate.
        speed: ``(P, B)`` standard deviation over the chains of ``log f_1 - log f_0``: how fast a
            log weight's variance grows along the path.
        acceptance: ``(P, B)`` mean acceptance of the pilot chains.
    """

    betas: Tensor
    size: Tensor
    scale: Tensor
    speed: Tensor
    acceptance: Tensor

    def at(self, beta: Tensor) -> Tensor:
        """The step at ``beta`` of shape ``(B,)``, for each datum and coordinate: ``(B, L)``."""
        index = ((self.betas <= beta).sum(0) - 1).clamp(min=0)
        data = torch.arange(len(index), device=index.device)
        return self.size[index, data, None] * self.scale[index, data]


def tune(
    evaluate: Evaluate,
    start: Point,
    betas: Tensor,
    num_leapfrog: int,
    target_acceptance: float,
) -> Steps:
    """Walk pilot chains along the path, adapting each datum's step to the acceptance asked for.

    The logarithm of the step follows the acceptance (Robbins & Monro 1951) from one temperature to
    the next; each coordinate's step is in units of the chains' spread there (a diagonal mass
    matrix).

    Args:
        evaluate: ``u -> Point``.
        start: Pilot draws from the path's start, ``(C, B)``.
        betas: ``(P, B)`` temperatures, from 0 to 1.
        num_leapfrog: Leapfrog steps of a move.
        target_acceptance: Mean acceptance to aim at, between 0 and 1.
    """
    point, beta = start, betas[0].to(start.flat.dtype)
    variance = _variance(start.flat)
    log_size = torch.full_like(beta, -0.25 * math.log(start.flat.shape[-1]))
    for trial in range(_WARM_UP):
        step = log_size.exp()[:, None] * variance.sqrt()
        point, acceptance = move(evaluate, point, beta, step, num_leapfrog)
        gain = max(_GAIN, 1.0 - trial / _WARM_UP)
        log_size = log_size + gain * (acceptance.mean(0) - target_acceptance)
    sizes, scales, speeds, acceptances = [], [], [], []
    for exact in betas:
        beta = exact.to(start.flat.dtype)
        variance = _MEMORY * variance + (1 - _MEMORY) * _variance(point.flat)
        speeds.append(point.log_ratio.std(0))
        point, acceptance = move(
            evaluate, point, beta, log_size.exp()[:, None] * variance.sqrt(), num_leapfrog
        )
        sizes.append(log_size)
        scales.append(variance.sqrt())
        acceptances.append(acceptance.mean(0))
        log_size = log_size + _GAIN * (acceptance.mean(0) - target_acceptance)
    stacks = (torch.stack(column) for column in (sizes, scales, speeds, acceptances))
    log_sizes, scale, speed, accepted = stacks
    return Steps(betas, _smooth(log_sizes).exp(), scale, speed, accepted)


def _variance(flat: Tensor) -> Tensor:
    """Of the chains in each coordinate, ``(B, L)``, kept off zero."""
    return flat.var(0).clamp(min=1e-12)


def _smooth(values: Tensor, reach: int = 4) -> Tensor:
    """Mean over the neighbours up to ``reach`` away along dimension 0, fewer at its ends."""
    total = values.cumsum(0)
    index = torch.arange(len(values), device=values.device)
    last, first = (index + reach).clamp(max=len(values) - 1), index - reach - 1
    before = torch.where((first >= 0)[:, None], total[first.clamp(min=0)], 0)
    count = last - first.clamp(min=-1)
    smoothed: Tensor = (total[last] - before) / count[:, None]
    return smoothed
