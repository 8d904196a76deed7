"""The variational autoencoder's generative model with a multilayer-perceptron decoder.

    z ~ Normal(0, I)  or  sum_c pi_c Normal(mu_c, diag(sigma_c^2))
    x_d | z ~ likelihood(decoder(z)_d)

Kingma & Welling (2014), Auto-encoding variational Bayes; Rezende et al. (2014). The learned mixture
is the MoG prior of Tomczak & Welling (2018), VAE with a VampPrior.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pvae.distributions import DiscretizedLogistic
from pvae.errors import OptionError, did_you_mean
from pvae.networks import MLP

__all__ = ["VAE"]

_PRIORS = ("mixture", "normal")
_OUTPUTS = {"bernoulli": 1, "continuous_bernoulli": 1, "discretized_logistic": 2, "gaussian": 2}


class VAE(nn.Module):
    """``z`` from a prior, ``x | z`` from a decoder network; call it on ``x`` to score it.

    Args:
        x_dim: Number of features of a datum.
        z_dim: Number of latent dimensions.
        hidden: Width of each hidden layer of the decoder.
        activation: Its non-linearity.
        likelihood: bernoulli (binary data), continuous_bernoulli (grey values in [0, 1]), gaussian
            (real data, mean and variance learned) or discretized_logistic (integer levels).
        num_levels: Number of integer levels, for discretized_logistic.
        prior: normal (standard) or mixture (diagonal Gaussians, all their numbers learned).
        prior_components: Number of components of the mixture.

    Raises:
        OptionError: no likelihood or prior is called so, or the mixture has no component.
    """

    def __init__(
        self,
        x_dim: int,
        *,
        z_dim: int = 16,
        hidden: Sequence[int] = (200, 200),
        activation: str = "silu",
        likelihood: str = "bernoulli",
        num_levels: int = 256,
        prior: str = "normal",
        prior_components: int = 10,
    ) -> None:
        super().__init__()
        if likelihood not in _OUTPUTS:
            raise OptionError(
                f"no likelihood is called {likelihood!r}: {did_you_mean(likelihood, _OUTPUTS)}"
            )
        if prior not in _PRIORS:
            raise OptionError(f"no prior is called {prior!r}: {did_you_mean(prior, _PRIORS)}")
        if prior_components < 1:
            raise OptionError(f"prior_components must be at least 1, got {prior_components}")
        self.x_dim, self.z_dim, self.prior = x_dim, z_dim, prior
        self.likelihood, self.num_levels = likelihood, num_levels
        self.decoder = MLP(z_dim, x_dim * _OUTPUTS[likelihood], hidden, activation_name=activation)
        if prior == "normal":
            self.register_buffer("prior_loc", torch.zeros(z_dim))
            return
        shape = (prior_components, z_dim)
        self.prior_logits = nn.Parameter(torch.zeros(prior_components))
        self.prior_loc = nn.Parameter(torch.randn(shape))
        self.prior_raw_scale = nn.Parameter(torch.full(shape, math.log(math.expm1(1.0))))

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Latent sites and their event shapes."""
        return {"z": (self.z_dim,)}

    def forward(self, x: Tensor | None = None, size: int = 1) -> Tensor:
        """Score ``x`` of shape ``(B, x_dim)``, or generate ``size`` data with ``x=None``."""
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            z = pyro.sample("z", self.latent_prior())
            sampled: Tensor = pyro.sample("x", self.decode(z), obs=x)
        return sampled

    def latent_prior(self) -> Any:
        """``p(z)``: events of shape ``(z_dim,)``."""
        if self.prior == "normal":
            return dist.Normal(self.prior_loc, 1.0).to_event(1)
        scale = softplus(self.prior_raw_scale) + 1e-3
        components = dist.Normal(self.prior_loc, scale).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.prior_logits), components)

    def decode(self, z: Tensor) -> Any:
        """``p(x | z)`` for ``z`` of shape ``(*, z_dim)``: events of shape ``(x_dim,)``."""
        output = self.decoder(z)
        if self.likelihood == "bernoulli":
            return dist.Bernoulli(logits=output).to_event(1)
        if self.likelihood == "continuous_bernoulli":
            return dist.ContinuousBernoulli(logits=output).to_event(1)
        loc, raw_scale = output.chunk(2, -1)
        scale = softplus(raw_scale) + 1e-3
        if self.likelihood == "gaussian":
            return dist.Normal(loc, scale).to_event(1)
        levels = self.num_levels
        return DiscretizedLogistic((loc + 0.5) * levels, scale * levels / 8, levels).to_event(1)
