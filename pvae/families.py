"""The family of a distribution: its parameters taken out, moved and put back, whatever its class.

A distribution of torch or Pyro says by ``arg_constraints`` what its parameters are and where they
may lie. That is enough to move each of them freely, in unconstrained space, and to build the
distribution again: ``Independent``, ``mask`` and transforms around it are kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pvae.errors import ProgramError

__all__ = ["is_whole_family", "marginals", "offsets", "shifted"]

_ALTERNATIVES = (("logits", "probs"), ("scale_tril", "covariance_matrix", "precision_matrix"))


def offsets(name: str, distribution: Any) -> dict[str, Tensor]:
    """Zeros for every free parameter of a site's distribution, in unconstrained space.

    Args:
        name: The site, for messages.
        distribution: Its distribution, batch shape ``(B,)`` or wider.

    Raises:
        ProgramError: The distribution cannot be taken apart and built again.
    """
    try:
        found = {
            key: torch.zeros_like(_unconstrained(value, constraint))
            for key, (value, constraint) in _parameters(_leaf(distribution)).items()
        }
        again = shifted(distribution, found)
        value = distribution.sample()
        same = torch.allclose(again.log_prob(value), distribution.log_prob(value), 1e-3, 1e-3)
    except (NotImplementedError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ProgramError(_no_family(name, distribution, reason)) from error
    if not found or not same:
        raise ProgramError(_no_family(name, distribution, "built again it is not the same"))
    return found


def _no_family(name: str, distribution: Any, reason: str) -> str:
    return (
        f"the best member of the family of site {name!r} ({type(distribution).__name__}) cannot be "
        f"searched ({reason}): pass best_elbo=, computed by other means"
    )


def shifted(distribution: Any, moves: Mapping[str, Tensor]) -> Any:
    """The member of the same family whose unconstrained parameters are moved by ``moves``."""
    if distribution.arg_constraints:
        return _shifted_leaf(distribution, moves)
    base = shifted(distribution.base_dist, moves)
    if isinstance(distribution, torch.distributions.Independent):
        return type(distribution)(base, distribution.reinterpreted_batch_ndims)
    if isinstance(distribution, torch.distributions.TransformedDistribution):
        return type(distribution)(base, distribution.transforms)
    if hasattr(distribution, "_mask"):
        return type(distribution)(base, distribution._mask)
    raise NotImplementedError(f"{type(distribution).__name__} is not known how to build")


def is_whole_family(distribution: Any) -> bool:
    """Whether moving the parameters reaches the whole family: no learned transform lies above."""
    while not distribution.arg_constraints:
        if not all(map(_is_fixed, getattr(distribution, "transforms", ()))):
            return False
        distribution = distribution.base_dist
    return True


def _is_fixed(transform: Any) -> bool:
    inner = list(getattr(transform, "parts", ()))
    if hasattr(transform, "base_transform"):
        inner.append(transform.base_transform)
    return type(transform).__module__ == "torch.distributions.transforms" and all(
        map(_is_fixed, inner)
    )


def marginals(distribution: Any) -> Any:
    """The distribution of each dimension on its own, none of them an event; ``None`` if unknown."""
    if distribution.event_shape == ():
        return distribution
    if isinstance(distribution, torch.distributions.Independent):
        inner = distribution.base_dist
        return inner if inner.event_shape == () else marginals(inner)
    if isinstance(
        distribution,
        (torch.distributions.MultivariateNormal, torch.distributions.LowRankMultivariateNormal),
    ):
        return torch.distributions.Normal(distribution.mean, distribution.variance.sqrt())
    if type(distribution).__name__ != "TransformedDistribution":
        return None
    base = marginals(distribution.base_dist)
    if base is None:
        return None
    transforms = distribution.transforms
    if all(isinstance(t, torch.distributions.ReshapeTransform) for t in transforms):
        event = distribution.event_shape
        return _reshaped(base, len(distribution.base_dist.event_shape), event)
    if all(t.domain.event_dim == 0 == t.codomain.event_dim for t in transforms):
        return torch.distributions.TransformedDistribution(base, transforms)
    return None


def _reshaped(base: Any, event_dim: int, event: Any) -> Any:
    """A Normal whose last ``event_dim`` dimensions become those of ``event``."""
    if not isinstance(base, torch.distributions.Normal):
        return None
    batch = base.batch_shape[: len(base.batch_shape) - event_dim]
    return torch.distributions.Normal(
        base.loc.reshape(batch + event), base.scale.reshape(batch + event)
    )


# --- one distribution with parameters ------------------------------------------------------------


def _leaf(distribution: Any) -> Any:
    while not distribution.arg_constraints:
        distribution = distribution.base_dist
    return distribution


def _parameters(leaf: Any) -> dict[str, tuple[Tensor, Any]]:
    """Name -> value of shape ``batch + event`` and its constraint, for each real parameter."""
    if type(leaf).__name__ == "Delta":
        raise NotImplementedError("a point has no entropy")
    constraints = leaf.arg_constraints
    taken = set(inspect.signature(type(leaf).__init__).parameters) & set(constraints)
    for preferred, *others in _ALTERNATIVES:
        if preferred in taken:
            taken -= set(others)
    found = {}
    for name in (n for n in constraints if n in taken and not constraints[n].is_discrete):
        value = torch.as_tensor(getattr(leaf, name))
        event = value.shape[value.dim() - constraints[name].event_dim :]
        found[name] = (value.expand(leaf.batch_shape + event), constraints[name])
    return found


def _transform(constraint: Any) -> Any:
    """From unconstrained space; for a Cholesky factor one-to-one on the lower triangle."""
    if constraint is torch.distributions.constraints.lower_cholesky:
        return torch.distributions.transform_to(constraint)
    return torch.distributions.biject_to(constraint)


def _unconstrained(value: Tensor, constraint: Any) -> Tensor:
    free: Tensor = _transform(constraint).inv(value)
    return free


def _shifted_leaf(leaf: Any, moves: Mapping[str, Tensor]) -> Any:
    moved = {}
    for name, (value, constraint) in _parameters(leaf).items():
        free = _unconstrained(value, constraint) + moves[name]
        moved[name] = _transform(constraint)(free)
    known = inspect.signature(type(leaf).__init__).parameters
    fixed = {
        name: getattr(leaf, name)
        for name, parameter in known.items()
        if name not in moved and name != "self" and parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }  # fmt: skip
    return type(leaf)(**fixed, **moved)
