"""An amortised posterior that draws a model's layers in its own order, each from the data, too.

q(z | x) = q(z_1 | x) prod_(l > 1) q(z_l | x, z_1 ... z_(l-1)),    each a diagonal Gaussian
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

from pvae.errors import ProgramError
from pvae.guides.gaussian import Gaussian
from pvae.networks import MLP, Encoder, join

__all__ = ["Downward"]


class Downward(nn.Module):
    """Each site given the data and all that were drawn before it, in the model's order.

    The first site's posterior is the encoder that a VampPrior owns, where the model has one
    (Tomczak & Welling 2018). With a single latent site it is the mean-field Gaussian.

    Args:
        x_dim: Number of features of a datum.
        model: The model; ``latents`` gives its sites in their order.
        hidden: Width of each layer of the encoders.
        lower_hidden: Width of each hidden layer from the encoder and the sites above to a site.
        activation: Their non-linearity.
        x_mean: Mean of the data, subtracted from the encoder's input, ``(x_dim,)``.
        x_scale: Standard deviation of the data, by which the input is divided, ``(x_dim,)``.

    Raises:
        ProgramError: the model does not tell its latent sites.
    """

    def __init__(
        self,
        x_dim: int,
        model: Any,
        *,
        hidden: Sequence[int] = (300, 300),
        lower_hidden: Sequence[int] = (300,),
        activation: str = "silu",
        x_mean: Tensor | None = None,
        x_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not getattr(model, "latents", None):
            raise ProgramError(
                f"{type(model).__name__} does not tell its latent sites, so there is no order to "
                "draw them in: give it latents, or use the auto guide"
            )
        (first, *below), shapes = model.latents, model.latents
        top = getattr(getattr(model, "prior", None), "encoder", None)
        if top is None:
            options = {"hidden": hidden, "activation": activation}
            top = Gaussian(x_dim, {first: shapes[first]}, x_mean=x_mean, x_scale=x_scale, **options)  # type: ignore[arg-type]
        self.top, self.networks = top, nn.ModuleDict()
        self.shapes = {name: tuple(shapes[name]) for name in below}
        if below:
            self.encoder = Encoder(
                x_dim, hidden, activation_name=activation, x_mean=x_mean, x_scale=x_scale
            )
            width = self.encoder.out_features + math.prod(shapes[first])
            for name, shape in self.shapes.items():
                size = math.prod(shape)
                self.networks[name] = MLP(width, 2 * size, lower_hidden, activation_name=activation)
                width += size

    def forward(self, x: Tensor) -> None:
        """Sample every latent site given ``x`` of shape ``(B, x_dim)``."""
        top: Any = self.top
        ((name, posterior),) = top.posterior(x).items()
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample(name, posterior)
            known = z.flatten(z.dim() - len(posterior.event_shape))
            if self.shapes:
                known = join(self.encoder(x), known)
            for name, shape in self.shapes.items():
                loc, raw_scale = self.networks[name](known).chunk(2, -1)
                batch = loc.shape[:-1] + torch.Size(shape)
                normal = dist.Normal(
                    loc.reshape(batch), (softplus(raw_scale) + 1e-4).reshape(batch)
                )
                z = pyro.sample(name, normal.to_event(len(shape)))
                known = join(known, z.reshape(*loc.shape))
