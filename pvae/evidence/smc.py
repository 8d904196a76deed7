r"""Sequential Monte Carlo along the annealed path: chains that fall behind give way to others.

Del Moral, Doucet & Jasra (2006), Sequential Monte Carlo samplers; Neal's chains with resampling.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from pvae import log_weights as algebra
from pvae.errors import OptionError
from pvae.evidence.annealing import Annealer, Progress, Schedule, evidence_of
from pvae.evidence.importance import Evidence
from pvae.evidence.paths import Point

__all__ = ["ancestors", "group_means", "grouped", "smc", "systematic"]


def smc(
    model: Any,
    guide: Any,
    x: Any,
    *,
    num_particles: int = 256,
    num_groups: int = 16,
    ess_threshold: float = 0.5,
    num_temperatures: int = 1000,
    schedule: Schedule = "adaptive",
    num_leapfrog: int = 10,
    start: str = "guide",
    target_acceptance: float = 0.65,
    max_pairs: int | None = None,
    compiled: bool = False,
    seed: int = 0,
    data_plate: str | None = None,
    vectorize: bool = True,
    progress: Progress | None = None,
) -> Evidence:
    r"""Estimate ``log p(x_n)`` by groups of particles that are annealed and resampled.

    There are G independent groups. The path, the moves and what is found on pilot chains are those
    of :func:`~pvae.evidence.annealed`. After each gain in weight, a group whose effective sample
    size has fallen below ``ess_threshold`` times its number of particles is resampled
    (systematically), and each of its particles then carries the group's mean weight. The mean
    weight of each group still has the expectation ``p(x)``, so that the groups are independent
    unbiased estimates: the evidence is the log of their mean, and ``stderr`` comes from the spread
    between groups (delta method), which needs no assumption on the resampling; with few groups
    its tails are Student's, not the normal's. ``ess`` and ``pareto_k`` are those
    of all particles' weights, as they stand after the last resampling.

    Args:
        model: The generative program; its latent sites are continuous and local to a datum.
        guide: The inference program; may be ``None`` with ``start="prior"``.
        x: Data: an array, tensor, tuple or dict of them, N rows.
        num_particles: K, in all groups together.
        num_groups: G, which divides K; the error has G - 1 degrees of freedom.
        ess_threshold: Share of a group's particles below which it is resampled, 0 (never) to 1.
        num_temperatures: T, steps from ``beta = 0`` to ``beta = 1``.
        schedule: Where the temperatures lie.
        num_leapfrog: Leapfrog steps of a move.
        start: ``"guide"`` or ``"prior"``.
        target_acceptance: Mean acceptance that the step sizes are adapted to.
        max_pairs: Cap on particles x data held at once, though never less than one group.
        compiled: Compile the traced densities (see :func:`~pvae.evidence.annealed`).
        seed: Seed of the draws; the caller's random stream is untouched.
        data_plate: Name of the plate that indexes the data, where several could.
        vectorize: Run particles at once.
        progress: Called with (data done, N).

    Returns:
        An :class:`Evidence` of N data.

    Raises:
        OptionError: G is below two or does not divide K, or another number cannot be.
        ProgramError: As :func:`~pvae.evidence.annealed`.
        NonFiniteError: A log weight came out as NaN.
    """
    if num_groups < 2 or num_particles < 2 * num_groups or num_particles % num_groups:
        raise OptionError(
            f"num_particles must be a multiple of num_groups, with at least two groups of two, got "
            f"{num_particles} and {num_groups}: try 256 and 16"
        )
    if not 0 <= ess_threshold <= 1:
        raise OptionError(f"ess_threshold lies between 0 and 1, got {ess_threshold}: 0.5 is usual")
    annealer = Annealer(
        model, guide, num_temperatures=num_temperatures, schedule=schedule,
        num_leapfrog=num_leapfrog, start=start, target_acceptance=target_acceptance,
        max_pairs=max_pairs, compiled=compiled, data_plate=data_plate, vectorize=vectorize,
    )  # fmt: skip
    size = num_particles // num_groups

    def resample(log_weights: Tensor, point: Point) -> tuple[Tensor, Point]:
        return systematic(log_weights, point, size, ess_threshold)

    def weigh(rows: Any) -> Evidence:
        ladder = annealer.ladder(rows)
        log_weights = annealer.forward(rows, ladder, num_particles, unit=size, resample=resample)
        return grouped(log_weights, size)

    return annealer.over(x, weigh, unit=size, seed=seed, progress=progress)


def systematic(
    log_weights: Tensor, point: Point, size: int, ess_threshold: float
) -> tuple[Tensor, Point]:
    """Resample each group of each datum whose effective sample size is below the threshold.

    One uniform number places ``size`` equally spaced marks on the group's cumulative weights
    (Kitagawa 1996), so a particle of normalised weight W is kept ``size * W`` times on average,
    rounded up or down. The others keep their places and weights.

    Args:
        log_weights: ``(K, B)``, groups of ``size`` one after another.
        point: The particles.
        size: M, particles in a group.
        ess_threshold: Share of M.
    """
    after, index = ancestors(log_weights, size, ess_threshold)
    moved = [
        part.gather(0, index if part.dim() == 2 else index[..., None].expand_as(part))
        for part in point
    ]
    return after, Point(*moved)


def ancestors(log_weights: Tensor, size: int, ess_threshold: float) -> tuple[Tensor, Tensor]:
    """Weights after :func:`systematic` resampling, and who each particle is a copy of: ``(K, B)``.

    Args:
        log_weights: ``(K, B)``, groups of ``size`` one after another.
        size: M, particles in a group.
        ess_threshold: Share of M below which a group is resampled.
    """
    num_particles, num_data = log_weights.shape
    grouped_weights = log_weights.reshape(-1, size, num_data).movedim(1, -1)  # (G, B, M)
    effective = algebra.ess(grouped_weights.movedim(-1, 0))
    falls = (effective < ess_threshold * size)[..., None]
    shares = grouped_weights.softmax(-1).cumsum(-1)
    offset = torch.rand((*shares.shape[:2], 1), dtype=shares.dtype, device=shares.device)
    marks = (torch.arange(size, device=shares.device) + offset) / size
    chosen = torch.searchsorted(shares.contiguous(), marks).clamp(max=size - 1)
    chosen = torch.where(falls, chosen, torch.arange(size, device=shares.device))
    mean = grouped_weights.logsumexp(-1, keepdim=True) - math.log(size)
    after = torch.where(falls, mean, grouped_weights).movedim(-1, 1).reshape(log_weights.shape)
    first = torch.arange(0, num_particles, size, device=shares.device)[:, None, None]
    index = (first + chosen).movedim(-1, 1).reshape(num_particles, num_data)
    return after, index


def grouped(log_weights: Tensor, size: int) -> Evidence:
    """Evidence from log weights ``(K, B)``, its error from the spread between groups."""
    found = evidence_of(log_weights, "sequential Monte Carlo")
    return dataclasses.replace(found, stderr=algebra.stderr(group_means(log_weights, size)).cpu())


def group_means(log_weights: Tensor, size: int) -> Tensor:
    """Log mean weight of each group: ``(K, B) -> (G, B)``."""
    return algebra.log_mean_exp(log_weights.reshape(-1, size, log_weights.shape[1]).movedim(1, 0))
