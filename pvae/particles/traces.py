"""What stands in a trace: random sites, values to replay, plates and masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

__all__ = [
    "detached",
    "in_braces",
    "latent_nodes",
    "masks_of",
    "observed_nodes",
    "plate_frames",
    "random_nodes",
    "values_to_replay",
]


def _is_random(node: Any) -> bool:
    if node["type"] != "sample" or node["infer"].get("_deterministic"):
        return False
    return not isinstance(node["fn"], _Subsample)


def random_nodes(trace: Any) -> dict[str, Any]:
    """Random site, latent or observed -> node."""
    return {name: node for name, node in trace.nodes.items() if _is_random(node)}


def latent_nodes(trace: Any) -> dict[str, Any]:
    """Latent site -> node."""
    return {name: node for name, node in random_nodes(trace).items() if not node["is_observed"]}


def observed_nodes(trace: Any) -> dict[str, Any]:
    """Observed site -> node."""
    return {name: node for name, node in random_nodes(trace).items() if node["is_observed"]}


def values_to_replay(trace: Any) -> dict[str, Any]:
    """Values to replay: latent draws, and the indices that subsampled plates took."""
    return {
        name: node["value"]
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"]
    }


def detached(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without the path back to the parameters that they were drawn with."""
    return {n: v.detach() if isinstance(v, Tensor) else v for n, v in values.items()}


def plate_frames(node: Any) -> list[Any]:
    """The vectorised plates that a site is in."""
    return [frame for frame in node["cond_indep_stack"] if frame.vectorized]


def masks_of(node: Any) -> list[tuple[Any, int]]:
    """Masks on a site, by ``poutine.mask`` or ``dist.mask``: each with its event dimensions."""
    distribution = node["fn"]
    masks = [(node["mask"], distribution.event_dim)]
    while hasattr(distribution, "base_dist") and not hasattr(distribution, "transforms"):
        masks.append((getattr(distribution, "_mask", None), distribution.event_dim))
        distribution = distribution.base_dist
    return [(mask, event_dim) for mask, event_dim in masks if mask is not None]


def in_braces(names: Iterable[str]) -> str:
    """Names of sites as a message shows them."""
    return "{" + ", ".join(map(repr, names)) + "}"
