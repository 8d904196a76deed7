"""An amortised Gaussian posterior of rows with missing cells.

q(z | x) = prod_site Normal(z_site; loc_site(h), diag(scale_site(h)^2)),    h = encoder(x~, m)

with ``m`` the mask of observed cells and ``x~`` the standardised row, zero where a cell is missing:
the zero imputation of Nazábal et al. (2020) and Mattei & Frellsen (2019), told apart by the mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pvae.errors import OptionError
from pvae.mean_field import normal_sites, num_outputs
from pvae.networks import MLP

__all__ = ["Masked"]


class Masked(nn.Module):
    """A diagonal Gaussian per real latent site, given what is observed of a row.

    Args:
        x_dim: Number of features of a datum.
        latents: Latent site -> event shape, as a model's ``latents`` gives it.
        hidden: Width of each hidden layer of the encoder.
        activation: Its non-linearity.
        x_mean: Mean of the observed cells of each feature, ``(x_dim,)``.
        x_scale: Their standard deviation, ``(x_dim,)``.

    Raises:
        OptionError: ``latents`` is empty.
    """

    x_mean: Tensor
    x_scale: Tensor

    def __init__(
        self,
        x_dim: int,
        latents: Mapping[str, Sequence[int]],
        *,
        hidden: Sequence[int] = (128, 128),
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
        self.register_buffer("x_mean", torch.zeros(x_dim) if x_mean is None else x_mean.clone())
        self.register_buffer("x_scale", torch.ones(x_dim) if x_scale is None else x_scale.clone())
        outputs = num_outputs(self.latents)
        self.encoder = MLP(2 * x_dim, outputs, hidden, activation_name=activation)

    def forward(self, x: Tensor) -> None:
        """Sample every latent site given ``x`` of shape ``(B, x_dim)``, NaN where missing."""
        with pyro.plate("data", len(x), dim=-1):
            for name, posterior in self.posterior(x).items():
                pyro.sample(name, posterior)

    def posterior(self, x: Tensor) -> dict[str, Any]:
        """``q(z_site | x)`` for every site, batch shape ``(B,)``."""
        missing = x.isnan()
        standard = (x.masked_fill(missing, 0.0) - self.x_mean) / self.x_scale
        seen = (~missing).to(x.dtype)
        output = self.encoder(torch.cat([standard * seen, seen], -1))
        return normal_sites(output, self.latents)
