"""The local latent sites as one flat vector of free real numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pvae.errors import ProgramError
from pvae.particles.batches import leading_size
from pvae.particles.densities import node_terms, sum_inner_plates
from pvae.particles.plates import count_data
from pvae.particles.programs import log_guide, prior_of
from pvae.particles.running import plated, replay, run_guide, trace_of
from pvae.particles.supports import base_family, in_words, support_of
from pvae.particles.traces import latent_nodes, random_nodes, values_to_replay
from pvae.particles.types import Batch, Layout, Program, sum_terms

__all__ = ["check_continuous", "path_ends", "unconstrain"]


def path_ends(
    model: Program, guide: Program | None, batch: Batch, flat: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    """``log q(z|x) |dz/du|`` and ``log p(x, z) |dz/du|`` at flat latents ``u``, each ``(K, B)``.

    Args:
        model: The generative program.
        guide: The inference program; ``None`` for the prior ``p(z)`` in its place.
        batch: B data.
        flat: ``(K, B, L)``, as :func:`unconstrain` gives it.
        layout: What :func:`inspect` found.
    """
    if not layout.vectorize and len(flat) > 1:
        ends = [path_ends(model, guide, batch, one, layout) for one in torch.split(flat, 1)]
        return torch.cat([end[0] for end in ends]), torch.cat([end[1] for end in ends])
    num_particles, num_data = flat.shape[:2]
    placed = _Unconstrained(flat, layout)
    trace = trace_of(placed(plated(model, num_particles, layout)), batch)
    terms = node_terms(random_nodes(trace), layout, num_particles, num_data)
    log_jacobian = sum_terms(placed.log_jacobian)
    if guide is None:
        log_q = sum_terms({name: terms[name] for name in layout.latents})
    else:
        log_q = log_guide(guide, batch, values_to_replay(trace), num_particles, layout)
    return log_q + log_jacobian, sum_terms(terms) + log_jacobian


def unconstrain(
    model: Program, batch: Batch, values: Mapping[str, Any], num_particles: int, layout: Layout
) -> Tensor:
    """Latent draws as one flat vector of free real numbers, ``(K, B, L)``.

    Args:
        model: The generative program, whose supports and order of sites count.
        batch: B data.
        values: Latent site -> draws, as :func:`sample_guide` gives them.
        num_particles: K.
        layout: What :func:`inspect` found.
    """
    trace = replay(model, batch, values, num_particles, layout)
    rows = []
    for name, node in latent_nodes(trace).items():
        if name in layout.latents:
            free = _bijection(name, node["fn"]).inv(node["value"])
            rows.append(_as_rows(free, len(node["fn"].batch_shape), layout))
    return torch.cat(rows, -1)


def check_continuous(
    model: Program, guide: Program, batch: Batch, layout: Layout, num_draws: int = 16
) -> None:
    """Refuse a pair whose latents cannot be moved along a path of densities from q to p.

    Raises:
        ProgramError: A latent site is shared by all data, discrete, without a bijection, or drawn
            by the guide on a part of its support only; the guide has sites of its own; or the
            data plate picks its own rows.
    """
    if layout.globals:
        raise ProgramError(
            f"site {layout.globals[0]!r} is shared by all data, so there is no evidence of one "
            "datum: move it inside the data plate, or condition on it"
        )
    draws = num_draws if layout.vectorize else 1
    prior_trace = run_guide(prior_of(model), batch, draws, layout, detach=False)
    rows, total = count_data(prior_trace, layout, batch), leading_size(batch)
    if rows != total:
        raise ProgramError(
            f"the data plate picks {rows} of {total} rows by itself: pass the rows to be judged "
            "and let the plate span them"
        )
    for name, node in latent_nodes(prior_trace).items():
        if name in layout.latents:
            _bijection(name, node["fn"])
    _refuse_part_of_the_support(guide, batch, values_to_replay(prior_trace), draws, layout)


def _refuse_part_of_the_support(
    guide: Program, batch: Batch, values: Mapping[str, Any], draws: int, layout: Layout
) -> None:
    """A guide must reach all that the model draws, and draw no site of its own."""
    log_guide(guide, batch, values, draws, layout)
    trace = replay(guide, batch, values, draws, layout)
    for name, node in latent_nodes(trace).items():
        support = support_of(node["fn"])
        if support is not None and not bool(support.check(node["value"]).all()):
            raise ProgramError(
                f"site {name!r}: the guide ({type(base_family(node['fn'])).__name__}) draws on "
                f"{in_words(support)}, only a part of the model's support, so the evidence would "
                "come out too low: use a guide of the model's support, or start='prior'"
            )


class _Unconstrained(Messenger):  # type: ignore[misc]
    """Gives the local latent sites their values from a flat vector ``(K, B, L)``, in order.

    Each piece goes through the bijection onto its site's support, which may depend on the sites
    above it; ``log_jacobian`` collects ``log |dz/du|`` of each site, ``(K, B)``.
    """

    def __init__(self, flat: Tensor, layout: Layout) -> None:
        super().__init__()
        self.flat, self.layout = flat, layout
        self.used = 0
        self.log_jacobian: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name, family = msg["name"], msg["fn"]
        if name not in self.layout.latents or msg["is_observed"]:
            return
        bijection, batch_dims = _bijection(name, family), len(family.batch_shape)
        shape = tuple(bijection.inverse_shape(family.shape()))
        num_particles, num_data = self.flat.shape[:2]
        size = math.prod(shape) // (num_data * (num_particles if self.layout.vectorize else 1))
        piece = self.flat[..., self.used : self.used + size]
        self.used += size
        free = _from_rows(piece, shape, batch_dims, self.layout)
        value = bijection(free)
        log_jacobian = bijection.log_abs_det_jacobian(free, value)
        log_jacobian = log_jacobian.reshape(free.shape[:batch_dims] + (-1,)).sum(-1)
        self.log_jacobian[name] = sum_inner_plates(
            log_jacobian, self.layout, num_particles, num_data
        )
        msg["value"], msg["done"] = value, True


def _bijection(name: str, family: Any) -> Any:
    """Free real numbers onto a latent site's support."""
    support = support_of(family)
    if support is None or getattr(support, "is_discrete", False):
        raise ProgramError(
            f"site {name!r} ({type(base_family(family)).__name__}) is discrete or of no known "
            "support: annealing moves continuous latents only, so use importance sampling, or "
            "sum the site out of the model"
        )
    if isinstance(support, torch.distributions.constraints.MixtureSameFamilyConstraint):
        support = support.base_constraint
    try:
        return torch.distributions.biject_to(support)
    except NotImplementedError:
        raise ProgramError(
            f"site {name!r} takes values in {in_words(support)}, onto which torch has no "
            "bijection from free real numbers: use importance sampling"
        ) from None


def _as_rows(value: Tensor, batch_dims: int, layout: Layout) -> Tensor:
    """A site's values ``(K, ..., B, ...)`` as rows ``(K, B, n)``."""
    axis = batch_dims + layout.data_dim
    if not layout.vectorize:
        value, axis = value.unsqueeze(0), axis + 1
    moved = value.movedim(axis, 1)
    return moved.reshape(*moved.shape[:2], -1)


def _from_rows(rows: Tensor, shape: tuple[int, ...], batch_dims: int, layout: Layout) -> Tensor:
    """The reverse of :func:`_as_rows`, for values of a given shape."""
    axis = batch_dims + layout.data_dim
    if not layout.vectorize:
        shape, axis = (1, *shape), axis + 1
    others = [size for dim, size in enumerate(shape) if dim not in (0, axis)]
    value = rows.reshape(*rows.shape[:2], *others).movedim(1, axis)
    return value if layout.vectorize else value.squeeze(0)
