"""An amortised von Mises-Fisher posterior for latent sites on the unit sphere.

q(z | x) = prod_site vMF(z_site; mu_site(x), kappa_site(x)),    |z_site| = 1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyro
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from pvae.errors import OptionError
from pvae.networks import Encoder
from pvae.von_mises_fisher import VonMisesFisher as Family

__all__ = ["VonMisesFisher"]


class VonMisesFisher(nn.Module):
    """A von Mises-Fisher distribution per site, for a model with a hyperspherical prior.

    Davidson et al. (2018), Hyperspherical variational auto-encoders, with the concentration given
    by the encoder; Xu & Durrett (2018), Spherical latent spaces for stable variational
    autoencoders, with one concentration for all data, so that the KL to the uniform prior is a
    constant and cannot collapse.

    Args:
        x_dim: Number of features of a datum.
        latents: Latent site -> event shape ``(d,)`` with d at least 2.
        concentration: kappa for all data; ``None`` for one that the encoder gives.
        hidden: Width of each layer of the encoder.
        activation: Its non-linearity.
        x_mean: Mean of the data, subtracted from the encoder's input, ``(x_dim,)``.
        x_scale: Standard deviation of the data, by which the input is divided, ``(x_dim,)``.

    Raises:
        OptionError: a site is no vector of two numbers or more, or kappa is not positive.
    """

    def __init__(
        self,
        x_dim: int,
        latents: Mapping[str, Sequence[int]],
        *,
        concentration: float | None = None,
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
        for name, shape in latents.items():
            if len(shape) != 1 or shape[0] < 2:
                raise OptionError(
                    f"site {name!r} has event shape {tuple(shape)}, but a direction is a vector of "
                    "at least two numbers: use another guide, or give the model z_dim >= 2"
                )
        if concentration is not None and not concentration > 0:
            raise OptionError(f"concentration must be positive, got {concentration}")
        self.concentration = concentration
        self.encoder = Encoder(
            x_dim, hidden, activation_name=activation, x_mean=x_mean, x_scale=x_scale
        )
        width, free = self.encoder.out_features, int(concentration is None)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(width, shape[0] + free) for name, shape in latents.items()}
        )

    def forward(self, x: Tensor) -> None:
        """Sample every latent site given ``x`` of shape ``(B, x_dim)``."""
        with pyro.plate("data", len(x), dim=-1):
            for name, posterior in self.posterior(x).items():
                pyro.sample(name, posterior)

    def posterior(self, x: Tensor) -> dict[str, Family]:
        """``q(z_site | x)`` for every site, batch shape ``(B,)``."""
        features = self.encoder(x)
        return {name: self._site(head(features)) for name, head in self.heads.items()}

    def _site(self, output: Tensor) -> Family:
        if self.concentration is not None:
            kappa = torch.full_like(output[..., 0], self.concentration)
            return Family(normalize(output, dim=-1), kappa)
        return Family(normalize(output[..., :-1], dim=-1), softplus(output[..., -1]) + 1e-3)
