"""An amortised Gaussian posterior with a low-rank covariance for any set of real latent sites.

q(z | x) = prod_site Normal(z_site; loc_site(x), V_site(x) V_site(x)' + diag(d_site(x)))
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
from pvae.networks import Encoder

__all__ = ["LowRank"]


class LowRank(nn.Module):
    """A Gaussian per latent site whose covariance is diagonal plus a matrix of given rank.

    With rank n - 1, n the size of the site, it is any Gaussian; with fewer it needs
    ``(rank + 2) n`` numbers of the encoder instead of ``n (n + 3) / 2``. Rezende et al. (2014),
    Stochastic backpropagation, has the case of rank one in the precision; Ong et al. (2018) this
    one.

    Args:
        x_dim: Number of features of a datum.
        latents: Latent site -> event shape, as a model's ``latents`` gives it.
        rank: Number of columns of V.
        hidden: Width of each layer of the encoder.
        activation: Its non-linearity.
        x_mean: Mean of the data, subtracted from the encoder's input, ``(x_dim,)``.
        x_scale: Standard deviation of the data, by which the input is divided, ``(x_dim,)``.

    Raises:
        OptionError: ``latents`` is empty, or the rank is not between one and a site's size.
    """

    def __init__(
        self,
        x_dim: int,
        latents: Mapping[str, Sequence[int]],
        *,
        rank: int = 2,
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
        self.latents = {name: tuple(shape) for name, shape in latents.items()}
        for name, shape in self.latents.items():
            if not 1 <= rank <= math.prod(shape):
                raise OptionError(
                    f"rank must be between 1 and the size of site {name!r}, {math.prod(shape)}, "
                    f"got {rank}: lower it, or use the gaussian guide"
                )
        self.rank = rank
        self.encoder = Encoder(
            x_dim, hidden, activation_name=activation, x_mean=x_mean, x_scale=x_scale
        )
        width = self.encoder.out_features
        self.heads = nn.ModuleDict(
            {n: nn.Linear(width, (rank + 2) * math.prod(s)) for n, s in self.latents.items()}
        )

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
        shape = self.latents[name]
        size = math.prod(shape)
        loc, raw, factor = torch.split(output, [size, size, self.rank * size], -1)
        columns = factor.reshape(*factor.shape[:-1], size, self.rank) / self.rank**0.5
        posterior = dist.LowRankMultivariateNormal(loc, columns, softplus(raw) + 1e-6)
        if len(shape) == 1:
            return posterior
        reshape = dist.transforms.ReshapeTransform((size,), shape)
        return dist.TransformedDistribution(posterior, [reshape])
