"""An amortised Gaussian posterior for any set of real latent sites.

q(z | x) = prod_site Normal(z_site; loc_site(x), covariance_site(x))
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
from pvae.networks import MLP, activation_module

__all__ = ["Gaussian"]


class Gaussian(nn.Module):
    """A Gaussian per latent site, its mean and covariance given by an encoder network.

    Args:
        x_dim: Number of features of a datum.
        latents: Latent site -> event shape, as a model's ``latents`` gives it.
        hidden: Width of each hidden layer of the encoder.
        activation: Its non-linearity.
        covariance: ``"diagonal"`` (mean field) or ``"full"`` within each site.
        x_mean: Mean of the data, subtracted from the encoder's input, ``(x_dim,)``.
        x_scale: Standard deviation of the data, by which the input is divided, ``(x_dim,)``.

    Raises:
        OptionError: ``latents`` is empty, or there is no such covariance.
    """

    x_mean: Tensor
    x_scale: Tensor

    def __init__(
        self,
        x_dim: int,
        latents: Mapping[str, Sequence[int]],
        *,
        hidden: Sequence[int] = (200, 200),
        activation: str = "silu",
        covariance: str = "diagonal",
        x_mean: Tensor | None = None,
        x_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not latents:
            raise OptionError(
                "the guide needs at least one latent site: pass latents=model.latents"
            )
        if covariance not in ("diagonal", "full"):
            raise OptionError(f"covariance is 'diagonal' or 'full', got {covariance!r}")
        self.latents = {name: tuple(shape) for name, shape in latents.items()}
        self.covariance = covariance
        self.register_buffer("x_mean", torch.zeros(x_dim) if x_mean is None else x_mean.clone())
        self.register_buffer("x_scale", torch.ones(x_dim) if x_scale is None else x_scale.clone())
        width = hidden[-1] if hidden else x_dim
        self.encoder: nn.Module = nn.Identity()
        if hidden:
            body = MLP(x_dim, width, hidden[:-1], activation_name=activation)
            self.encoder = nn.Sequential(body, activation_module(activation))
        self.heads = nn.ModuleDict(
            {name: nn.Linear(width, self._outputs(name)) for name in self.latents}
        )

    def _outputs(self, name: str) -> int:
        size = math.prod(self.latents[name])
        return size + (size if self.covariance == "diagonal" else size * (size + 1) // 2)

    def forward(self, x: Tensor) -> None:
        """Sample every latent site given ``x`` of shape ``(B, x_dim)``."""
        with pyro.plate("data", len(x), dim=-1):
            for name, posterior in self.posterior(x).items():
                pyro.sample(name, posterior)

    def posterior(self, x: Tensor) -> dict[str, Any]:
        """``q(z_site | x)`` for every site, batch shape ``(B,)``."""
        features = self.encoder((x - self.x_mean) / self.x_scale)
        return {name: self._site(name, head(features)) for name, head in self.heads.items()}

    def _site(self, name: str, output: Tensor) -> Any:
        shape = self.latents[name]
        size = math.prod(shape)
        loc, raw = output[..., :size], output[..., size:]
        if self.covariance == "full":
            posterior = dist.MultivariateNormal(loc, scale_tril=_lower_triangle(raw, size))
            if len(shape) == 1:
                return posterior
            reshape = dist.transforms.ReshapeTransform((size,), shape)
            return dist.TransformedDistribution(posterior, [reshape])
        batch = output.shape[:-1]
        scale = softplus(raw) + 1e-4
        normal = dist.Normal(loc.reshape(batch + shape), scale.reshape(batch + shape))
        return normal.to_event(len(shape))


def _lower_triangle(raw: Tensor, size: int) -> Tensor:
    """``(*, n(n+1)/2)`` free numbers to a lower Cholesky factor ``(*, n, n)``."""
    rows, columns = torch.tril_indices(size, size, device=raw.device)
    tril = raw.new_zeros((*raw.shape[:-1], size, size))
    tril[..., rows, columns] = raw
    diagonal = softplus(tril.diagonal(dim1=-2, dim2=-1)) + 1e-4
    return tril.tril(-1) + torch.diag_embed(diagonal)
