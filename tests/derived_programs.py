"""Models for which guides are derived: each a factory of a program and a batch, without a guide.

The second half is written the way Pyro's own examples and tutorials state such models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

from pvae.models.factor_analysis import FactorAnalysis
from pvae.networks import MLP

Program = tuple[Callable[..., Any], Any]

ROWS = 6


def normal(size: int, loc: Any = 0.0, scale: Any = 1.0) -> Any:
    return dist.Normal(loc + torch.zeros(size), scale).to_event(1)


def data(x: Tensor) -> pyro.plate:
    return pyro.plate("data", len(x), dim=-1)


def binary(*shape: int) -> Tensor:
    return torch.rand(*shape).bernoulli()


# --- one: autoencoders, mixtures, topics, time ----------------------------------------------------


class SmallVAE(nn.Module):
    """``z ~ N(0, I)``, ``x | z`` Bernoulli."""

    def __init__(self, x_dim: int = 9, z_dim: int = 3) -> None:
        super().__init__()
        self.decoder, self.z_dim = MLP(z_dim, x_dim, (16,)), z_dim

    def forward(self, x: Tensor) -> None:
        with data(x):
            z = pyro.sample("z", normal(self.z_dim))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)


class TwoLayer(nn.Module):
    """``z2 -> z1 -> x``."""

    def __init__(self) -> None:
        super().__init__()
        self.upper, self.lower = MLP(2, 6, (16,)), MLP(3, 9, (16,))

    def forward(self, x: Tensor) -> None:
        with data(x):
            z2 = pyro.sample("z2", normal(2))
            loc, scale = self.upper(z2).chunk(2, -1)
            z1 = pyro.sample("z1", dist.Normal(loc, nn.functional.softplus(scale)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.lower(z1)).to_event(1), obs=x)


class MixtureVAE(nn.Module):
    """``c -> z -> x`` with c one of four."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.decoder = nn.Parameter(torch.randn(4, 2)), MLP(2, 9, (16,))

    def forward(self, x: Tensor) -> None:
        with data(x):
            c = pyro.sample("c", dist.Categorical(torch.ones(4) / 4))
            z = pyro.sample("z", dist.Normal(self.loc[c], 0.5).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)


class SemiSupervised(nn.Module):
    """M2: the style is drawn first, the label is one-hot and given or not."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = MLP(2 + 3, 9, (16,))

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        with data(x):
            z = pyro.sample("z", normal(2))
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(3) / 3), obs=y)
            y = y.expand(*z.shape[:-1], 3)
            logits = self.decoder(torch.cat([z, y], -1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


class MaskedLabels(nn.Module):
    """M2 in one pass: ``known`` says whose label is given."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = MLP(2 + 1, 9, (16,))

    def forward(self, x: Tensor, y: Tensor, known: Tensor) -> None:
        with data(x):
            y = pyro.sample("y", dist.Categorical(torch.ones(3) / 3), obs=y, obs_mask=known)
            z = pyro.sample("z", normal(2))
            y = y.unsqueeze(-1).expand(*z.shape[:-1], 1).to(z.dtype)
            logits = self.decoder(torch.cat([z, y], -1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


class Topics(nn.Module):
    """Counts of words, topics on the simplex: a Dirichlet or a logistic normal."""

    def __init__(self, prior: str) -> None:
        super().__init__()
        self.prior, self.words = prior, nn.Parameter(torch.randn(3, 12))

    def forward(self, x: Tensor) -> None:
        with data(x):
            if self.prior == "dirichlet":
                theta = pyro.sample("theta", dist.Dirichlet(torch.full((3,), 0.7)))
            else:
                theta = pyro.sample("log_theta", normal(3)).softmax(-1)
            probs = (theta @ self.words).softmax(-1)
            total = int(x.sum(-1).max())
            pyro.sample("x", dist.Multinomial(total, probs, validate_args=False), obs=x)


def groups(x: Tensor) -> None:
    """Each datum is a set of numbers with a mean and a value for each element."""
    with pyro.plate("data", len(x), dim=-2):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("elements", x.shape[1], dim=-1):
            u = pyro.sample("u", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(u, 0.5), obs=x)


def state_space(x: Tensor) -> None:
    """A random walk, seen with noise at each step of a loop."""
    z = torch.zeros(2).to(x)
    with data(x):
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 0.7).to_event(1))
            pyro.sample(f"x_{t}", dist.Normal(z, 0.5).to_event(1), obs=x[:, t])


def positive_parts(x: Tensor) -> None:
    """Gamma, Dirichlet and log-normal latents, and a correlation."""
    with data(x):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        size = pyro.sample("size", dist.LogNormal(0.0, 0.5))
        corner = pyro.sample("corner", dist.LKJCholesky(3, 2.0))
        loc = (rate * size).unsqueeze(-1) * share
        pyro.sample("x", dist.MultivariateNormal(loc, scale_tril=corner), obs=x)


class Pictures(nn.Module):
    """Images ``(B, C, H, W)``."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(3, 2 * 8 * 8)

    def forward(self, x: Tensor) -> None:
        with data(x):
            z = pyro.sample("z", normal(3))
            logits = self.decoder(z)
            logits = logits.reshape(*logits.shape[:-1], 2, 8, 8)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)


# --- two: the way Pyro's examples are written -----------------------------------------------------


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfCauchy(25.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("obs", dist.Normal(theta, sigma), obs=y)


def baseball(at_bats: Tensor, hits: Tensor) -> None:
    mean = pyro.sample("mean", dist.Uniform(0.0, 1.0))
    strength = pyro.sample("strength", dist.Pareto(1.0, 1.5))
    with pyro.plate("players", len(hits)):
        skill = pyro.sample("skill", dist.Beta(mean * strength, (1 - mean) * strength))
        pyro.sample("hits", dist.Binomial(at_bats, skill), obs=hits)


class SparseGamma:
    """A deep exponential family: gamma weights for all data, two gamma layers for each."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("upper_weights", 3 * 4):
            upper = pyro.sample("w_upper", dist.Gamma(0.5, 0.5))
        with pyro.plate("lower_weights", 4 * 10):
            lower = pyro.sample("w_lower", dist.Gamma(0.5, 0.5))
        upper = upper.reshape(*upper.shape[:-1], 3, 4).clamp(min=1e-4)
        lower = lower.reshape(*lower.shape[:-1], 4, 10).clamp(min=1e-4)
        with pyro.plate("data", x.size(0)):
            top = pyro.sample("z_top", dist.Gamma(0.5, 0.5).expand([3]).to_event(1))
            mean = (top @ upper).clamp(min=1e-4)
            low = pyro.sample("z_low", dist.Gamma(0.5, 0.5 / mean).to_event(1))
            mean = (low @ lower).clamp(min=1e-4)
            pyro.sample("obs", dist.Poisson(mean).to_event(1), obs=x)


def latent_dirichlet(words: Tensor) -> None:
    """Word ids ``(B, N)``; each word's topic is a site that may be enumerated."""
    with pyro.plate("topics", 3):
        weights = pyro.sample("topic_weights", dist.Gamma(1.0, 1.0))
        topics = pyro.sample("topic_words", dist.Dirichlet(torch.ones(8) / 2))
    with pyro.plate("documents", len(words)):
        shares = pyro.sample("doc_topics", dist.Dirichlet(weights.unsqueeze(-2) + 0.1))
        with pyro.plate("words", words.shape[1]):
            topic = pyro.sample(
                "word_topics", dist.Categorical(shares), infer={"enumerate": "parallel"}
            )
            probs = Vindex(topics.unsqueeze(-3))[..., topic, :]
            pyro.sample("doc_words", dist.Categorical(probs), obs=words.T)


class DeepMarkov(nn.Module):
    """Sequences of different lengths, padded: a mask at each step, for latent and data alike."""

    def __init__(self) -> None:
        super().__init__()
        self.transition, self.emission = MLP(2, 4, (8,)), MLP(2, 5, (8,))
        self.start = nn.Parameter(torch.zeros(2))

    def model(self, batch: Tensor, mask: Tensor, annealing: float = 1.0) -> None:
        pyro.module("dmm", self)
        previous = self.start.expand(batch.size(0), 2)
        with pyro.plate("sequences", len(batch)):
            for t in range(1, batch.size(1) + 1):
                loc, scale = self.transition(previous).chunk(2, -1)
                with poutine.scale(scale=annealing), poutine.mask(mask=mask[:, t - 1]):
                    z = pyro.sample(
                        f"z_{t}", dist.Normal(loc, nn.functional.softplus(scale)).to_event(1)
                    )
                with poutine.mask(mask=mask[:, t - 1]):
                    pyro.sample(
                        f"obs_x_{t}",
                        dist.Bernoulli(logits=self.emission(z)).to_event(1),
                        obs=batch[:, t - 1],
                    )
                previous = z


class Conditional(nn.Module):
    """A conditional VAE: the prior of z depends on a covariate, as the decoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.prior, self.generation = MLP(4, 4, (8,)), MLP(2 + 4, 9, (8,))

    def model(self, xs: Tensor, ys: Tensor) -> None:
        pyro.module("generation", self)
        with pyro.plate("data", len(xs)):
            loc, scale = self.prior(xs).chunk(2, -1)
            z = pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))
            both = torch.cat([z, xs.expand(*z.shape[:-1], 4)], -1)
            pyro.sample("y", dist.Bernoulli(logits=self.generation(both)).to_event(1), obs=ys)


class SingleCell(nn.Module):
    """Counts with a library size: labels above, two continuous layers, one positive scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.z1, self.genes = MLP(2 + 3, 4, (8,)), MLP(2, 10, (8,))

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("cells", self)
        with pyro.plate("batch", len(x)):
            z2 = pyro.sample("z2", normal(2))
            y = pyro.sample("y", dist.OneHotCategorical(logits=torch.zeros(3)), obs=y)
            both = torch.cat([z2, y.expand(*z2.shape[:-1], 3)], -1)
            loc, scale = self.z1(both).chunk(2, -1)
            z1 = pyro.sample("z1", dist.Normal(loc, nn.functional.softplus(scale)).to_event(1))
            size = pyro.sample("l", dist.LogNormal(3.0, 0.5))
            rate = size.unsqueeze(-1) * self.genes(z1).softmax(-1)
            logits = rate.log() - 1.0
            pyro.sample("x", dist.NegativeBinomial(2.7, logits=logits).to_event(1), obs=x)


def logistic_regression(x: Tensor, y: Tensor) -> None:
    weights = pyro.sample("weights", normal(4))
    bias = pyro.sample("bias", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        logits = (x * weights).sum(-1) + bias
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def item_response(answers: Tensor) -> None:
    """Abilities of students, difficulties of items, in crossed plates."""
    items = pyro.plate("items", answers.shape[1], dim=-1)
    with items:
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
    with pyro.plate("students", len(answers), dim=-2):
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
        with items:
            pyro.sample("answers", dist.Bernoulli(logits=ability - difficulty), obs=answers)


# --- all of them ----------------------------------------------------------------------------------


def one_hot(rows: int) -> Tensor:
    return torch.eye(3)[torch.arange(rows) % 3]


def lengths_mask(rows: int, steps: int) -> Tensor:
    lengths = 2 + torch.arange(rows) % (steps - 1)
    return torch.arange(steps) < lengths.unsqueeze(-1)


def zoo(rows: int = ROWS) -> dict[str, Callable[[], Program]]:
    """Name -> model and batch of so many rows."""
    labels = torch.arange(rows) % 3
    return {
        "vae": lambda: (SmallVAE(), binary(rows, 9)),
        "two_layer": lambda: (TwoLayer(), binary(rows, 9)),
        "gmm_vae": lambda: (MixtureVAE(), binary(rows, 9)),
        "m2": lambda: (SemiSupervised(), (binary(rows, 9),)),
        "m2_labelled": lambda: (SemiSupervised(), (binary(rows, 9), one_hot(rows))),
        "m2_masked": lambda: (MaskedLabels(), (binary(rows, 9), labels, torch.arange(rows) < 3)),
        "prodlda": lambda: (Topics("normal"), torch.poisson(torch.full((rows, 12), 3.0))),
        "topics": lambda: (Topics("dirichlet"), torch.poisson(torch.full((rows, 12), 3.0))),
        "factor_analysis": lambda: (FactorAnalysis(5, z_dim=2), torch.randn(rows, 5)),
        "groups": lambda: (groups, torch.randn(rows, 4)),
        "state_space": lambda: (state_space, torch.randn(rows, 5, 2)),
        "positive_parts": lambda: (positive_parts, torch.randn(rows, 3)),
        "pictures": lambda: (Pictures(), binary(rows, 2, 8, 8)),
        "eight_schools": lambda: (eight_schools, (10 * torch.randn(rows), 5 + torch.rand(rows))),
        "baseball": lambda: (
            baseball, (torch.full((rows,), 45.0), torch.randint(5, 20, (rows,)).float())
        ),
        "sparse_gamma": lambda: (
            SparseGamma().model, torch.poisson(torch.full((rows, 10), 3.0))
        ),
        "latent_dirichlet": lambda: (latent_dirichlet, torch.randint(0, 8, (rows, 7))),
        "deep_markov": lambda: (
            DeepMarkov().model, (binary(rows, 4, 5), lengths_mask(rows, 4))
        ),
        "conditional": lambda: (Conditional().model, (torch.randn(rows, 4), binary(rows, 9))),
        "single_cell": lambda: (
            SingleCell().model, (torch.poisson(torch.full((rows, 10), 2.0)),)
        ),
        "logistic_regression": lambda: (
            logistic_regression, (torch.randn(rows, 4), binary(rows))
        ),
        "item_response": lambda: (item_response, binary(rows, 4)),
    }  # fmt: skip
