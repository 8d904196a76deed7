"""The traces of guide and model become particles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pvae.errors import ProgramError
from pvae.particles.densities import local_terms, node_terms, sum_inner_plates
from pvae.particles.plates import count_data
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
    scale, plate_scale, relative, shared = _scales(model_sites, guide_sites, layout, local)
    return Particles(
        values={n: node["value"] for n, node in latent_nodes(guide_trace).items()},
        log_p=local_log_p,
        log_q=local_log_q,
        observed=tuple(n for n, node in model_sites.items() if node["is_observed"]),
        global_log_p={n: t for n, t in log_p.items() if t.dim() == 1},
        global_log_q={n: t for n, t in log_q.items() if t.dim() == 1},
        global_scale=shared,
        scale=scale,
        plate_scale=plate_scale,
        relative_scale=relative,
    )


def _scales(
    model_sites: Mapping[str, Any],
    guide_sites: Mapping[str, Any],
    layout: Layout,
    local: set[tuple[str, str]],
) -> tuple[Scale, float, dict[tuple[str, str], Scale], dict[tuple[str, str], Scale]]:
    """The first observed site's factor as the common one; who differs from it, and by what.

    Sites outside the data plate (not in ``local``) come last, with their whole factor.
    """
    reference = next(model_sites[n] for n in layout.observed if ("p", n) in local)
    common = reference["scale"]
    plate_scale = 1.0
    for frame in plate_frames(reference):
        if frame.dim == layout.data_dim and frame.full_size is not None:
            plate_scale = frame.full_size / frame.size
    relative: dict[tuple[str, str], Scale] = {}
    shared: dict[tuple[str, str], Scale] = {}
    for role, sites in (("p", model_sites), ("q", guide_sites)):
        for name, node in sites.items():
            if (role, name) not in local:
                shared[role, name] = node["scale"]
                continue
            if _same(node["scale"], common):
                continue
            plated = any(frame.dim != layout.particle_dim for frame in plate_frames(node))
            if role == "q" and not plated and _same(node["scale"], 1.0):
                continue  # a guide without plates follows the model
            relative[role, name] = node["scale"] / common
    return common, plate_scale, relative, shared


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
        mask = prior["mask"]
        if isinstance(mask, Tensor):
            term = torch.where(mask, term, term.new_zeros(()))
        kl[name] = sum_inner_plates(term, layout, num_particles, num_data)
    auxiliary = {n: t for n, t in particles.log_q.items() if n not in kl}
    return {**kl, **auxiliary}


def _kl(posterior: Any, prior: Any, value: Tensor) -> Tensor:
    """In closed form, or where it has none but its steps have (a chain), along the draw."""
    along = getattr(posterior, "kl_along", None)
    if along is not None:
        return along(value, prior)  # type: ignore[no-any-return]
    return torch.distributions.kl_divergence(posterior, prior)
