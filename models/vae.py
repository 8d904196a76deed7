"""The variational autoencoder's generative model with a multilayer-perceptron decoder.

    z ~ prior,    x_d | z ~ likelihood(decoder(z)_d)

Kingma & Welling (2014), Auto-encoding variational Bayes; Rezende et al. (2014). The priors are
those of :mod:`pvae.priors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
from torch import Tensor, nn

from pvae import priors
from pvae.guides.gaussian import Gaussian
from pvae.likelihoods import likelihood, num_outputs
from pvae.networks import MLP

__all__ = ["VAE"]


class VAE(nn.Module):
    """``z`` from a prior, ``x | z`` from a decoder network; call it on ``x`` to score it.

    Args:
        x_dim: Number of features of a datum.
        z_dim: Number of latent dimensions.
        hidden: Width of each hidden layer of the decoder, and of a VampPrior's encoder.
        activation: Its non-linearity.
        likelihood: bernoulli (binary data), continuous_bernoulli (grey values in [0, 1]), gaussian
            (real data, mean and variance learned) or discretized_logistic (integer levels).
        num_levels: Number of integer levels, for discretized_logistic.
        prior: normal (standard), mixture (diagonal Gaussians, all their numbers learned), flow,
            hyperspherical (uniform on the unit sphere), vamp (a mixture of the encoder's
            posteriors, with the shared guide), or a module that gives a distribution.
        prior_components: Number of components of the mixture, or of pseudo-inputs.
        x_mean: Mean of the data, for a VampPrior's encoder, ``(x_dim,)``.
        x_scale: Standard deviation of the data, for a VampPrior's encoder, ``(x_dim,)``.

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
        prior: str | nn.Module = "normal",
        prior_components: int = 10,
        x_mean: Tensor | None = None,
        x_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.x_dim, self.z_dim = x_dim, z_dim
        self.likelihood, self.num_levels = likelihood, num_levels
        outputs = x_dim * num_outputs(likelihood)
        self.decoder = MLP(z_dim, outputs, hidden, activation_name=activation)

        def encoder() -> nn.Module:
            options = {"hidden": hidden, "activation": activation}
            return Gaussian(x_dim, self.latents, x_mean=x_mean, x_scale=x_scale, **options)  # type: ignore[arg-type]

        self.prior = priors.named(
            prior, z_dim, num_components=prior_components, x_dim=x_dim, encoder=encoder
        )

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
        return self.prior()

    def decode(self, z: Tensor) -> Any:
        """``p(x | z)`` for ``z`` of shape ``(*, z_dim)``: events of shape ``(x_dim,)``."""
        return likelihood(self.likelihood, self.decoder(z), num_levels=self.num_levels)
