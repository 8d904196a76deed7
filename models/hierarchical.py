"""The hierarchical VAE with a VampPrior: two stochastic layers, both of which make the data.

    z2 ~ (1/C) sum_c q(z2 | u_c),    z1 | z2 ~ Normal(mu(z2), diag(sigma(z2)^2)),
    x_d | z1, z2 ~ likelihood(decoder(z1, z2)_d)

Tomczak & Welling (2018), VAE with a VampPrior, whose posterior is that of the downward guide,
``q(z2 | x) q(z1 | x, z2)``: its first factor is the encoder in the prior, and no layer above is
left without use, since the prior of z2 is made of what the data say of it. The two_layer model has
no such prior, as its guide knows z2 given z1 alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor, nn
from torch.nn.functional import softplus

from pvae import priors
from pvae.errors import OptionError
from pvae.guides.gaussian import Gaussian
from pvae.likelihoods import likelihood, num_outputs
from pvae.networks import MLP, join

__all__ = ["Hierarchical"]


class Hierarchical(nn.Module):
    """``z2 -> z1``, ``(z1, z2) -> x``, with the sizes of the paper.

    Args:
        x_dim: Number of features of a datum.
        z_dims: Number of dimensions of z1 and of z2.
        hidden: Width of each hidden layer of the decoder, and of a VampPrior's encoder.
        upper_hidden: Width of each hidden layer from z2 to z1.
        activation: Their non-linearity.
        likelihood: bernoulli, continuous_bernoulli, gaussian or discretized_logistic.
        num_levels: Number of integer levels, for discretized_logistic.
        prior: Of z2: vamp, normal, mixture, flow, or a module that gives a distribution.
        prior_components: Number of pseudo-inputs, or of components of the mixture.
        x_mean: Mean of the data, for a VampPrior's encoder, ``(x_dim,)``.
        x_scale: Standard deviation of the data, for a VampPrior's encoder, ``(x_dim,)``.

    Raises:
        OptionError: ``z_dims`` is no pair, or no likelihood or prior is called so.
    """

    train_defaults = {"guide": "downward"}

    def __init__(
        self,
        x_dim: int,
        *,
        z_dims: Sequence[int] = (40, 40),
        hidden: Sequence[int] = (300, 300),
        upper_hidden: Sequence[int] = (300, 300),
        activation: str = "silu",
        likelihood: str = "bernoulli",
        num_levels: int = 256,
        prior: str | nn.Module = "vamp",
        prior_components: int = 500,
        x_mean: Tensor | None = None,
        x_scale: Tensor | None = None,
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
        self.decoder = MLP(lower + upper, outputs, hidden, activation_name=activation)
        self.upper = MLP(upper, 2 * lower, upper_hidden, activation_name=activation)

        def encoder() -> nn.Module:
            options = {"hidden": hidden, "activation": activation}
            return Gaussian(x_dim, {"z2": (upper,)}, x_mean=x_mean, x_scale=x_scale, **options)  # type: ignore[arg-type]

        self.prior = priors.named(
            prior, upper, num_components=prior_components, x_dim=x_dim, encoder=encoder
        )

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Latent sites and their event shapes, in the order in which they are drawn."""
        return {"z2": (self.z_dims[1],), "z1": (self.z_dims[0],)}

    def forward(self, x: Tensor | None = None, size: int = 1) -> Tensor:
        """Score ``x`` of shape ``(B, x_dim)``, or generate ``size`` data with ``x=None``."""
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            z2 = pyro.sample("z2", self.conditional("z2"))
            z1 = pyro.sample("z1", self.conditional("z1", z2))
            sampled: Tensor = pyro.sample("x", self.decode(z1, z2), obs=x)
        return sampled

    def conditional(self, site: str, above: Tensor | None = None) -> Any:
        """``p(z1 | z2)``, or the prior of ``z2``, which has no layer above."""
        if above is None:
            return self.prior()
        loc, raw_scale = self.upper(above).chunk(2, -1)
        return dist.Normal(loc, softplus(raw_scale) + 1e-3).to_event(1)

    def decode(self, z1: Tensor, z2: Tensor) -> Any:
        """``p(x | z1, z2)`` for ``(*, z_dims[0])`` and ``(*, z_dims[1])``."""
        output = self.decoder(join(z1, z2))
        return likelihood(self.likelihood, output, num_levels=self.num_levels)
