"""One program at a time: its draws, its densities, its distributions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pvae.errors import ProgramError
from pvae.particles.densities import log_density
from pvae.particles.running import replay, run_guide
from pvae.particles.traces import in_braces, latent_nodes, values_to_replay
from pvae.particles.types import Batch, Layout, Program

__all__ = [
    "log_guide",
    "log_joint",
    "observed_families",
    "observed_sites",
    "prior_of",
    "rewritten",
    "sample_guide",
    "site_priors",
]


def sample_guide(
    guide: Program, batch: Batch, num_particles: int, layout: Layout
) -> tuple[dict[str, Any], Tensor]:
    """The guide alone: draws per site, and their ``log q`` summed over sites, ``(K, B)``.

    The encoder is run once, whatever K is. The draws can be weighed later, in pieces, by
    :func:`log_joint`.
    """
    trace = run_guide(guide, batch, num_particles, layout, detach=False)
    return values_to_replay(trace), log_density(trace, layout, num_particles, batch)


def log_joint(
    model: Program, batch: Batch, values: Mapping[str, Any], num_particles: int, layout: Layout
) -> Tensor:
    """``log p(x, z)`` of given draws, unscaled: ``(K, B)``, nats."""
    trace = replay(model, batch, values, num_particles, layout)
    return log_density(trace, layout, num_particles, batch)


def log_guide(
    guide: Program, batch: Batch, values: Mapping[str, Any], num_particles: int, layout: Layout
) -> Tensor:
    """``log q(z | x)`` of given latents, unscaled: ``(K, B)``, nats.

    Latents may have one row for all data, ``(K, 1, ...)``: each is then weighed under every datum.

    Raises:
        ProgramError: The guide draws a site of its own, over which it would have to be integrated.
    """
    trace = replay(guide, batch, values, num_particles, layout)
    own = [name for name in latent_nodes(trace) if name not in values]
    if own:
        raise ProgramError(
            f"the guide draws {in_braces(own)}, which the model lacks, so its density at given "
            "latents is not known: use a guide without it, or start='prior'"
        )
    return log_density(trace, layout, num_particles, batch)


def observed_sites(
    model: Program, batch: Batch, values: Mapping[str, Any], num_particles: int, layout: Layout
) -> dict[str, Any]:
    """``p(site | z)`` of each observed site, given latents ``(K, B, ...)``; batch ``(K, B)``."""
    trace = replay(model, batch, values, num_particles, layout)
    return {name: trace.nodes[name]["fn"] for name in layout.observed}


def observed_families(
    model: Program, batch: Batch, values: Mapping[str, Any], num_particles: int, layout: Layout
) -> dict[Any, Any]:
    """Key of the batch's tensor -> ``p(x | z)`` of latents ``(K, B, ...)``, batch shape (K, B)."""
    trace = replay(model, batch, values, num_particles, layout)
    return {key: trace.nodes[name]["fn"] for name, key in layout.entries.items()}


class _Rewrite(Messenger):  # type: ignore[misc]
    """Gives latent sites other distributions."""

    def __init__(self, change: Callable[[str, Any], Any]) -> None:
        super().__init__()
        self.change = change

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not isinstance(msg["fn"], _Subsample):
            msg["fn"] = self.change(msg["name"], msg["fn"])


def rewritten(program: Program, change: Callable[[str, Any], Any]) -> Program:
    """The program with other distributions at its latent sites.

    Args:
        program: A model or a guide.
        change: Gets a site's name and distribution, batch shape ``(B,)``, and returns another.
    """
    return _Rewrite(change)(program)  # type: ignore[no-any-return]


def prior_of(model: Program) -> Program:
    """``p(z)`` as a guide: the model with its observed sites out of sight."""
    hidden: Program = poutine.block(model, hide_fn=lambda msg: bool(msg.get("is_observed")))
    return hidden


def site_priors(model: Any, sites: Iterable[str]) -> dict[str, Any]:
    """Site -> its distribution in one run of ``model(size=1)``, batch shape ``(1,)`` or ``()``.

    Args:
        model: A model that generates by itself.
        sites: Names of its latent sites.

    Raises:
        ProgramError: it does not generate so, or has no such site.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), poutine.block():
            trace = poutine.trace(model).get_trace(size=1)
        return {name: trace.nodes[name]["fn"] for name in sites}
    except Exception as error:
        raise ProgramError(
            f"model(size=1) does not show the supports of its latent sites "
            f"({type(error).__name__}: {error}): let the model generate so, or use another guide"
        ) from error
