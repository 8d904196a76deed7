"""A mixture of diagonal Gaussians whose draws can be differentiated."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["DiagonalNormalMixture"]


class DiagonalNormalMixture(TorchDistribution):  # type: ignore[misc]
    r"""``q(z) = sum_c pi_c Normal(z; mu_c, diag(sigma_c^2))``, reparameterised.

    A draw picks a component, and carries the implicit derivative of the standardised draw
    (Figurnov et al. 2018): with ``S_d(z) = F(z_d | z_<d)`` uniform whatever the parameters, a
    change of them moves z by ``-(dS/dz)^-1 dS``, a triangular system. So weights, means and scales
    all have pathwise gradients, which Pyro's own MixtureOfDiagNormals has for two dimensions or
    more, by densities that underflow in many of them.

    One mixture for all data (no batch dimensions) is scored by matrix products, whose memory is
    (values, C) instead of (values, C, D): ``sum_d ((z - mu) / sigma)_d^2`` expands to ``z^2 .
    sigma^-2 - 2 z . mu sigma^-2 + mu^2 . sigma^-2``, in double precision, for its terms cancel.

    Args:
        logits: Logits of the weights, ``(*, C)``.
        loc: Means, ``(*, C, D)``.
        scale: Standard deviations, ``(*, C, D)``.
        reparameterized: Whether draws carry the derivative, which takes ``(*, C, D)`` numbers and
            a triangular solution for each.
    """

    arg_constraints = {
        "logits": constraints.real_vector,
        "loc": constraints.independent(constraints.real, 2),  # type: ignore[no-untyped-call]
        "scale": constraints.independent(constraints.positive, 2),  # type: ignore[no-untyped-call]
    }
    support = constraints.real_vector

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        scale: Tensor,
        *,
        reparameterized: bool = True,
        validate_args: bool | None = None,
    ) -> None:
        self.logits = logits.log_softmax(-1)
        self.loc, self.scale = loc, scale
        self.has_rsample = reparameterized
        self._shared = (self.logits, loc, scale) if loc.dim() == 2 else None
        super().__init__(loc.shape[:-2], loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiagonalNormalMixture:
        """The same distribution with a larger batch shape."""
        new = cast(
            DiagonalNormalMixture, self._get_checked_instance(DiagonalNormalMixture, _instance)
        )
        batch = torch.Size(batch_shape)
        new.logits = self.logits.expand(batch + self.logits.shape[-1:])
        new.loc = self.loc.expand(batch + self.loc.shape[-2:])
        new.scale = self.scale.expand(batch + self.scale.shape[-2:])
        new.has_rsample, new._shared = self.has_rsample, self._shared
        super(DiagonalNormalMixture, new).__init__(batch, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _log_components(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised values and log densities of each dimension, ``(*, C, D)``."""
        standard = (value.unsqueeze(-2) - self.loc) / self.scale
        log_density = -0.5 * standard.square() - self.scale.log() - 0.5 * math.log(2 * math.pi)
        return standard, log_density

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, nats."""
        if self._validate_args:
            self._validate_sample(value)
        if self._shared is None:
            joint = self.logits + self._log_components(value)[1].sum(-1)
        else:
            joint = _by_products(*self._shared, value)
        log_prob: Tensor = joint.logsumexp(-1)
        return log_prob

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws without a derivative."""
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            gumbel = -torch.empty_like(self.logits.expand(shape[:-1] + (-1,))).exponential_().log()
            component = (self.logits + gumbel).argmax(-1)[..., None, None]
            index = component.expand(*shape[:-1], 1, shape[-1])
            loc, scale = (
                p.expand(shape[:-1] + p.shape[-2:]).gather(-2, index).squeeze(-2)
                for p in (self.loc, self.scale)
            )
            value: Tensor = loc + scale * torch.randn(shape, dtype=loc.dtype, device=loc.device)
        return value

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws whose derivative with respect to every parameter is implicit."""
        value = self.sample(sample_shape)
        standard, log_density = self._log_components(value)
        below = log_density.cumsum(-1) - log_density  # of the dimensions before
        weights = (self.logits.unsqueeze(-1) + below).softmax(-2)
        distribution = torch.special.ndtr(standard)
        uniform = (weights * distribution).sum(-2)
        with torch.no_grad():
            slopes = -standard / self.scale
            excess = weights * (distribution - uniform.unsqueeze(-2))
            lower = torch.einsum("...cd,...cj->...dj", excess, slopes).tril(-1)
            density = (weights * log_density.exp()).sum(-2).clamp(min=1e-30)
            system = lower / density.unsqueeze(-1) + torch.eye(value.shape[-1]).to(value)
        change = (uniform - uniform.detach()) / density
        solved = torch.linalg.solve_triangular(
            system, change.unsqueeze(-1), upper=False, unitriangular=True
        )
        moved: Tensor = value - solved.squeeze(-1)
        return moved

    @property
    def mean(self) -> Tensor:
        """``sum_c pi_c mu_c``."""
        mean: Tensor = (self.logits.exp().unsqueeze(-1) * self.loc).sum(-2)
        return mean

    @property
    def variance(self) -> Tensor:
        """Of each dimension."""
        second = self.logits.exp().unsqueeze(-1) * (self.scale.square() + self.loc.square())
        variance: Tensor = second.sum(-2) - self.mean.square()
        return variance


def _by_products(log_weights: Tensor, loc: Tensor, scale: Tensor, value: Tensor) -> Tensor:
    """``log pi_c + log Normal(z; mu_c, diag(sigma_c^2))`` of values ``(*, D)``: ``(*, C)``."""
    value, loc = value.double(), loc.double()
    precision = scale.double().pow(-2)
    squares = value.square() @ precision.t() - 2 * value @ (loc * precision).t()
    squares = squares + (loc.square() * precision).sum(-1)
    constant = log_weights - scale.log().sum(-1) - 0.5 * math.log(2 * math.pi) * loc.shape[-1]
    return constant - 0.5 * squares.to(constant.dtype)
