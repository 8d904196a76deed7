"""A VAE with several stochastic layers, the top-down chain of the ladder VAE.

    z_L ~ prior,    z_l | z_(l+1) ~ Normal(mu_l(z_(l+1)), diag(sigma_l(z_(l+1))^2)),
    x_d | z_1 ~ likelihood(decoder(z_1)_d)

Sønderby, Raiko, Maaløe, Sønderby & Winther (2016), Ladder variational autoencoders. The deep latent
Gaussian model of Rezende et al. (2014) has the same form. Guides: bottom_up and top_down.
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
from pvae.likelihoods import likelihood, num_outputs
from pvae.networks import MLP

__all__ = ["Ladder"]


class Ladder(nn.Module):
    """``z_L -> ... -> z1 -> x``, each layer a diagonal Gaussian given the layer above.

    Args:
        x_dim: Number of features of a datum.
        z_dims: Number of dimensions of each layer, z1 (nearest to the data) first.
        widths: Width of the network above each layer: of the decoder from z1, then of the networks
            from z2 to z1 and so on; each has two hidden layers.
        activation: Their non-linearity.
        likelihood: bernoulli, continuous_bernoulli, gaussian or discretized_logistic.
        num_levels: Number of integer levels, for discretized_logistic.
        prior: Of the top layer: normal, mixture, flow, or a module that gives a distribution.
        prior_components: Number of components of the mixture.

    Raises:
        OptionError: no layer, or not a width for each.
    """

    def __init__(
        self,
        x_dim: int,
        *,
        z_dims: Sequence[int] = (64, 32, 16),
        widths: Sequence[int] = (256, 128, 64),
        activation: str = "leaky_relu",
        likelihood: str = "bernoulli",
        num_levels: int = 256,
        prior: str | nn.Module = "normal",
        prior_components: int = 10,
    ) -> None:
        super().__init__()
        if not z_dims or len(z_dims) != len(widths):
            raise OptionError(
                f"widths has a number for each of the layers in z_dims, got {len(z_dims)} layers "
                f"and {len(widths)} widths"
            )
        self.x_dim, self.z_dims = x_dim, tuple(z_dims)
        self.likelihood, self.num_levels = likelihood, num_levels
        outputs = [x_dim * num_outputs(likelihood), *(2 * size for size in z_dims[:-1])]
        self.networks = nn.ModuleList(
            MLP(size, out, (width, width), activation_name=activation)
            for size, out, width in zip(z_dims, outputs, widths, strict=True)
        )
        self.prior = priors.named(prior, z_dims[-1], num_components=prior_components)

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Latent sites and their event shapes, the top layer first, as they are drawn."""
        sizes = list(enumerate(self.z_dims, 1))
        return {f"z{layer}": (size,) for layer, size in reversed(sizes)}

    def forward(self, x: Tensor | None = None, size: int = 1) -> Tensor:
        """Score ``x`` of shape ``(B, x_dim)``, or generate ``size`` data with ``x=None``."""
        z: Any = None
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            for site in self.latents:
                z = pyro.sample(site, self.conditional(site, z))
            sampled: Tensor = pyro.sample("x", self.decode(z), obs=x)
        return sampled

    def conditional(self, site: str, above: Tensor | None = None) -> Any:
        """``p(site | layer above)``; the prior for the top layer, which has none above."""
        if above is None:
            return self.prior()
        loc, raw_scale = self.networks[int(site[1:])](above).chunk(2, -1)
        return dist.Normal(loc, softplus(raw_scale) + 1e-3).to_event(1)

    def decode(self, z: Tensor) -> Any:
        """``p(x | z1)`` for ``z1`` of shape ``(*, z_dims[0])``."""
        return likelihood(self.likelihood, self.networks[0](z), num_levels=self.num_levels)
