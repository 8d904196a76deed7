"""Log densities of a trace's sites, summed to one number for each particle and datum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pvae.errors import ProgramError
from pvae.particles.plates import count_data, inner_scale
from pvae.particles.running import reason
from pvae.particles.supports import support_of, values_inside
from pvae.particles.traces import masks_of, random_nodes
from pvae.particles.types import Batch, Layout, sum_terms

__all__ = [
    "attempted_log_prob",
    "local_terms",
    "log_density",
    "masked",
    "node_log_prob",
    "node_term",
    "node_terms",
    "sum_inner_plates",
]


def node_log_prob(node: Any, value: Tensor | None = None) -> Tensor:
    """Unscaled log density of a site, zero where it is masked out."""
    value = _filled(node) if value is None else value
    log_prob: Tensor = node["fn"].log_prob(value, *node["args"], **node["kwargs"])
    return masked(log_prob, node["mask"])


def attempted_log_prob(role: str, node: Any) -> Tensor:
    """:func:`node_log_prob`; whatever fails in it is a ``ProgramError``."""
    try:
        return node_log_prob(node)
    except Exception as error:
        raise ProgramError(
            f"{role} site {node['name']!r} has no density at its value ({reason(error)}): give it "
            "a value of its own rows and support, or validate_args=False where a draw may rule the "
            "data out"
        ) from error


def masked(log_prob: Tensor, mask: Any, event_dim: int = 0) -> Tensor:
    """A log density, zero where the mask of its batch shape is false."""
    if mask is None or mask is True:
        return log_prob
    if mask is False:
        return torch.zeros_like(log_prob)
    return torch.where(mask.reshape(mask.shape + (1,) * event_dim), log_prob, 0.0)


def _filled(node: Any) -> Any:
    """A site's value; data that are masked out give way to a value inside the support.

    A NaN there would survive the mask in the gradient, zero times NaN being NaN.
    """
    value = node["value"]
    if not node["is_observed"]:
        return value
    for mask, event_dim in masks_of(node):
        if isinstance(mask, Tensor):
            inside = values_inside(support_of(node["fn"]), value)
            value = torch.where(mask.reshape(mask.shape + (1,) * event_dim), value, inside)
    return value


def sum_inner_plates(log_prob: Tensor, layout: Layout, num_particles: int, num_data: int) -> Tensor:
    """Sum a site over its inner plates: batch shape -> ``(K, B)``."""
    padded = log_prob.reshape((1,) * (-layout.particle_dim - log_prob.dim()) + log_prob.shape)
    data_dim = padded.dim() + layout.data_dim
    inner = [d for d in range(1, padded.dim()) if d != data_dim]
    summed = padded.sum(inner) if inner else padded
    return summed.expand(num_particles, num_data)


def node_term(
    name: str,
    node: Any,
    layout: Layout,
    num_particles: int,
    num_data: int,
    value: Tensor | None = None,
) -> Tensor:
    """A site's log density: ``(K, B)`` inside the data plate, ``(K,)`` outside."""
    log_prob = node_log_prob(node, value)
    if name not in layout.outside:
        return sum_inner_plates(log_prob, layout, num_particles, num_data)
    at_particles = log_prob.dim() == -layout.particle_dim
    return (log_prob.flatten(1).sum(1) if at_particles else log_prob.sum()).expand(num_particles)


def node_terms(
    sites: Mapping[str, Any], layout: Layout, num_particles: int, num_data: int
) -> dict[str, Tensor]:
    """Site -> :func:`node_term`."""
    return {
        name: node_term(name, node, layout, num_particles, num_data) for name, node in sites.items()
    }


def local_terms(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of :func:`node_terms` that are inside the data plate, ``(K, B)``."""
    return {name: term for name, term in terms.items() if term.dim() == 2}


def log_density(trace: Any, layout: Layout, num_particles: int, batch: Batch) -> Tensor:
    """Sum of a trace's log densities inside the data plate, unscaled: ``(K, B)``, nats.

    Raises:
        ProgramError: A plate within a datum picks a part of it.
    """
    for name, node in random_nodes(trace).items():
        if name not in layout.outside and inner_scale(node, layout) != 1:
            raise ProgramError(
                f"site {name!r} is in a plate that picks a part of each datum, so its density is "
                "not that of the whole datum: let the plate span all of it"
            )
    num_data = count_data(trace, layout, batch)
    return sum_terms(local_terms(node_terms(random_nodes(trace), layout, num_particles, num_data)))
