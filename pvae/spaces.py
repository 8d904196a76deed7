"""Unconstrained space: a bijection from free real numbers onto each support."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions import transforms as bijections

__all__ = ["LowerTriangular", "Space", "bijection"]


class LowerTriangular(bijections.Transform):
    """``n (n + 1) / 2`` free numbers to a lower triangle with a positive diagonal, one-to-one.

    Args:
        size: n.
    """

    domain = constraints.real_vector
    codomain = constraints.lower_cholesky
    bijective = True

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LowerTriangular) and other.size == self.size

    __hash__ = None  # type: ignore[assignment]

    def _call(self, x: Tensor) -> Tensor:
        n = self.size
        rows, columns = torch.tril_indices(n, n, offset=-1, device=x.device)
        tril = x.new_zeros((*x.shape[:-1], n, n))
        tril[..., rows, columns] = x[..., n:]
        return tril + torch.diag_embed(x[..., :n].exp())

    def _inverse(self, y: Tensor) -> Tensor:
        rows, columns = torch.tril_indices(self.size, self.size, offset=-1, device=y.device)
        diagonal = y.diagonal(dim1=-2, dim2=-1).log()
        return torch.cat([diagonal, y[..., rows, columns]], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum of the diagonal's logarithms: ``(*, n (n + 1) / 2) -> (*,)``."""
        return x[..., : self.size].sum(-1)

    def forward_shape(self, shape: Any) -> Any:
        """The shape of the output."""
        return torch.Size((*shape[:-1], self.size, self.size))

    def inverse_shape(self, shape: Any) -> Any:
        """The shape of the input."""
        return torch.Size((*shape[:-2], self.size * (self.size + 1) // 2))


def bijection(support: Any, event_shape: Sequence[int]) -> Any:
    """From unconstrained space onto a support; ``None`` where there is nothing to do.

    Raises:
        NotImplementedError: there is no such map.
    """
    unit = support
    while isinstance(unit, constraints.independent):
        unit = unit.base_constraint
    if unit is constraints.real:
        return None
    if unit is constraints.lower_cholesky:
        return LowerTriangular(event_shape[-1])
    if unit is constraints.positive_definite:
        cholesky = dist.transforms.CholeskyTransform()
        return bijections.ComposeTransform([LowerTriangular(event_shape[-1]), cholesky.inv])
    return torch.distributions.biject_to(support)


class Space(nn.Module):
    """The unconstrained space of a site, and the way from there onto its support.

    Args:
        event_shape: Shape of one value.
        support: Its constraint.

    Attributes:
        loc: Location of the prior in this space, ``(n,)``.
        scale: Its scale, kept within [0.05, 20].
        spread: Its scale, by which values are divided where others are conditioned on them.
    """

    loc: Tensor
    scale: Tensor
    spread: Tensor

    def __init__(self, event_shape: Sequence[int], support: Any) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.transform = bijection(support, self.event_shape)
        shape = torch.Size(self.event_shape)
        self.shape = tuple(self.transform.inverse_shape(shape) if self.transform else shape)
        self.size = math.prod(self.shape)
        self.register_buffer("loc", torch.zeros(self.size))
        self.register_buffer("scale", torch.ones(self.size))
        self.register_buffer("spread", torch.ones(self.size))

    def fit(self, draws: Tensor) -> None:
        """Set location and scale from draws ``(S, *event_shape)``, by their quantiles.

        Where the draws cannot be told from standard normal ones (4 standard errors), they are zero
        and one.
        """
        free = self.free(draws.to(self.loc.dtype))
        quantiles = torch.tensor([0.16, 0.5, 0.84], dtype=free.dtype, device=free.device)
        low, middle, high = torch.quantile(free.nan_to_num(), quantiles, dim=0)
        spread = (high - low) / 2
        near = 5.0 / math.sqrt(len(draws))  # the standard error of either is about 1.25 / sqrt(S)
        standard = ((middle.abs() < near) & ((spread - 1).abs() < near)).all()
        if bool(standard):
            middle, spread = torch.zeros_like(middle), torch.ones_like(spread)
        self.loc.copy_(middle)
        self.scale.copy_(spread.clamp(0.05, 20.0))
        self.spread.copy_(spread.where(spread > 1e-6, torch.ones_like(spread)))

    def free(self, value: Tensor) -> Tensor:
        """Values ``(*, *event_shape)`` as free numbers ``(*, n)``."""
        batch = value.shape[: value.dim() - len(self.event_shape)]
        free = value if self.transform is None else self.transform.inv(value)
        return free.reshape(*batch, self.size)

    def features(self, value: Tensor) -> Tensor:
        """Values as standardised free numbers ``(*, n)``, for others to be conditioned on."""
        standard = (self.free(value) - self.loc) / self.spread
        if self.transform is None:
            return standard
        return standard.nan_to_num().clamp(-10.0, 10.0)  # a value on the edge of its support

    def place(self, base: Any) -> Any:
        """A distribution over ``(n,)`` as one over the support."""
        steps: list[Any] = []
        if self.shape != (self.size,):
            steps.append(
                bijections.ReshapeTransform(torch.Size((self.size,)), torch.Size(self.shape))
            )
        if self.transform is not None:
            steps.append(self.transform)
        return dist.TransformedDistribution(base, steps) if steps else base
