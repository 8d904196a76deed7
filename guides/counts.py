"""An amortised posterior of counts whose families follow the supports of the latent sites.

q(z | x) = prod_site family_site(z_site; head_site(encoder(log(1 + x))))

A real site gets a Normal, a positive one a Gamma or a LogNormal, one on the simplex a Dirichlet.
The logarithm keeps one large count from drowning the others (Lopez et al. 2018).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from pvae.errors import OptionError, ProgramError, did_you_mean
from pvae.networks import MLP
from pvae.particles import site_priors

__all__ = ["Counts"]

_POSITIVE = ("gamma", "log_normal")


class Counts(nn.Module):
    """Mean field over latent sites that are real, positive or on the simplex, given counts.

    Args:
        x_dim: Number of features of a datum.
        latents: Latent site -> event shape, as a model's ``latents`` gives it.
        model: The model, whose sites' supports are looked up.
        hidden: Width of each hidden layer of the encoder.
        activation: Its non-linearity.
        positive: Family of positive sites: log_normal or gamma.

    Raises:
        OptionError: there is no such family.
        ProgramError: a site has another support.
    """

    def __init__(
        self,
        x_dim: int,
        latents: Mapping[str, Sequence[int]],
        model: Any,
        *,
        hidden: Sequence[int] = (128, 128),
        activation: str = "silu",
        positive: str = "log_normal",
    ) -> None:
        super().__init__()
        if positive not in _POSITIVE:
            raise OptionError(
                f"no family is called {positive!r}: {did_you_mean(positive, _POSITIVE)}"
            )
        self.latents = {name: tuple(shape) for name, shape in latents.items()}
        self.positive = positive
        self.supports = {n: _support(n, p) for n, p in site_priors(model, latents).items()}
        self.encoder = MLP(x_dim, sum(self._sizes()), hidden, activation_name=activation)

    def _sizes(self) -> list[int]:
        return [
            math.prod(shape) * (1 if self.supports[name] == "simplex" else 2)
            for name, shape in self.latents.items()
        ]

    def forward(self, x: Tensor) -> None:
        """Sample every latent site given counts ``x`` of shape ``(B, x_dim)``."""
        with pyro.plate("data", len(x), dim=-1):
            for name, posterior in self.posterior(x).items():
                pyro.sample(name, posterior)

    def posterior(self, x: Tensor) -> dict[str, Any]:
        """``q(z_site | x)`` for every site, batch shape ``(B,)``."""
        output = self.encoder(x.clamp(min=0).log1p())
        parts = output.split(self._sizes(), -1)
        return {
            name: self._family(name, part) for name, part in zip(self.latents, parts, strict=True)
        }

    def _family(self, name: str, part: Tensor) -> Any:
        shape, support = self.latents[name], self.supports[name]
        if support == "simplex":
            return dist.Dirichlet(softplus(part) + 1e-2)
        loc, raw = part.reshape(*part.shape[:-1], 2, *shape).unbind(part.dim() - 1)
        scale = softplus(raw) + 1e-4
        if support == "positive" and self.positive == "gamma":
            concentration = softplus(loc) + 1e-2
            return dist.Gamma(concentration, concentration / scale).to_event(len(shape))
        family = dist.LogNormal if support == "positive" else dist.Normal
        return family(loc, scale).to_event(len(shape))


def _support(name: str, prior: Any) -> str:
    support = prior.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is constraints.simplex and len(prior.event_shape) == 1:
        return "simplex"
    if support is constraints.real:
        return "real"
    if support in (constraints.positive, constraints.nonnegative):
        return "positive"
    raise ProgramError(
        f"site {name!r} takes values in {support}, for which the counts guide has no family: use "
        "another guide"
    )
