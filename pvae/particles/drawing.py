"""A pair run on a batch, every step: draws, weights and what goes with them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pvae.errors import ProgramError
from pvae.particles.choosing import weigh_chosen
from pvae.particles.densities import local_terms, masked, node_term, node_terms
from pvae.particles.inspection import inspect
from pvae.particles.plates import count_data
from pvae.particles.running import quiet, reason, replay, run_guide
from pvae.particles.simulation import log_dreams
from pvae.particles.traces import detached, latent_nodes, random_nodes, values_to_replay
from pvae.particles.types import (
    Batch,
    Gate,
    LatentSite,
    Layout,
    Particles,
    Program,
    Relaxed,
    sum_terms,
)
from pvae.particles.weighing import closed_form_kl, weigh

__all__ = ["draw", "glance", "latent_sites"]


def draw(
    model: Program,
    guide: Program,
    batch: Batch,
    num_particles: int = 1,
    *,
    score: bool = False,
    detach: bool = False,
    analytic_kl: bool = False,
    dream: bool = False,
    sites: bool = False,
    relax: Callable[[Any, Tensor], tuple[Tensor, Tensor, Any]] | None = None,
    choose: Callable[[Tensor], Tensor] | None = None,
    gate: Gate | None = None,
    layout: Layout | None = None,
    data_plate: str | None = None,
    vectorize: bool = True,
) -> Particles:
    r"""Run guide and model on a batch and weigh K particles for each of its B data.

    ``log w[k, b] = log p(x[b], z[k, b]) - log q(z[k, b] | x[b])``. With the exact posterior as
    guide it is constant over k and equal to ``log p(x[b])``.

    Args:
        model: A Pyro callable with latent sites and observed sites.
        guide: A Pyro callable that samples the same latent sites.
        batch: What both are called with: a tensor ``(B, ...)``, a tuple (positional arguments) or
            a dict (keyword arguments).
        num_particles: K.
        score: Also weigh the draws held fixed (see :attr:`Particles.score`).
        detach: Cut the pathwise derivative of every draw (for score-function gradients).
        analytic_kl: Also give each latent site's KL in closed form where it is known.
        dream: Also weigh by the guide what the model draws itself (see :attr:`Particles.dreams`).
        sites: Also give each local latent site's distributions (see :attr:`Particles.sites`).
        relax: Gets the distribution and the draws of a guide's only site and gives the relaxed
            draws held fixed, the path to their parameters, and a function of a distribution and
            them, its log density made continuous (see :class:`Relaxed`).
        choose: Gets the log weights ``(K, B)``, held fixed, and gives the numbers of the particles
            to keep, ``(n, B)``: the model is differentiated at these alone (see :class:`Chosen`).
        gate: Passed through on the way from the draws into the model (see :class:`Gate`).
        layout: What :func:`inspect` found for this pair; spares looking, and the checks.
        data_plate: Name of the plate that indexes the data, where several could.
        vectorize: Run all particles at once (an outermost plate); ``False`` runs them one by one.

    Returns:
        The particles, differentiable in the parameters of both programs.

    Raises:
        ProgramError: The programs do not fit each other, or cannot be run so; the message names
            the site and the remedy.
    """
    if num_particles < 1:
        raise ProgramError(f"num_particles must be at least 1, got {num_particles}")
    if layout is None:
        layout = inspect(model, guide, batch, data_plate=data_plate, vectorize=vectorize)
    if not layout.vectorize and (sites or relax is not None):
        raise ProgramError(
            "sites and relax take all particles at once: write the programs so that a leading "
            "particle dimension passes through, and leave vectorize at True"
        )
    one_pass = functools.partial(
        _draw, model, guide, batch, layout,
        score=score, detach=detach, analytic_kl=analytic_kl, sites=sites, relax=relax,
        choose=choose,
    )  # fmt: skip
    if layout.vectorize:
        particles = one_pass(num_particles, gate=gate)
    else:
        with _SameRows():
            parts = [
                one_pass(1, gate=None if gate is None else gate.part())
                for _ in range(num_particles)
            ]
        particles = dataclasses.replace(_stack(parts), gate=gate)
    if dream:
        particles = dataclasses.replace(particles, dreams=log_dreams(model, guide, batch, layout))
    return particles


def _draw(
    model: Program,
    guide: Program,
    batch: Batch,
    layout: Layout,
    num_particles: int,
    *,
    score: bool,
    detach: bool,
    analytic_kl: bool,
    sites: bool,
    relax: Callable[[Any, Tensor], tuple[Tensor, Tensor, Any]] | None,
    choose: Callable[[Tensor], Tensor] | None,
    gate: Gate | None,
) -> Particles:
    """One pass through both programs; without a particle dimension if not ``layout.vectorize``."""
    guide_trace = run_guide(guide, batch, num_particles, layout, detach=detach)
    if choose is not None:
        held = _score(guide, batch, guide_trace, layout, num_particles) if score else None
        return weigh_chosen(
            model, batch, guide_trace, layout, num_particles, choose, score=held, gate=gate
        )
    values = values_to_replay(guide_trace)
    replayed = values
    if gate is not None:
        replayed = {n: _gated(gate, n, v, layout) for n, v in values.items()}
    model_trace = replay(model, batch, replayed, num_particles, layout)
    particles = weigh(model_trace, guide_trace, layout, num_particles, batch)
    particles = dataclasses.replace(particles, gate=gate)
    if score:
        particles = dataclasses.replace(
            particles, score=_score(guide, batch, guide_trace, layout, num_particles)
        )
    if analytic_kl:
        kl = closed_form_kl(model_trace, guide_trace, particles, layout, num_particles)
        particles = dataclasses.replace(particles, kl=kl)
    if sites:
        local = _latent_sites(guide_trace, model_trace, layout)
        particles = dataclasses.replace(particles, sites=local)
    if relax is not None and torch.is_grad_enabled():
        relaxed = _relaxed(model, batch, guide_trace, layout, num_particles, relax)
        particles = dataclasses.replace(particles, relaxed=relaxed)
    return particles


class _SameRows(Messenger):  # type: ignore[misc]
    """Subsampled plates pick their rows once, however often the programs are run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample) and msg["name"] in self.rows:
            msg["value"], msg["done"] = self.rows[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            self.rows[msg["name"]] = msg["value"]


def _gated(gate: Gate, name: str, value: Any, layout: Layout) -> Any:
    if name not in layout.latents:
        return value
    return gate(value, layout, layout.event_dims[name])


def _score(
    guide: Program, batch: Batch, guide_trace: Any, layout: Layout, num_particles: int
) -> dict[str, Tensor]:
    """``log q`` at the draws held fixed, differentiable in the guide's parameters alone.

    A lower site's density depends on a higher site's value: with several sites the guide is run
    again on the fixed values, so that no path through a draw is left in it.
    """
    sites = latent_nodes(guide_trace)
    num_data = count_data(guide_trace, layout, batch)
    fixed = detached(values_to_replay(guide_trace))
    if len(sites) > 1:
        sites = latent_nodes(replay(guide, batch, fixed, num_particles, layout))
    return {n: node_term(n, s, layout, num_particles, num_data, fixed[n]) for n, s in sites.items()}


def _relaxed(
    model: Program,
    batch: Batch,
    guide_trace: Any,
    layout: Layout,
    num_particles: int,
    relax: Callable[[Any, Tensor], tuple[Tensor, Tensor, Any]],
) -> Relaxed:
    """The model at relaxed values of the guide's only site, which no support would admit."""
    ((name, node),) = latent_nodes(guide_trace).items()
    leaf, path, density = relax(node["fn"], node["value"])
    values = {**values_to_replay(guide_trace), name: leaf}
    try:
        with pyro.validation_enabled(False):
            trace = replay(model, batch, values, num_particles, layout)
            num_data = count_data(trace, layout, batch)
            terms = node_terms(random_nodes(trace), layout, num_particles, num_data)
    except Exception as error:
        raise ProgramError(
            f"the model does not run at relaxed values of site {name!r} ({reason(error)}): let it "
            "take numbers between 0 and 1 there, or use gradient=pvae.gradients.score_function"
        ) from error
    local = local_terms(terms)
    likelihood = sum_terms({n: t for n, t in local.items() if n in layout.observed})
    log_q, log_p = (
        masked(density(site["fn"], leaf), site["mask"], site["fn"].event_dim)
        for site in (node, trace.nodes[name])
    )
    kl = (log_q - log_p).reshape(num_particles, num_data, -1).sum(-1)
    return Relaxed(name, leaf, path, likelihood, kl)


def _stack(parts: list[Particles]) -> Particles:
    """Particles that were run one by one, joined along K."""

    def join(name: str) -> Any:
        first = getattr(parts[0], name)
        if first is None:
            return None
        return {key: torch.cat([getattr(part, name)[key] for part in parts]) for key in first}

    values = {k: torch.stack([part.values[k] for part in parts]) for k in parts[0].values}
    names = ("log_p", "log_q", "score", "kl", "global_log_p", "global_log_q")
    return dataclasses.replace(parts[0], values=values, **{name: join(name) for name in names})


def latent_sites(
    model: Program, guide: Program, batch: Batch, num_particles: int, layout: Layout
) -> dict[str, LatentSite]:
    """Draws of the guide with ``q(site | ...)`` and ``p(site | ...)`` of each local latent site."""
    guide_trace = run_guide(guide, batch, num_particles, layout, detach=False)
    model_trace = replay(model, batch, values_to_replay(guide_trace), num_particles, layout)
    return _latent_sites(guide_trace, model_trace, layout)


def glance(model: Program, guide: Program, batch: Batch, layout: Layout) -> dict[str, LatentSite]:
    """One particle's :func:`latent_sites`, without gradients; random streams stay as they were."""
    with quiet(batch):
        return latent_sites(model, guide, batch, 1, layout)


def _latent_sites(guide_trace: Any, model_trace: Any, layout: Layout) -> dict[str, LatentSite]:
    return {
        name: LatentSite(
            guide_trace.nodes[name]["value"],
            guide_trace.nodes[name]["fn"],
            model_trace.nodes[name]["fn"],
        )
        for name in layout.latents
    }
