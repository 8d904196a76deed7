"""Counts with a size factor for each datum, as of single cells: scVI's generative model.

    z ~ Normal(0, I),    log_library ~ Normal(m, s^2)
    mean_g = exp(log_library) softmax(decoder(z))_g
    x_g | z, log_library ~ NegativeBinomial(mean_g, r_g), its zeros inflated, or Poisson(mean_g)

Lopez et al. (2018), Deep generative modeling for single-cell transcriptomics. The library size is
latent: a mean scaled by the observed total would give no density of the counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.count_distributions import negative_binomial
from pvae.errors import OptionError, did_you_mean
from pvae.networks import MLP

__all__ = ["Count"]

_LIKELIHOODS = ("negative_binomial", "poisson", "zero_inflated_negative_binomial")


class Count(nn.Module):
    """Counts ``(B, G)`` whose means are a latent profile times a latent size.

    Args:
        x_dim: Number of features G.
        z_dim: Number of latent dimensions.
        hidden: Width of each hidden layer of the decoder.
        activation: Its non-linearity.
        likelihood: negative_binomial (a dispersion per feature), zero_inflated_negative_binomial
            (and a gate by the decoder) or poisson.
        x_mean: Mean of the data, where the profile and the size begin, ``(G,)``.

    Raises:
        OptionError: no likelihood is called so.
    """

    train_defaults = {"guide": "counts", "transform": "none"}

    def __init__(
        self,
        x_dim: int,
        *,
        z_dim: int = 10,
        hidden: Sequence[int] = (128,),
        activation: str = "silu",
        likelihood: str = "negative_binomial",
        x_mean: Tensor | None = None,
    ) -> None:
        super().__init__()
        if likelihood not in _LIKELIHOODS:
            hint = did_you_mean(likelihood, _LIKELIHOODS)
            raise OptionError(f"no likelihood is called {likelihood!r}: {hint}")
        self.x_dim, self.z_dim, self.likelihood = x_dim, z_dim, likelihood
        inflated = likelihood == "zero_inflated_negative_binomial"
        self.decoder = MLP(
            z_dim, x_dim * (2 if inflated else 1), hidden, activation_name=activation
        )
        mean = torch.ones(x_dim) if x_mean is None else x_mean.clamp(min=1e-3).float()
        self.log_profile = nn.Parameter((mean / mean.sum()).log())
        self.library_loc = nn.Parameter(torch.tensor(math.log(float(mean.sum()))))
        self.library_log_scale = nn.Parameter(torch.tensor(-1.0))
        if likelihood != "poisson":
            self.log_dispersion = nn.Parameter(torch.zeros(x_dim))
        self.register_buffer("prior_loc", torch.zeros(z_dim))

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Latent sites and their event shapes."""
        return {"z": (self.z_dim,), "log_library": ()}

    def forward(self, x: Tensor | None = None, size: int = 1) -> Tensor:
        """Score counts ``x`` of shape ``(B, G)``, or generate ``size`` data with ``x=None``."""
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.prior_loc, 1.0).to_event(1))
            library = dist.Normal(self.library_loc, self.library_log_scale.exp())
            log_library = pyro.sample("log_library", library)
            sampled: Tensor = pyro.sample("x", self.decode(z, log_library), obs=x)
        return sampled

    def decode(self, z: Tensor, log_library: Tensor) -> Any:
        """``p(x | z, log_library)`` for ``(*, z_dim)`` and ``(*,)``: events of shape ``(G,)``."""
        output = self.decoder(z)
        profile = (output[..., : self.x_dim] + self.log_profile).log_softmax(-1)
        log_mean = profile + log_library[..., None]
        if self.likelihood == "poisson":
            return dist.Poisson(log_mean.exp()).to_event(1)
        gate = None if self.likelihood == "negative_binomial" else output[..., self.x_dim :]
        return negative_binomial(log_mean, self.log_dispersion, gate).to_event(1)
