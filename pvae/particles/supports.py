"""The values a site may take, in checks and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor

from pvae.errors import DataError
from pvae.particles.batches import entries_of
from pvae.particles.traces import masks_of, random_nodes
from pvae.particles.types import Batch

__all__ = [
    "base_family",
    "check_support",
    "check_supports",
    "in_words",
    "observed_supports",
    "support_of",
    "unit_support",
    "values_inside",
]


def base_family(distribution: Any) -> Any:
    """A distribution from within ``independent``, ``mask`` and ``expand``."""
    while hasattr(distribution, "base_dist") and not hasattr(distribution, "transforms"):
        distribution = distribution.base_dist
    return distribution


def support_of(distribution: Any) -> Any:
    """Its support, or ``None``."""
    try:
        return distribution.support
    except NotImplementedError:  # a user's own distribution need not declare one
        return None


def unit_support(support: Any) -> Any:
    """A constraint on single numbers, from within ``independent``."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def in_words(support: Any) -> str:
    """A support as a message names it."""
    unit = unit_support(support)
    words = str(unit).removesuffix("()")
    if any(bool((end != end.flatten()[0]).any()) for end in _bounds(unit)):
        return f"{type(unit).__name__.lstrip('_')} with bounds of each row's own"
    low = getattr(unit, "lower_bound", None)
    if type(unit).__name__ == "_IntegerGreaterThan" and not isinstance(low, Tensor):
        return f"the whole numbers from {low}"
    high = getattr(unit, "upper_bound", None)
    if type(unit).__name__ == "_IntegerInterval" and not isinstance(low, Tensor):
        return f"the whole numbers from {low} to {high}"
    return words if len(words) < 60 else type(unit).__name__.lstrip("_")


def values_inside(support: Any, value: Tensor) -> Tensor:
    """Values inside a support, of the shape of ``value``; ``value`` itself where none is known."""
    unit = unit_support(support)
    if unit is constraints.one_hot:
        first = torch.zeros_like(value)
        first[..., 0] = 1
        return first
    if getattr(unit, "is_discrete", False):
        return torch.zeros_like(value) + getattr(unit, "lower_bound", 0)
    try:
        inside: Tensor = torch.distributions.transform_to(support)(torch.zeros_like(value))
    except (NotImplementedError, AttributeError):
        return value
    return inside


def _checkable_support(node: Any) -> Any:
    """A site's support; ``None`` where some of its data are masked out, or none is declared."""
    return None if masks_of(node) else support_of(node["fn"])


def observed_supports(observed: Mapping[str, Any], batch: Batch) -> dict[str, tuple[Any, Any]]:
    """Observed site -> (key, support) where its value is a tensor of the batch itself.

    A support whose bounds are tensors is that of these rows alone, and left out.
    """
    return {
        name: (key, support)
        for name, node in observed.items()
        for key, value in entries_of(batch)
        if node["value"] is value
        and (support := _checkable_support(node)) is not None
        and not _bounds(support)
    }


def _bounds(support: Any) -> list[Tensor]:
    """Those of a support's bounds that are tensors."""
    unit = unit_support(support)
    ends = (getattr(unit, name, None) for name in ("lower_bound", "upper_bound"))
    return [end for end in ends if isinstance(end, Tensor)]


def check_supports(model_trace: Any, other_trace: Any) -> None:
    """Refuse observed data outside their likelihood's support, see :func:`check_support`.

    A support that differs at the latents of another trace is let be: some draws rule the data out.
    """
    for name, node in random_nodes(model_trace).items():
        support = _checkable_support(node) if node["is_observed"] else None
        if support is not None and _stays(support, support_of(other_trace.nodes[name]["fn"])):
            check_support(name, support, torch.as_tensor(node["value"]), base_family(node["fn"]))


def _stays(support: Any, other: Any) -> bool:
    pairs = zip(_bounds(support), _bounds(other), strict=True)
    return all(torch.equal(end, other_end) for end, other_end in pairs)


def check_support(
    name: str, support: Any, value: Tensor, family: Any = None, *, first: int = 0
) -> None:
    """Refuse observed values outside the support of their likelihood; ``first`` is the first row.

    Raises:
        DataError: names the site, the first offending row and value, and what would help.
    """
    value = value if value.dim() else value[None]
    inside = support.check(value)
    inside = inside if inside.dim() else inside[None]
    if bool(inside.all()):
        return
    row = int((~inside).nonzero()[0][0])
    unit = unit_support(support)
    single = unit.check(value)
    outside = value[row][~single[row]] if single.shape == value.shape else value.new_empty(0)
    worst = f"{float(outside[0]):g}" if outside.numel() else "a value outside it"
    likelihood = f"the {type(family).__name__} likelihood of " if family is not None else ""
    hint = ": transform the data or change the likelihood"
    if str(unit).startswith("Boolean"):
        hint = "; binarise the data (binarize='dynamic') or use continuous_bernoulli or gaussian"
    elif getattr(unit, "is_discrete", False) and bool((outside != outside.round()).any()):
        hint = ": keep the file's numbers as they are (transform='none') or change the likelihood"
    raise DataError(
        f"{likelihood}site {name!r} takes values in {in_words(support)}, row {first + row} of the "
        f"data has {worst}{hint}"
    )
