"""The traces of guide and model become particles."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pvae.errors import ProgramError
from pvae.particles.densities import (
    local_terms,
    node_log_prob,
    node_terms,
    sum_inner_plates,
)
from pvae.particles.plates import count_data, inner_scale
from pvae.particles.traces import latent_nodes, plate_frames, random_nodes
from pvae.particles.types import Batch, Layout, Particles, Scale

__all__ = ["closed_form_kl", "weigh"]


def weigh(
    model_trace: Any, guide_trace: Any, layout: Layout, num_particles: int, batch: Batch
) -> Particles:
    """Each site's log density, inside the data plate and outside, and the factors on them."""
    num_data = count_data(model_trace, layout, batch)
    model_sites, guide_sites = random_nodes(model_trace), random_nodes(guide_trace)
    log_p = node_terms(model_sites, layout, num_particles, num_data)
    log_q = node_terms(guide_sites, layout, num_particles, num_data)
    local_log_p, local_log_q = local_terms(log_p), local_terms(log_q)
    local = {("p", n) for n in local_log_p} | {("q", n) for n in local_log_q}
    counted = _counted_as(model_sites, guide_sites, layout, local)
    scale, plate_scale, relative = _scales(counted, layout)
    sites = {("p", n): s for n, s in model_sites.items()} | {
        ("q", n): s for n, s in guide_sites.items()
    }
    return Particles(
        values={n: node["value"] for n, node in latent_nodes(guide_trace).items()},
        log_p=local_log_p,
        log_q=local_log_q,
        observed=tuple(n for n, node in model_sites.items() if node["is_observed"]),
        global_log_p={n: t for n, t in log_p.items() if t.dim() == 1},
        global_log_q={n: t for n, t in log_q.items() if t.dim() == 1},
        global_scale={key: s["scale"] for key, s in sites.items() if key not in local},
        scale=scale,
        plate_scale=plate_scale,
        relative_scale=relative,
        inner_scale={k: f for k, s in counted.items() if (f := inner_scale(s, layout)) != 1},
    )


def _counted_as(
    model_sites: Mapping[str, Any],
    guide_sites: Mapping[str, Any],
    layout: Layout,
    local: set[tuple[str, str]],
) -> dict[tuple[str, str], Any]:
    """Terms inside the data plate -> the site whose plates and ``poutine.scale`` they have.

    The first is an observed site. A guide without plates follows the model.
    """
    first = next(n for n in layout.observed if ("p", n) in local)
    counted = {("p", first): model_sites[first]}
    counted |= {("p", n): s for n, s in model_sites.items() if ("p", n) in local}
    for name, site in guide_sites.items():
        plated = any(frame.dim != layout.particle_dim for frame in plate_frames(site))
        follows = not plated and _same(site["scale"], 1.0)
        if ("q", name) in local:
            counted["q", name] = model_sites.get(name, model_sites[first]) if follows else site
    return counted


def _scales(
    counted: Mapping[tuple[str, str], Any], layout: Layout
) -> tuple[Scale, float, dict[tuple[str, str], Scale]]:
    """The factor of all terms, the data plate's part of it, and who has another, as a ratio.

    Where they differ, the common factor is the data plate's alone.
    """
    plate_scale = 1.0
    for frame in plate_frames(next(iter(counted.values()))):
        if frame.dim == layout.data_dim and frame.full_size is not None:
            plate_scale = frame.full_size / frame.size
    factors = {key: _by_row(site["name"], site["scale"], layout) for key, site in counted.items()}
    common = next(iter(factors.values()))
    if not all(_same(factor, common) for factor in factors.values()):
        common = plate_scale
    relative = {key: f / common for key, f in factors.items() if not _same(f, common)}
    return common, plate_scale, relative


def _by_row(name: str, scale: Scale, layout: Layout) -> Scale:
    """A factor as a number or ``(B,)``."""
    if not isinstance(scale, Tensor) or scale.dim() == 0:
        return scale
    rows = scale.shape[layout.data_dim] if scale.dim() >= -layout.data_dim else 1
    if scale.numel() != rows:
        raise ProgramError(
            f"site {name!r} has a poutine.scale of shape {tuple(scale.shape)}, which differs "
            "within one datum: give one factor for each datum, or weigh the parts by a pyro.factor"
        )
    return scale.reshape(() if rows == 1 else (rows,))


def _same(a: Scale, b: Scale) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    return abs(float(a) - float(b)) <= 1e-9 * abs(float(b))


def closed_form_kl(
    model_trace: Any, guide_trace: Any, particles: Particles, layout: Layout, num_particles: int
) -> dict[str, Tensor]:
    """Latent site -> ``KL(q || p)``, ``(K, B)``, or its ``log_q - log_p`` where it is not known."""
    if not layout.in_order:
        raise ProgramError(
            "a closed-form KL needs guide and model to draw their latent sites in the same order: "
            "reorder the guide or use analytic_kl=False"
        )
    num_data = particles.shape[1]
    kl = {}
    for name in layout.latents:
        prior, posterior = model_trace.nodes[name], guide_trace.nodes[name]
        try:
            term = _kl(posterior["fn"], prior["fn"], posterior["value"])
        except NotImplementedError:
            kl[name] = particles.log_q[name] - particles.log_p[name]
            continue
        term = _masked(term, posterior, prior)
        kl[name] = sum_inner_plates(term, layout, num_particles, num_data)
    auxiliary = {n: t for n, t in particles.log_q.items() if n not in kl}
    return {**kl, **auxiliary}


def _masked(kl: Tensor, posterior: Any, prior: Any) -> Tensor:
    """The KL where neither site is masked out, ``log q - log p`` of those that count elsewhere."""
    masks = [
        n["mask"] for n in (posterior, prior) if n["mask"] is not None and n["mask"] is not True
    ]
    if not masks:
        return kl
    drawn = node_log_prob(posterior) - node_log_prob(prior)
    if any(mask is False for mask in masks):
        return drawn
    return torch.where(functools.reduce(torch.logical_and, masks), kl, drawn)


def _kl(posterior: Any, prior: Any, value: Tensor) -> Tensor:
    """In closed form, or where it has none but its steps have (a chain), along the draw."""
    along = getattr(posterior, "kl_along", None)
    if along is not None:
        return along(value, prior)  # type: ignore[no-any-return]
    return torch.distributions.kl_divergence(posterior, prior)
