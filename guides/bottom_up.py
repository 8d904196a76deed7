"""An amortised posterior that climbs a model's stochastic layers from the data upwards.

q(z | x) = q(z_1 | x) prod_(l > 1) q(z_l | z_(l-1)),    each a diagonal Gaussian
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pvae.errors import OptionError
from pvae.networks import MLP, Encoder

__all__ = ["BottomUp"]


class BottomUp(nn.Module):
    """Each layer given the draw of the layer below, in the reverse of the model's order.

    The inference network of Burda et al. (2016) and Rezende et al. (2014). With a single latent
    site it is the mean-field Gaussian.

    Args:
        x_dim: Number of features of a datum.
        latents: Latent site -> event shape, the top layer first, as a model's ``latents`` gives it.
        hidden: Width of each layer of the encoder of the lowest site.
        upper_hidden: Width of each hidden layer from a site to the one above.
        activation: Their non-linearity.
        x_mean: Mean of the data, subtracted from the encoder's input, ``(x_dim,)``.
        x_scale: Standard deviation of the data, by which the input is divided, ``(x_dim,)``.

    Raises:
        OptionError: ``latents`` is empty.
    """

    def __init__(
        self,
        x_dim: int,
        latents: Mapping[str, Sequence[int]],
        *,
        hidden: Sequence[int] = (200, 200),
        upper_hidden: Sequence[int] = (100, 100),
        activation: str = "silu",
        x_mean: Tensor | None = None,
        x_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not latents:
            raise OptionError(
                "the guide needs at least one latent site: pass latents=model.latents"
            )
        self.latents = {name: tuple(latents[name]) for name in reversed(list(latents))}
        self.encoder = Encoder(
            x_dim, hidden, activation_name=activation, x_mean=x_mean, x_scale=x_scale
        )
        self.networks, below = nn.ModuleDict(), 0
        for name, shape in self.latents.items():
            size = math.prod(shape)
            self.networks[name] = (
                MLP(below, 2 * size, upper_hidden, activation_name=activation)
                if below
                else nn.Linear(self.encoder.out_features, 2 * size)
            )
            below = size

    def forward(self, x: Tensor) -> None:
        """Sample every latent site given ``x`` of shape ``(B, x_dim)``."""
        below = self.encoder(x)
        with pyro.plate("data", len(x), dim=-1):
            for name, network in self.networks.items():
                loc, raw_scale = network(below).chunk(2, -1)
                shape = loc.shape[:-1] + torch.Size(self.latents[name])
                scale = softplus(raw_scale) + 1e-4
                normal = dist.Normal(loc.reshape(shape), scale.reshape(shape))
                z = pyro.sample(name, normal.to_event(len(self.latents[name])))
                below = z.reshape(z.shape[: z.dim() - len(self.latents[name])] + (-1,))
