"""A variational autoencoder whose prior is a mixture, its component a latent site.

    component ~ Categorical(pi),    z | component=c ~ Normal(mu_c, diag(sigma_c^2))
    x_d | z ~ likelihood(decoder(z)_d)

Dilokthanakul et al. (2016), Deep unsupervised clustering with Gaussian mixture VAEs; Jiang et al.
(2017), Variational deep embedding. With ``marginal=True`` the component is summed out of ``p(z)``
exactly, and the two programs have the same ``p(x)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pvae.errors import OptionError
from pvae.likelihoods import likelihood as build_likelihood
from pvae.likelihoods import num_outputs
from pvae.networks import MLP

__all__ = ["GMMVAE"]


class GMMVAE(nn.Module):
    """A Gaussian mixture in latent space, decoded; each component is a cluster of the data.

    With the component as a site, train it by ``gradient=mixed`` and the class_conditional guide, or
    by ``pyro.infer.TraceEnum_ELBO()``; with ``marginal`` any guide of real latents will do.

    Args:
        x_dim: Number of features of a datum.
        z_dim: Number of latent dimensions.
        num_components: Number of components C.
        hidden: Width of each hidden layer of the decoder.
        activation: Its non-linearity.
        likelihood: bernoulli, continuous_bernoulli, gaussian or discretized_logistic.
        num_levels: Number of integer levels, for discretized_logistic.
        marginal: Sum the component out of the prior.

    Raises:
        OptionError: no likelihood is called so, or there is no component.
    """

    train_defaults = {
        "guide": "class_conditional",
        "objective_options": {"gradient": "mixed", "num_particles": 4},
    }

    def __init__(
        self,
        x_dim: int,
        *,
        z_dim: int = 10,
        num_components: int = 10,
        hidden: Sequence[int] = (200, 200),
        activation: str = "silu",
        likelihood: str = "bernoulli",
        num_levels: int = 256,
        marginal: bool = False,
    ) -> None:
        super().__init__()
        if num_components < 1:
            raise OptionError(f"num_components must be at least 1, got {num_components}")
        self.x_dim, self.z_dim, self.num_components = x_dim, z_dim, num_components
        self.likelihood, self.num_levels, self.marginal = likelihood, num_levels, marginal
        outputs = x_dim * num_outputs(likelihood)
        self.decoder = MLP(z_dim, outputs, hidden, activation_name=activation)
        shape = (num_components, z_dim)
        self.prior_logits = nn.Parameter(torch.zeros(num_components))
        self.prior_loc = nn.Parameter(torch.randn(shape))
        self.prior_raw_scale = nn.Parameter(torch.full(shape, math.log(math.expm1(1.0))))

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Latent sites and their event shapes."""
        z: dict[str, tuple[int, ...]] = {"z": (self.z_dim,)}
        return z if self.marginal else {"component": (), **z}

    def forward(self, x: Tensor | None = None, size: int = 1) -> Tensor:
        """Score ``x`` of shape ``(B, x_dim)``, or generate ``size`` data with ``x=None``."""
        choice = dist.Categorical(logits=self.prior_logits)
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            if self.marginal:
                prior = dist.MixtureSameFamily(choice, self._normal(self.prior_loc))
            else:
                enumerated = {"enumerate": "parallel"}
                prior = self.component(pyro.sample("component", choice, infer=enumerated))
            z = pyro.sample("z", prior)
            sampled: Tensor = pyro.sample("x", self.decode(z), obs=x)
        return sampled

    def component(self, index: Tensor) -> Any:
        """``p(z | component)`` for integer ``index`` of shape ``(*,)``."""
        return self._normal(self.prior_loc[index], index)

    def _normal(self, loc: Tensor, index: Tensor | None = None) -> Any:
        scale = softplus(self.prior_raw_scale) + 1e-3
        return dist.Normal(loc, scale if index is None else scale[index]).to_event(1)

    def decode(self, z: Tensor) -> Any:
        """``p(x | z)`` for ``z`` of shape ``(*, z_dim)``: events of shape ``(x_dim,)``."""
        return build_likelihood(self.likelihood, self.decoder(z), self.num_levels)

    def log_responsibilities(self, z: Tensor) -> Tensor:
        """``log p(component=c | z)``: ``(*, z_dim) -> (*, C)``, exact."""
        density = self._normal(self.prior_loc).log_prob(z[..., None, :])
        joint: Tensor = self.prior_logits + density
        return joint.log_softmax(-1)
