"""An amortised mixture-of-Gaussians posterior for any set of real latent sites.

q(z | x) = prod_site sum_c pi_c(x) Normal(z_site; mu_c(x), diag(sigma_c(x)^2))
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pvae.errors import OptionError
from pvae.mixtures import DiagonalNormalMixture
from pvae.networks import Encoder

__all__ = ["Mixture"]


class Mixture(nn.Module):
    """A mixture of diagonal Gaussians per latent site, drawn with pathwise derivatives.

    The component is summed out of the density and has no site of its own, so any objective takes
    the guide, and no score-function estimator is needed; see
    :class:`pvae.mixtures.DiagonalNormalMixture`. A bimodal posterior is what it is for.

    Args:
        x_dim: Number of features of a datum.
        latents: Latent site -> event shape, as a model's ``latents`` gives it.
        num_components: Number of components of each site.
        hidden: Width of each layer of the encoder.
        activation: Its non-linearity.
        x_mean: Mean of the data, subtracted from the encoder's input, ``(x_dim,)``.
        x_scale: Standard deviation of the data, by which the input is divided, ``(x_dim,)``.

    Raises:
        OptionError: ``latents`` is empty, or there is no component.
    """

    def __init__(
        self,
        x_dim: int,
        latents: Mapping[str, Sequence[int]],
        *,
        num_components: int = 3,
        hidden: Sequence[int] = (200, 200),
        activation: str = "silu",
        x_mean: Tensor | None = None,
        x_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not latents:
            raise OptionError(
                "the guide needs at least one latent site: pass latents=model.latents"
            )
        if num_components < 1:
            raise OptionError(f"num_components must be at least 1, got {num_components}")
        self.latents = {name: tuple(shape) for name, shape in latents.items()}
        self.num_components = num_components
        self.encoder = Encoder(
            x_dim, hidden, activation_name=activation, x_mean=x_mean, x_scale=x_scale
        )
        width, count = self.encoder.out_features, num_components
        self.heads = nn.ModuleDict(
            {n: nn.Linear(width, count * (1 + 2 * math.prod(s))) for n, s in self.latents.items()}
        )
        with torch.no_grad():  # components apart from the start, or they would move as one
            for name, shape in self.latents.items():
                head: Any = self.heads[name]
                head.bias[count : count + count * math.prod(shape)].normal_()

    def forward(self, x: Tensor) -> None:
        """Sample every latent site given ``x`` of shape ``(B, x_dim)``."""
        with pyro.plate("data", len(x), dim=-1):
            for name, posterior in self.posterior(x).items():
                pyro.sample(name, posterior)

    def posterior(self, x: Tensor) -> dict[str, Any]:
        """``q(z_site | x)`` for every site, batch shape ``(B,)``."""
        features = self.encoder(x)
        return {name: self._site(name, head(features)) for name, head in self.heads.items()}

    def _site(self, name: str, output: Tensor) -> Any:
        shape, count = self.latents[name], self.num_components
        size = math.prod(shape)
        logits, loc, raw = torch.split(output, [count, count * size, count * size], -1)
        each = (*output.shape[:-1], count, size)
        posterior = DiagonalNormalMixture(
            logits,
            loc.reshape(each),
            softplus(raw).reshape(each) + 1e-4,
        )
        if len(shape) == 1:
            return posterior
        reshape = dist.transforms.ReshapeTransform((size,), shape)
        return dist.TransformedDistribution(posterior, [reshape])
