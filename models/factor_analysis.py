"""Factor analysis: the linear-Gaussian latent-variable model, exact in every respect.

    z ~ Normal(0, I_L),    x | z ~ Normal(W z + b, diag(noise^2))

With one noise for all features it is probabilistic PCA (Tipping & Bishop 1999). Its evidence
``Normal(x; b, W W' + diag(noise^2))`` and posterior are known, so it tests everything else.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

__all__ = ["FactorAnalysis"]


class FactorAnalysis(nn.Module):
    """``z ~ Normal(0, I)``, ``x | z ~ Normal(W z + b, noise)``, with its exact evidence.

    Args:
        x_dim: Number of features D.
        z_dim: Number of factors L.
        isotropic: One noise for all features (probabilistic PCA) instead of one each.
    """

    def __init__(self, x_dim: int, *, z_dim: int = 10, isotropic: bool = False) -> None:
        super().__init__()
        self.x_dim, self.z_dim = x_dim, z_dim
        self.loadings = nn.Parameter(torch.randn(x_dim, z_dim) / z_dim**0.5)
        self.offset = nn.Parameter(torch.zeros(x_dim))
        self.log_noise = nn.Parameter(torch.zeros(1 if isotropic else x_dim))
        self.register_buffer("prior_loc", torch.zeros(z_dim))

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Latent sites and their event shapes."""
        return {"z": (self.z_dim,)}

    def forward(self, x: Tensor | None = None, size: int = 1) -> Tensor:
        """Score ``x`` of shape ``(B, D)``, or generate ``size`` data with ``x=None``."""
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.prior_loc, 1.0).to_event(1))
            sampled: Tensor = pyro.sample("x", self.decode(z), obs=x)
        return sampled

    def decode(self, z: Tensor) -> Any:
        """``p(x | z)`` for ``z`` of shape ``(*, L)``."""
        loc = z @ self.loadings.T + self.offset
        return dist.Normal(loc, self.log_noise.exp()).to_event(1)

    def posterior(self, x: Tensor) -> dict[str, Any]:
        """``p(z | x) = Normal(P W'(x - b)/noise^2, P)``, ``P = (I + W'W/noise^2)^-1``."""
        scaled = self.loadings.T * (-2 * self.log_noise).exp()
        eye = torch.eye(self.z_dim, dtype=x.dtype, device=x.device)
        precision = eye + scaled @ self.loadings
        loc = torch.linalg.solve(precision, scaled @ (x - self.offset).mT).mT
        return {"z": dist.MultivariateNormal(loc, precision_matrix=precision)}

    def log_evidence(self, x: Tensor) -> Tensor:
        """``log Normal(x; b, W W' + diag(noise^2))``: ``(B, D) -> (B,)``, nats, exact."""
        noise = (2 * self.log_noise).exp().expand(self.x_dim)
        evidence = dist.LowRankMultivariateNormal(self.offset, self.loadings, noise)
        log_prob: Tensor = evidence.log_prob(x)
        return log_prob
