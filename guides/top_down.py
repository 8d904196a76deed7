"""The ladder VAE's posterior: bottom-up evidence and the model's own top-down prior, in one.

q(z_L | x) = Normal(m_L, s_L^2),
q(z_l | z_(l+1), x) proportional to Normal(z_l; m_l, s_l^2) p(z_l | z_(l+1)),    m_l, s_l from x
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pvae.errors import OptionError, ProgramError
from pvae.networks import MLP, Encoder

__all__ = ["TopDown"]


class TopDown(nn.Module):
    """A deterministic path up, then draws down, each weighed by precision with the model's prior.

    ``1 / sigma^2 = 1 / s^2 + 1 / sigma_p^2`` and ``mu = sigma^2 (m / s^2 + mu_p / sigma_p^2)``,
    where ``mu_p, sigma_p`` are those of ``p(z_l | z_(l+1))``: the parameters of the model are
    shared. Sønderby et al. (2016), Ladder variational autoencoders (whose batch normalisation is
    left out).

    Args:
        x_dim: Number of features of a datum.
        model: A model of layers with ``latents``, the top layer first, and
            ``conditional(site, above)``, a diagonal Gaussian below the top.
        hidden: Width of each layer of the encoder, up to the lowest site.
        width: Width of the path from each site to the one above, one hidden layer each.
        activation: Their non-linearity.
        x_mean: Mean of the data, subtracted from the encoder's input, ``(x_dim,)``.
        x_scale: Standard deviation of the data, by which the input is divided, ``(x_dim,)``.

    Raises:
        OptionError: ``width`` is not positive.
        ProgramError: the model has no ``conditional`` method, or a layer is not such a Gaussian.
    """

    def __init__(
        self,
        x_dim: int,
        model: Any,
        *,
        hidden: Sequence[int] = (200, 200),
        width: int = 100,
        activation: str = "silu",
        x_mean: Tensor | None = None,
        x_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not hasattr(model, "conditional") or not hasattr(model, "latents"):
            raise ProgramError(
                f"{type(model).__name__} has no conditional(site, above) method, so its top-down "
                "prior is not known: use the ladder or two_layer model, or the bottom_up guide"
            )
        if width < 1:
            raise OptionError(f"width must be at least 1, got {width}")
        self.model = model
        self.encoder = Encoder(
            x_dim, hidden, activation_name=activation, x_mean=x_mean, x_scale=x_scale
        )
        self.path, self.heads = nn.ModuleDict(), nn.ModuleDict()
        features = self.encoder.out_features
        for index, name in enumerate(reversed(list(model.latents))):
            if index:
                self.path[name] = MLP(features, width, (width,), activation_name=activation)
                features = width
            self.heads[name] = nn.Linear(features, 2 * model.latents[name][0])

    def forward(self, x: Tensor) -> None:
        """Sample every latent site given ``x`` of shape ``(B, x_dim)``."""
        features = self.encoder(x)
        evidence: dict[str, tuple[Tensor, Tensor]] = {}
        for name, head in self.heads.items():
            if name in self.path:
                features = self.path[name](features)
            loc, raw_scale = head(features).chunk(2, -1)
            evidence[name] = loc, softplus(raw_scale) + 1e-4
        z: Any = None
        with pyro.plate("data", len(x), dim=-1):
            for name in reversed(list(evidence)):
                loc, scale = evidence[name]
                if z is not None:
                    loc, scale = self._with_prior(name, z, loc, scale)
                z = pyro.sample(name, dist.Normal(loc, scale).to_event(1))

    def _with_prior(
        self, name: str, above: Tensor, loc: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Product of the evidence's Gaussian and the prior's, normalised."""
        prior = self.model.conditional(name, above)
        normal = getattr(prior, "base_dist", prior)
        if not isinstance(normal, torch.distributions.Normal):
            raise ProgramError(
                f"site {name!r} is {type(normal).__name__} given the layer above, but the top_down "
                "guide weighs diagonal Gaussians: use the bottom_up guide"
            )
        precision, prior_precision = scale.square().reciprocal(), normal.scale.square().reciprocal()
        total = precision + prior_precision
        mean = (loc * precision + normal.loc * prior_precision) / total
        return mean, total.rsqrt()
