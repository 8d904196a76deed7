"""Distributions that Pyro and torch lack."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid, softplus

__all__ = ["DiscretizedLogistic"]


class DiscretizedLogistic(TorchDistribution):  # type: ignore[misc]
    r"""A logistic distribution binned to the integers ``0 .. num_levels - 1``.

    ``p(x) = F((x + 1/2 - loc) / scale) - F((x - 1/2 - loc) / scale)`` with F the logistic function;
    the outermost bins take the tails, so that the probabilities sum to one. Kingma et al. (2016).

    Args:
        loc: Location, in units of levels.
        scale: Positive scale, in units of levels.
        num_levels: Number of levels, 256 for bytes.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}

    def __init__(
        self, loc: Any, scale: Any, num_levels: int, *, validate_args: bool | None = None
    ) -> None:
        self.loc, self.scale = broadcast_all(loc, scale)
        self.num_levels = num_levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def support(self) -> Any:
        """The integers ``0 .. num_levels - 1``."""
        return constraints.integer_interval(0, self.num_levels - 1)  # type: ignore[no-untyped-call]

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiscretizedLogistic:
        """The same distribution with a larger batch shape."""
        return DiscretizedLogistic(
            self.loc.expand(batch_shape),
            self.scale.expand(batch_shape),
            self.num_levels,
            validate_args=False,
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of integer levels, nats."""
        if self._validate_args:
            self._validate_sample(value)
        upper = (value + 0.5 - self.loc) / self.scale
        lower = (value - 0.5 - self.loc) / self.scale
        # log(F(b) - F(a)) = log F(b) + log(1 - F(a)) + log(1 - exp(a - b)), exact and stable.
        width = 1 / self.scale
        inner = logsigmoid(upper) - softplus(lower) + torch.log(-torch.expm1(-width))
        edges = torch.where(value <= 0, logsigmoid(upper), -softplus(lower))
        is_edge = (value <= 0) | (value >= self.num_levels - 1)
        return torch.where(is_edge, edges, inner)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Integer levels, by inversion."""
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            uniform = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
            uniform = uniform.clamp(1e-6, 1 - 1e-6)
            continuous = self.loc + self.scale * torch.logit(uniform)
            return continuous.round().clamp(0, self.num_levels - 1)

    @property
    def mean(self) -> Tensor:
        """The location, kept within the levels: a picture, not the exact mean."""
        return self.loc.clamp(0, self.num_levels - 1)
