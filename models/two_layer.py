"""The network with two stochastic layers of the importance weighted autoencoder.

    z2 ~ prior,    z1 | z2 ~ Normal(mu(z2), diag(sigma(z2)^2)),    x_d | z1 ~ likelihood(...)

Burda, Grosse & Salakhutdinov (2016), Importance weighted autoencoders: 50 units above 100, tanh
networks, the scale an exponential. Their guide is bottom_up with its own defaults and
``activation="tanh"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from pvae import priors
from pvae.errors import OptionError
from pvae.likelihoods import likelihood, num_outputs
from pvae.networks import MLP

__all__ = ["TwoLayer"]


class TwoLayer(nn.Module):
    """``z2 -> z1 -> x``, with the sizes of the paper.

    Args:
        x_dim: Number of features of a datum.
        z_dims: Number of dimensions of z1, next to the data, and of z2.
        hidden: Width of each hidden layer from z1 to the data.
        upper_hidden: Width of each hidden layer from z2 to z1.
        activation: Their non-linearity.
        likelihood: bernoulli, continuous_bernoulli, gaussian or discretized_logistic.
        num_levels: Number of integer levels, for discretized_logistic.
        prior: Of z2: normal, mixture, flow, or a module that gives a distribution.
        prior_components: Number of components of the mixture.

    Raises:
        OptionError: ``z_dims`` is no pair, or no likelihood or prior is called so.
    """

    def __init__(
        self,
        x_dim: int,
        *,
        z_dims: Sequence[int] = (100, 50),
        hidden: Sequence[int] = (200, 200),
        upper_hidden: Sequence[int] = (100, 100),
        activation: str = "tanh",
        likelihood: str = "bernoulli",
        num_levels: int = 256,
        prior: str | nn.Module = "normal",
        prior_components: int = 10,
    ) -> None:
        super().__init__()
        if len(z_dims) != 2:
            raise OptionError(
                f"z_dims has the sizes of z1 and z2, got {len(z_dims)}: use the ladder model for "
                "another number of layers"
            )
        self.x_dim, self.z_dims = x_dim, tuple(z_dims)
        self.likelihood, self.num_levels = likelihood, num_levels
        lower, upper = self.z_dims
        outputs = x_dim * num_outputs(likelihood)
        self.decoder = MLP(lower, outputs, hidden, activation_name=activation)
        self.upper = MLP(upper, 2 * lower, upper_hidden, activation_name=activation)
        self.prior = priors.named(prior, upper, num_components=prior_components)

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Latent sites and their event shapes, in the order in which they are drawn."""
        return {"z2": (self.z_dims[1],), "z1": (self.z_dims[0],)}

    def forward(self, x: Tensor | None = None, size: int = 1) -> Tensor:
        """Score ``x`` of shape ``(B, x_dim)``, or generate ``size`` data with ``x=None``."""
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            z2 = pyro.sample("z2", self.conditional("z2"))
            z1 = pyro.sample("z1", self.conditional("z1", z2))
            sampled: Tensor = pyro.sample("x", self.decode(z1), obs=x)
        return sampled

    def conditional(self, site: str, above: Tensor | None = None) -> Any:
        """``p(z1 | z2)``, or the prior of ``z2``, which has no layer above."""
        if above is None:
            return self.prior()
        loc, log_scale = self.upper(above).chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    def decode(self, z: Tensor) -> Any:
        """``p(x | z1)`` for ``z1`` of shape ``(*, z_dims[0])``."""
        return likelihood(self.likelihood, self.decoder(z), num_levels=self.num_levels)
