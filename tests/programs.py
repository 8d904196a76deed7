"""Small programs with known answers, and the checks that right and wrong estimators share.

Every pair of section two works on replicated data whose parameters are replicated too: datum b has
parameters of its own, so that one backward pass gives B independent samples of the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

import pvae
from pvae.gradients import Gradient, pathwise

SE = 4.5
"""Standard errors that a Monte Carlo mean may be off; seeds are fixed, so red can be replayed."""

IDENTITY = 1e-10
"""Tolerance of an algebraic identity in float64."""


def z_score(samples: Tensor, truth: Tensor | float) -> Tensor:
    """How many of its own standard errors the mean over dimension 0 is off the truth."""
    return (samples.mean(0) - truth).abs() / (samples.std(0) / math.sqrt(len(samples)))


# --- one: linear-Gaussian and discrete pairs whose evidence is known ----------------------------


class LinearGaussian(nn.Module):
    """``z ~ Normal(0, I)``, ``x | z ~ Normal(W z + b, noise)``; ``total`` subsamples the plate."""

    def __init__(self, x_dim: int = 5, z_dim: int = 2, total: int | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        self.weight = nn.Parameter(torch.randn(x_dim, z_dim, generator=generator))
        self.offset = nn.Parameter(torch.randn(x_dim, generator=generator))
        self.log_noise = nn.Parameter(torch.full((), -0.3))
        self.total = total

    def plate(self, x: Tensor) -> pyro.plate:
        """Over the batch, or over ``total`` data of which the batch is a part."""
        if self.total is None:
            return pyro.plate("data", len(x), dim=-1)
        return pyro.plate("data", self.total, subsample=x, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """The program."""
        prior = dist.Normal(self.weight.new_zeros(self.weight.shape[1]), 1.0).to_event(1)
        with self.plate(x):
            z = pyro.sample("z", prior)
            loc = z @ self.weight.T + self.offset
            return pyro.sample("x", dist.Normal(loc, self.log_noise.exp()).to_event(1), obs=x)

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """``p(z | x)``."""
        precision = (-2 * self.log_noise).exp()
        inverse = torch.eye(self.weight.shape[1]).to(x) + self.weight.T @ self.weight * precision
        loc = torch.linalg.solve(inverse, self.weight.T @ (x - self.offset).T * precision).T
        return dist.MultivariateNormal(loc, precision_matrix=inverse)

    def log_evidence(self, x: Tensor) -> Tensor:
        """``log p(x)``, ``(B,)`` nats."""
        covariance = self.weight @ self.weight.T
        covariance = covariance + torch.eye(x.shape[1]).to(x) * (2 * self.log_noise).exp()
        return dist.MultivariateNormal(self.offset, covariance).log_prob(x)


class ExactGuide(nn.Module):
    """``q(z | x) = p(z | x)``."""

    def __init__(self, model: LinearGaussian) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> None:
        """The program."""
        with self.model.plate(x):
            pyro.sample("z", self.model.posterior(x))


class AffineGuide(nn.Module):
    """``q(z | x) = Normal(A x + a, sd)``, apart from the posterior."""

    def __init__(self, x_dim: int = 5, z_dim: int = 2, total: int | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(12)
        self.map = nn.Parameter(0.3 * torch.randn(z_dim, x_dim, generator=generator))
        self.shift = nn.Parameter(torch.zeros(z_dim))
        self.log_sd = nn.Parameter(torch.full((z_dim,), -0.4))
        self.total = total

    plate = LinearGaussian.plate

    def forward(self, x: Tensor) -> Tensor:
        """The program."""
        with self.plate(x):
            loc = x @ self.map.T + self.shift
            return pyro.sample("z", dist.Normal(loc, self.log_sd.exp()).to_event(1))


def linear_gaussian(size: int = 6, total: int | None = None) -> tuple[LinearGaussian, Tensor]:
    """A float64 model, and data that it generated."""
    model = LinearGaussian(total=total).double()
    with torch.no_grad():
        z = torch.randn(size, 2, dtype=torch.float64)
        noise = torch.randn(size, 5, dtype=torch.float64) * model.log_noise.exp()
        return model, z @ model.weight.T + model.offset + noise


def guide_near_posterior(
    model: LinearGaussian, *, move: float, widen: float
) -> Callable[[Tensor], None]:
    """The posterior with its mean moved by ``move`` sd's and its sd multiplied by ``widen``."""

    def guide(x: Tensor) -> None:
        posterior = model.posterior(x)
        loc = posterior.mean + move * posterior.variance.sqrt()
        with model.plate(x):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=widen * posterior.scale_tril))

    return guide


class Mixture(nn.Module):
    """``c ~ Categorical(pi)``, ``x | c ~ Normal(loc_c, 1)``; its exact posterior is a method."""

    def __init__(self, x_dim: int = 3, components: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(13)
        self.logits = nn.Parameter(torch.randn(components, generator=generator))
        self.loc = nn.Parameter(torch.randn(components, x_dim, generator=generator))

    def forward(self, x: Tensor) -> None:
        """The program."""
        with pyro.plate("data", len(x), dim=-1):
            c = pyro.sample("c", dist.Categorical(logits=self.logits))
            pyro.sample("x", dist.Normal(self.loc[c], 1.0).to_event(1), obs=x)

    def log_joint(self, x: Tensor) -> Tensor:
        """``log p(x, c)``: ``(B, C)``."""
        log_prob = dist.Normal(self.loc, 1.0).to_event(1).log_prob(x[:, None])
        return self.logits.log_softmax(-1) + log_prob

    def posterior_guide(self, x: Tensor) -> None:
        """``q(c | x) = p(c | x)``."""
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("c", dist.Categorical(logits=self.log_joint(x)))

    def log_evidence(self, x: Tensor) -> Tensor:
        """``log p(x)``, ``(B,)`` nats."""
        return self.log_joint(x).logsumexp(-1)


class PyroStyleVAE(nn.Module):
    """The way of Pyro's examples: methods ``model`` and ``guide``, ``pyro.module`` in both."""

    def __init__(self, x_dim: int = 5, z_dim: int = 2) -> None:
        super().__init__()
        self.z_dim = z_dim
        self.decoder = nn.Linear(z_dim, x_dim)
        self.encoder = nn.Linear(x_dim, 2 * z_dim)

    def model(self, x: Tensor) -> Tensor:
        """``p(x, z)``."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            zeros = x.new_zeros(torch.Size((x.shape[0], self.z_dim)))
            z = pyro.sample("latent", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            return pyro.sample("obs", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """``q(z | x)``."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, log_sd = self.encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, log_sd.exp()).to_event(1))


# --- two: pairs of single numbers, whose bounds and gradients are exact by quadrature -----------


@dataclass(frozen=True)
class Nodes:
    """All values a particle may take, each ``(Q,)``: mass and log densities."""

    mass: Tensor
    likelihood: Tensor
    prior: Tensor
    log_q: Tensor

    def log_weights(self, beta: float) -> Tensor:
        """``log p(x|z) + beta (log p(z) - log q(z|x))``."""
        return self.likelihood + beta * (self.prior - self.log_q)


def exact_bound(
    nodes: Nodes, bound: Callable[[Tensor], Tensor], num_particles: int, *, beta: float = 1.0
) -> Tensor:
    """``E[bound(log w_1, ..., log w_K)]`` by summing over all K-tuples of nodes."""
    count = len(nodes.mass)
    index = torch.cartesian_prod(*[torch.arange(count)] * num_particles).T
    return (nodes.mass[index].prod(0) * bound(nodes.log_weights(beta)[index])).sum()


def _hermite(order: int) -> tuple[Tensor, Tensor]:
    nodes, mass = np.polynomial.hermite_e.hermegauss(order)
    return torch.tensor(nodes), torch.tensor(mass / mass.sum())


def _normal(value: Tensor, loc: Tensor | float, sd: Tensor | float) -> Tensor:
    return dist.Normal(loc, sd).log_prob(value)


class _Program(nn.Module):
    def __init__(self, values: Mapping[str, float], size: int, run: Callable[..., None]) -> None:
        super().__init__()
        for name, value in values.items():
            setattr(self, name, nn.Parameter(torch.full((size,), value, dtype=torch.float64)))
        self.run = run

    def forward(self, x: Tensor) -> None:
        self.run(self, x)


class Pair:
    """One datum's model and guide over single numbers, as programs and as quadrature nodes."""

    x = 0.9
    num_particles = 3
    model_values: Mapping[str, float]
    guide_values: Mapping[str, float]

    def programs(
        self, size: int, *, subsample: bool = False, scale: float = 1.0
    ) -> tuple[Callable[[Tensor], None], Callable[[Tensor], None], Tensor]:
        """Model, guide and batch of ``size`` copies; a third of the data, where subsampled."""
        total = 3 * size if subsample else size

        def plated(run: Callable[..., None]) -> Callable[..., None]:
            def program(module: nn.Module, x: Tensor) -> None:
                plate = pyro.plate("data", total, subsample=x, dim=-1)
                with poutine.scale(scale=scale), plate:
                    run(module, x)

            return program

        model = _Program(self.model_values, size, plated(self.model))
        guide = _Program(self.guide_values, size, plated(self.guide))
        return model, guide, torch.full((size,), self.x, dtype=torch.float64)

    def model(self, p: nn.Module, x: Tensor) -> None:
        """The generative program, inside the plate."""
        raise NotImplementedError

    def guide(self, p: nn.Module, x: Tensor) -> None:
        """The inference program, inside the plate."""
        raise NotImplementedError

    def nodes(self, p: Mapping[str, Tensor]) -> Nodes:
        """The same pair written without Pyro."""
        raise NotImplementedError

    def scalars(self) -> dict[str, Tensor]:
        """Each parameter once, to differentiate the exact bound by."""
        values = {**self.model_values, **self.guide_values}
        return {
            n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in values.items()
        }


class OneSite(Pair):
    """``z ~ N(m, 1)``, ``x | z ~ N(w z, e^n)``; ``q = N(c, e^s)``."""

    model_values = {"w": 1.3, "m": 0.2, "n": -0.4}
    guide_values = {"c": 0.1, "s": -0.2}

    def model(self, p, x):
        z = pyro.sample("z", dist.Normal(p.m, 1.0))
        pyro.sample("x", dist.Normal(p.w * z, p.n.exp()), obs=x)

    def guide(self, p, x):
        pyro.sample("z", dist.Normal(p.c, p.s.exp()))

    def nodes(self, p):
        eps, mass = _hermite(44)
        z = p["c"] + p["s"].exp() * eps
        x = torch.tensor(self.x, dtype=torch.float64)
        return Nodes(
            mass,
            _normal(x, p["w"] * z, p["n"].exp()),
            _normal(z, p["m"], 1.0),
            _normal(z, p["c"], p["s"].exp()),
        )


class TwoSites(Pair):
    """``z2 ~ N(0, 1)``, ``z1 | z2 ~ N(a z2, 0.7)``, ``x | z1 ~ N(w z1, 0.8)``; q runs bottom up."""

    num_particles = 2
    order = 18
    model_values = {"a": 0.8, "w": 1.1}
    guide_values = {"c": 0.4, "s": -0.4, "d": 0.6, "e": -0.3, "t": -0.2}

    def model(self, p, x):
        z2 = pyro.sample("z2", dist.Normal(torch.zeros_like(x), 1.0))
        z1 = pyro.sample("z1", dist.Normal(p.a * z2, 0.7))
        pyro.sample("x", dist.Normal(p.w * z1, 0.8), obs=x)

    def guide(self, p, x):
        z1 = pyro.sample("z1", dist.Normal(p.c, p.s.exp()))
        pyro.sample("z2", dist.Normal(p.d * z1 + p.e, p.t.exp()))

    def nodes(self, p):
        eps, mass = _hermite(self.order)
        eps1, eps2 = torch.cartesian_prod(eps, eps).T
        z1 = p["c"] + p["s"].exp() * eps1
        z2 = p["d"] * z1 + p["e"] + p["t"].exp() * eps2
        x = torch.tensor(self.x, dtype=torch.float64)
        return Nodes(
            torch.cartesian_prod(mass, mass).prod(-1),
            _normal(x, p["w"] * z1, 0.8),
            _normal(z2, 0.0, 1.0) + _normal(z1, p["a"] * z2, 0.7),
            _normal(z1, p["c"], p["s"].exp()) + _normal(z2, p["d"] * z1 + p["e"], p["t"].exp()),
        )


class DiscreteSite(Pair):
    """``c ~ Bernoulli(sigmoid(r))``, ``x | c ~ N(w c, 0.8)``; ``q = Bernoulli(sigmoid(u))``."""

    model_values = {"r": -0.4, "w": 1.2}
    guide_values = {"u": 0.3}

    def model(self, p, x):
        c = pyro.sample("c", dist.Bernoulli(logits=p.r))
        pyro.sample("x", dist.Normal(p.w * c, 0.8), obs=x)

    def guide(self, p, x):
        pyro.sample("c", dist.Bernoulli(logits=p.u))

    def nodes(self, p):
        c = torch.tensor([0.0, 1.0], dtype=torch.float64)
        x = torch.tensor(self.x, dtype=torch.float64)
        log_q = dist.Bernoulli(logits=p["u"]).log_prob(c)
        prior = dist.Bernoulli(logits=p["r"]).log_prob(c)
        return Nodes(log_q.exp(), _normal(x, p["w"] * c, 0.8), prior, log_q)


class MixedSites(Pair):
    """``c ~ Bernoulli``, ``z | c ~ N(m c, 1)``, ``x | z ~ N(w z, 0.8)``; q has the same order."""

    num_particles = 2
    model_values = {"r": -0.4, "m": 1.5, "w": 1.1}
    guide_values = {"u": 0.3, "k": 0.2, "v": 0.5, "s": -0.3}

    def model(self, p, x):
        c = pyro.sample("c", dist.Bernoulli(logits=p.r))
        z = pyro.sample("z", dist.Normal(p.m * c, 1.0))
        pyro.sample("x", dist.Normal(p.w * z, 0.8), obs=x)

    def guide(self, p, x):
        c = pyro.sample("c", dist.Bernoulli(logits=p.u))
        pyro.sample("z", dist.Normal(p.k + p.v * c, p.s.exp()))

    def nodes(self, p):
        eps, mass = _hermite(36)
        c, eps = torch.cartesian_prod(torch.tensor([0.0, 1.0], dtype=torch.float64), eps).T
        log_qc = dist.Bernoulli(logits=p["u"]).log_prob(c)
        z = p["k"] + p["v"] * c + p["s"].exp() * eps
        x = torch.tensor(self.x, dtype=torch.float64)
        return Nodes(
            log_qc.exp() * mass.repeat(2),
            _normal(x, p["w"] * z, 0.8),
            dist.Bernoulli(logits=p["r"]).log_prob(c) + _normal(z, p["m"] * c, 1.0),
            log_qc + _normal(z, p["k"] + p["v"] * c, p["s"].exp()),
        )


_EXACT: dict[tuple[str, str, float], dict[str, Tensor]] = {}


def exact_gradient(pair: Pair, bound: Callable[[Tensor], Tensor], *, beta: float = 1.0) -> Mapping:
    """The bound's gradient by parameter name, through all K-tuples of nodes; computed once."""
    key = (type(pair).__name__, repr(bound), beta)
    if key not in _EXACT:
        scalars = pair.scalars()
        value = exact_bound(pair.nodes(scalars), bound, pair.num_particles, beta=beta)
        gradients = torch.autograd.grad(value, list(scalars.values()))
        _EXACT[key] = dict(zip(scalars, gradients, strict=True))
    return _EXACT[key]


def gradient_samples(
    pair: Pair, objective: pvae.Objective, *, size: int, seed: int = 1, **options: Any
) -> dict[str, Tensor]:
    """``size`` independent samples of the bound's gradient, by parameter name: ``(size,)`` each.

    They are taken from the loss as SVI sees it, so each counts ``options["scale"]`` times, and
    three times where the plate is subsampled.
    """
    model, guide, x = pair.programs(size, **options)
    torch.manual_seed(seed)
    objective(model, guide, x).backward()
    named = [*model.named_parameters(), *guide.named_parameters()]
    return {name: -parameter.grad for name, parameter in named}


def gradient_bias(
    pair: Pair,
    bound: Callable[[Tensor], Tensor],
    gradient: Gradient = pathwise,
    *,
    beta: float = 1.0,
    objective: Callable[..., pvae.Objective] = pvae.Objective,
    particles: int = 200_000,
    subsample: bool = False,
    scale: float = 1.0,
) -> float:
    """The largest deviation of an estimator's mean from the exact gradient, in standard errors."""
    truth = exact_gradient(pair, bound, beta=beta)
    built = objective(bound=bound, gradient=gradient, num_particles=pair.num_particles, beta=beta)
    size = particles // pair.num_particles
    samples = gradient_samples(pair, built, size=size, subsample=subsample, scale=scale)
    factor = scale * (3 if subsample else 1)
    return max(float(z_score(samples[name], factor * truth[name])) for name in truth)


def data_in_columns(x: Tensor) -> None:
    """``z ~ N(0, 1)`` for each column of x, its entries ``N(z, 0.3^2)``: a row is no datum."""
    with pyro.plate("data", x.shape[1], dim=-1):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("time", len(x), dim=-2):
            pyro.sample("x", dist.Normal(z, 0.3), obs=x)
