"""Pairs with continuous latents whose evidence is exact, for the estimators that anneal.

Each function gives a model that generates (``model(size=n)``), a guide some way off the posterior,
and the log evidence ``(N,)`` of data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pvae.models.factor_analysis import FactorAnalysis


class Pair(NamedTuple):
    """Programs and the truth about them."""

    model: Callable[..., Tensor]
    guide: Callable[[Tensor], None]
    log_evidence: Callable[[Tensor], Tensor]

    def data(self, size: int, seed: int = 5) -> Tensor:
        """Data that the model drew."""
        torch.manual_seed(seed)
        with torch.no_grad():
            return self.model(size=size)


def plate(x: Tensor | None, size: int) -> pyro.plate:
    """Over the data, or over as many as are to be drawn."""
    return pyro.plate("data", size if x is None else len(x), dim=-1)


def number(value: float) -> Tensor:
    """A float64 scalar."""
    return torch.tensor(value, dtype=torch.float64)


def factor_analysis(
    z_dim: int = 3, *, move: float = 0.4, widen: float = 1.3, strength: float = 1.0
) -> Pair:
    """Linear-Gaussian; the guide is diagonal, moved and widened."""
    torch.manual_seed(4)
    model = FactorAnalysis(2 * z_dim, z_dim=z_dim).double().requires_grad_(False)
    model.loadings.mul_(strength)

    def guide(x: Tensor) -> None:
        exact = model.posterior(x)["z"]
        sd = exact.variance.sqrt()
        with plate(x, 0):
            pyro.sample("z", dist.Normal(exact.mean + move * sd, widen * sd).to_event(1))

    return Pair(model, guide, model.log_evidence)


def gamma_poisson(counts: int = 3) -> Pair:
    """``z ~ Gamma(2, 0.5)``, ``counts`` numbers ``~ Poisson(z)``: one positive latent."""
    shape, rate = number(2.0), number(0.5)

    def model(x: Tensor | None = None, size: int = 1) -> Tensor:
        with plate(x, size):
            z = pyro.sample("z", dist.Gamma(shape, rate))
            rates = z.unsqueeze(-1).expand(*z.shape, counts)
            return pyro.sample("x", dist.Poisson(rates).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with plate(x, 0):
            loc = ((x.sum(-1) + 2) / (counts + 0.5)).log()
            pyro.sample("z", dist.LogNormal(loc, 0.7))

    def log_evidence(x: Tensor) -> Tensor:
        total = x.sum(-1)
        end = torch.lgamma(shape + total) - (shape + total) * (rate + counts).log()
        start = shape * rate.log() - torch.lgamma(shape)
        return start + end - torch.lgamma(x + 1).sum(-1)

    return Pair(model, guide, log_evidence)


def hierarchical() -> Pair:
    """``z2 ~ N(0, I_2)``, ``z1 | z2 ~ N(A z2, 0.7)``, ``x | z1 ~ N(W z1, 0.6)``: two levels."""
    torch.manual_seed(6)
    upper, lower = torch.randn(3, 2).double(), torch.randn(4, 3).double()
    inward = torch.linalg.solve(lower.T @ lower + 0.5 * torch.eye(3).double(), lower.T)

    def model(x: Tensor | None = None, size: int = 1) -> Tensor:
        with plate(x, size):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2 @ upper.T, 0.7).to_event(1))
            return pyro.sample("x", dist.Normal(z1 @ lower.T, 0.6).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with plate(x, 0):
            z1 = pyro.sample("z1", dist.Normal(x @ inward.T, 0.8).to_event(1))
            pyro.sample("z2", dist.Normal(0.2 * z1 @ upper, 0.9).to_event(1))

    def log_evidence(x: Tensor) -> Tensor:
        within = upper @ upper.T + 0.49 * torch.eye(3).double()
        covariance = lower @ within @ lower.T + 0.36 * torch.eye(4).double()
        return dist.MultivariateNormal(torch.zeros(4).double(), covariance).log_prob(x)

    return Pair(model, guide, log_evidence)


def two_modes() -> Pair:
    """``z`` from a mixture of two Gaussians, ``x | z ~ N(z, 1)``: summed over the component."""
    weights, loc = torch.tensor([0.3, 0.7]).double(), torch.tensor([-1.5, 1.5]).double()

    def model(x: Tensor | None = None, size: int = 1) -> Tensor:
        parts = dist.Categorical(weights), dist.Normal(loc, 0.5)
        with plate(x, size):
            z = pyro.sample("z", dist.MixtureSameFamily(*parts))
            return pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with plate(x, 0):
            pyro.sample("z", dist.Normal(0.5 * x, 1.2))

    def log_evidence(x: Tensor) -> Tensor:
        parts = dist.Normal(loc, math.sqrt(1.25)).log_prob(x[:, None])
        return (weights.log() + parts).logsumexp(-1)

    return Pair(model, guide, log_evidence)


def below_another() -> Pair:
    """``z2 ~ Gamma(2, 1)``, ``z1 | z2 ~ U(0, z2)``, ``x ~ Poisson(z1)``: ``p(x) = 2^-(x + 1)``.

    One latent's support hangs on the other's value; ``z1`` alone is exponential.
    """

    def model(x: Tensor | None = None, size: int = 1) -> Tensor:
        with plate(x, size):
            z2 = pyro.sample("z2", dist.Gamma(number(2.0), number(1.0)))
            z1 = pyro.sample("z1", dist.Uniform(torch.zeros_like(z2), z2))
            return pyro.sample("x", dist.Poisson(z1), obs=x)

    def guide(x: Tensor) -> None:
        with plate(x, 0):
            z2 = pyro.sample("z2", dist.Gamma(2.0 + 0.5 * x, number(1.0)))
            pyro.sample("z1", dist.Uniform(torch.zeros_like(z2), z2))

    return Pair(model, guide, lambda x: -(x + 1) * math.log(2))


def dirichlet_multinomial() -> Pair:
    """``z ~ Dirichlet(a)``, ``x | z ~ Multinomial(8, z)``: a latent on the simplex."""
    concentration = torch.tensor([1.5, 1.0, 2.5]).double()

    def model(x: Tensor | None = None, size: int = 1) -> Tensor:
        with plate(x, size):
            z = pyro.sample("z", dist.Dirichlet(concentration))
            return pyro.sample("x", dist.Multinomial(8, z), obs=x)

    def guide(x: Tensor) -> None:
        with plate(x, 0):
            pyro.sample("z", dist.Dirichlet(1.0 + 0.6 * x))

    def log_evidence(x: Tensor) -> Tensor:
        return dist.DirichletMultinomial(concentration, 8).log_prob(x)

    return Pair(model, guide, log_evidence)


def columns() -> Pair:
    """Three numbers for each datum on a plate of their own, right of the data: ``dim=-2``."""

    def model(x: Tensor | None = None, size: int = 1) -> Tensor:
        rows = size if x is None else len(x)
        with pyro.plate("data", rows, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(rows, 1).double(), 1.0))
            with pyro.plate("columns", 3, dim=-1):
                w = pyro.sample("w", dist.Normal(torch.zeros(rows, 3).double(), 0.5))
                return pyro.sample("x", dist.Normal(z + w, 0.8), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.7 * x.mean(-1, keepdim=True), 0.6))
            with pyro.plate("columns", 3, dim=-1):
                pyro.sample("w", dist.Normal(0.3 * (x - z), 0.5))

    def log_evidence(x: Tensor) -> Tensor:
        covariance = 1.0 + (0.25 + 0.64) * torch.eye(3).double()
        return dist.MultivariateNormal(torch.zeros(3).double(), covariance).log_prob(x)

    return Pair(model, guide, log_evidence)


PAIRS: dict[str, Callable[[], Pair]] = {
    "factor analysis": factor_analysis,
    "gamma-Poisson": gamma_poisson,
    "two levels": hierarchical,
    "two modes": two_modes,
    "dependent support": below_another,
    "simplex": dirichlet_multinomial,
    "inner plate": columns,
}
