r"""Particle filters: the log evidence of sequences, with resampling along time.

At each step a particle draws ``z_t`` from ``q(z_t | z_{t-1}, x)`` and gains the log weight
``log p(z_t | z_{t-1}) + log p(x_t | z_t) - log q(z_t | z_{t-1}, x)``; when the weights of a group
become uneven, its particles are resampled. The mean weight then still has the expectation ``p(x)``
(Del Moral 2004), and the expected log of it is a bound that is usually above the IW-ELBO of as many
particles: the filtering bound of Maddison et al. (2017), Filtering variational objectives.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from pvae.data import as_batch, num_rows
from pvae.errors import OptionError, ProgramError
from pvae.evidence.annealing import blocks, joined
from pvae.evidence.importance import Evidence, Progress, evaluation
from pvae.evidence.smc import ancestors, group_means, grouped
from pvae.evidence.sweep import tensors_of
from pvae.markov import GaussianChain
from pvae.particles import arguments

__all__ = ["filtered"]

_MAX_PAIRS = {"cpu": 2**14}


def filtered(
    model: Any,
    guide: Any,
    x: Any,
    *,
    num_particles: int = 1000,
    num_groups: int = 10,
    ess_threshold: float = 0.5,
    max_pairs: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evidence:
    r"""Estimate ``log p(x_n)`` of each sequence by G independent particle filters.

    Args:
        model: A state-space model, as :class:`pvae.models.deep_markov.DeepMarkov`: ``mask(x,
            lengths)`` says which steps are data, ``chain(mask)`` is ``p(z)`` and ``decode(z)`` is
            ``p(x_t | z_t)``.
        guide: Proposes each state: ``posterior(x, lengths)`` is a chain, as that of the structured
            forward-backward guide. ``None`` proposes from the transition (the bootstrap filter of
            Gordon, Salmond & Smith 1993).
        x: Sequences ``(N, T * D)`` or ``(N, T, D)``, or a tuple of them and their lengths.
        num_particles: K, in all groups together.
        num_groups: G, which divides K. Groups are independent unbiased estimates of ``p(x)``:
            ``stderr`` is from the spread between them, and ``elbo`` is the mean log of their
            estimates, the filtering bound of K/G particles.
        ess_threshold: Share of a group's particles below which it is resampled: 0 never, which is
            importance sampling; 1 at every step.
        max_pairs: Cap on particles x data held at once.
        seed: Seed of the draws; the caller's random stream is untouched.
        progress: Called with (data done, N).

    Returns:
        An :class:`Evidence` of N data; ``ess`` and ``pareto_k`` are those of the weights since the
        last resampling.

    Raises:
        OptionError: G does not divide K, or another number cannot be.
        ProgramError: The model is no state-space model, or the guide's states do not follow in
            time.
    """
    if num_groups < 2 or num_particles < 2 * num_groups or num_particles % num_groups:
        raise OptionError(
            f"num_particles must be a multiple of num_groups, with at least two groups of two, got "
            f"{num_particles} and {num_groups}: try 1000 and 10"
        )
    if not 0 <= ess_threshold <= 1:
        raise OptionError(f"ess_threshold lies between 0 and 1, got {ess_threshold}: 0.5 is usual")
    for name in ("mask", "chain", "decode", "num_features"):
        if not hasattr(model, name):
            raise ProgramError(
                f"{type(model).__name__} has no {name!r}, so it is no state-space model: use "
                "evidence.importance"
            )
    programs = (model,) if guide is None else (model, guide)
    device = next((t.device for t in tensors_of(*programs)), torch.device("cpu"))
    batch = as_batch(x, device=device)
    limit = max_pairs or _MAX_PAIRS.get(device.type, 2**20)
    size, block = num_particles // num_groups, max(1, limit // num_particles)
    found = []
    with evaluation(model, guide, seed=seed, device=device):
        for rows in blocks(batch, min(block, num_rows(batch)), progress):
            weights = _filter(model, guide, rows, num_particles, size, ess_threshold)
            bound = group_means(weights, size).mean(0).cpu()
            found.append(dataclasses.replace(grouped(weights, size), elbo=bound))
    return dataclasses.replace(joined(found), method="particle filter")


def _filter(
    model: Any, guide: Any, rows: Any, num_particles: int, size: int, ess_threshold: float
) -> Tensor:
    """Log weights ``(K, B)``, float64, whose mean in each group of ``size`` estimates ``p(x)``."""
    x, *lengths = arguments(rows)[0]
    steps = x.reshape(len(x), -1, model.num_features).to(next(model.parameters()).dtype)
    mask = model.mask(steps, *lengths)
    prior = model.chain(mask)
    proposal = prior if guide is None else _proposal(guide, x, *lengths)
    shape = (num_particles, len(steps))
    before = {"p": prior.start.expand(*shape, -1), "q": proposal.start.expand(*shape, -1)}
    log_weights = torch.zeros(shape, dtype=torch.float64, device=steps.device)
    for t in range(int(mask.sum(1).max())):
        drawn = proposal.at(t, before["q"])
        z = drawn.sample()
        gain = model.decode(z).log_prob(steps[:, t].masked_fill(~mask[:, t, None], 0))
        if proposal is not prior:
            gain = gain + prior.at(t, before["p"]).log_prob(z) - drawn.log_prob(z)
        log_weights = log_weights + gain.double().masked_fill(~mask[:, t], 0.0)
        after, index = ancestors(log_weights, size, ess_threshold)
        # At its end a sequence is weighed, not resampled: that would leave nothing to diagnose.
        goes_on = mask[:, t + 1] if t + 1 < mask.shape[1] else torch.zeros_like(mask[:, t])
        log_weights = torch.where(goes_on, after, log_weights)
        z = z.gather(0, index[..., None].expand_as(z))
        before = {"p": z, "q": z}
    return log_weights


def _proposal(guide: Any, *batch: Any) -> GaussianChain:
    chains = list(guide.posterior(*batch).values()) if hasattr(guide, "posterior") else []
    if len(chains) != 1 or not isinstance(chains[0], GaussianChain):
        raise ProgramError(
            f"a particle filter proposes each state given the one before, and "
            f"{type(guide).__name__} does not: give forward-backward with structured=True, or "
            "guide=None"
        )
    return chains[0]
