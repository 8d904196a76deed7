"""The conditional variational autoencoder: data given a label or other known features.

    z ~ Normal(0, I)  or  z | y ~ Normal(prior(y)),    x_d | y, z ~ likelihood(decoder(y, z)_d)

Sohn, Lee & Yan (2015), Learning structured output representation using deep conditional generative
models, whose prior is the conditional one. A batch is ``(x, y)``: y may be a class, or real
features such as one quadrant of an image whose others are x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pvae.errors import OptionError, did_you_mean
from pvae.likelihoods import likelihood as build_likelihood
from pvae.likelihoods import num_outputs
from pvae.networks import MLP, join, one_hot

__all__ = ["Conditional"]

_PRIORS = ("conditional", "standard")


class Conditional(nn.Module):
    """``p(x | y)`` with latent ``z``; ``y`` is given, never modelled.

    Args:
        x_dim: Number of features of a datum.
        num_classes: Number of classes, where y is an integer.
        y_dim: Number of features of y, where it is a row of real numbers.
        z_dim: Number of latent dimensions.
        hidden: Width of each hidden layer of the decoder, and of the prior's network.
        activation: Its non-linearity.
        likelihood: bernoulli, continuous_bernoulli, gaussian or discretized_logistic.
        num_levels: Number of integer levels, for discretized_logistic.
        prior: standard (the same for every y) or conditional (by a network).

    Raises:
        OptionError: no likelihood or prior is called so.
    """

    train_defaults = {"guide": "conditional"}
    prior_loc: Tensor

    def __init__(
        self,
        x_dim: int,
        *,
        num_classes: int = 10,
        y_dim: int | None = None,
        z_dim: int = 10,
        hidden: Sequence[int] = (200, 200),
        activation: str = "silu",
        likelihood: str = "bernoulli",
        num_levels: int = 256,
        prior: str = "standard",
    ) -> None:
        super().__init__()
        if prior not in _PRIORS:
            raise OptionError(f"no prior is called {prior!r}: {did_you_mean(prior, _PRIORS)}")
        self.x_dim, self.z_dim, self.prior = x_dim, z_dim, prior
        self.is_class, self.y_dim = y_dim is None, num_classes if y_dim is None else y_dim
        self.likelihood, self.num_levels = likelihood, num_levels
        outputs = x_dim * num_outputs(likelihood)
        self.decoder = MLP(self.y_dim + z_dim, outputs, hidden, activation_name=activation)
        self.register_buffer("prior_loc", torch.zeros(z_dim))
        if prior == "conditional":
            self.prior_network = MLP(self.y_dim, 2 * z_dim, hidden, activation_name=activation)

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Latent sites and their event shapes."""
        return {"z": (self.z_dim,)}

    def forward(
        self, x: Tensor | None = None, y: Tensor | None = None, size: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Score ``x`` ``(B, x_dim)`` given ``y`` ``(B,)`` or ``(B, y_dim)``, or generate.

        A class below 0 or above ``num_classes - 1`` is as none given. With ``x=None`` one datum is
        drawn for each row of ``y``; without that, for ``size`` rows of
        uniform classes or standard normal features.
        """
        if y is None:
            y = self._any_y(size if x is None else len(x))
        condition = self.condition(y)
        with pyro.plate("data", len(y), dim=-1):
            z = pyro.sample("z", self.latent_prior(condition))
            sampled: Tensor = pyro.sample("x", self.decode(condition, z), obs=x)
        return sampled, y

    def _any_y(self, rows: int) -> Tensor:
        if self.is_class:
            return torch.randint(self.y_dim, (rows,), device=self.prior_loc.device)
        return torch.randn(rows, self.y_dim).to(self.prior_loc)

    def condition(self, y: Tensor) -> Tensor:
        """Features ``(B, y_dim)`` of y: one-hot where it is a class."""
        if self.is_class:
            return one_hot(y, self.y_dim, self.prior_loc.dtype)
        return y.to(self.prior_loc)

    def latent_prior(self, condition: Tensor) -> Any:
        """``p(z | y)`` for features ``(B, y_dim)``: events of shape ``(z_dim,)``."""
        if self.prior == "standard":
            return dist.Normal(self.prior_loc, 1.0).to_event(1)
        loc, raw_scale = self.prior_network(condition).chunk(2, -1)
        return dist.Normal(loc, softplus(raw_scale) + 1e-3).to_event(1)

    def decode(self, condition: Tensor, z: Tensor) -> Any:
        """``p(x | y, z)`` for features ``(B, y_dim)`` and ``z`` ``(*, z_dim)``: events (x_dim,)."""
        output = self.decoder(join(condition, z))
        return build_likelihood(self.likelihood, output, self.num_levels)
