"""An amortised Gaussian posterior of images, with a convolutional encoder.

q(z | x) = prod_site Normal(z_site; loc_site(x), diag(scale_site(x)^2))
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

from pvae.convolutions import ConvolutionalEncoder, image_shape_of
from pvae.errors import OptionError

__all__ = ["Conv"]


class Conv(nn.Module):
    """Images: a diagonal Gaussian per latent site, given by a convolutional encoder.

    Args:
        x_dim: Number of features of a datum.
        latents: Latent site -> event shape, as a model's ``latents`` gives it.
        image_shape: ``(H, W)``, ``(C, H, W)`` or ``(H, W, C)``; a square grey image if left out.
        channels: Channels after each halving of height and width.
        blocks: Residual blocks after each halving.
        hidden: Width of a layer after the convolutions; 0 for none.
        activation: Non-linearity.
        normalization: none, group or layer.
        x_mean: Mean of the data, subtracted from the encoder's input, ``(x_dim,)``.
        x_scale: Standard deviation of the data, ``(x_dim,)``; the input is divided by its root mean
            square over the pixels, so that a pixel that hardly varies is not blown up.

    Raises:
        OptionError: ``latents`` is empty, an option cannot be, or the features are no image.
    """

    x_mean: Tensor
    x_scale: Tensor

    def __init__(
        self,
        x_dim: int,
        latents: Mapping[str, Sequence[int]],
        image_shape: Sequence[int] | None = None,
        *,
        channels: Sequence[int] = (16, 32),
        blocks: int = 0,
        hidden: int = 128,
        activation: str = "silu",
        normalization: str = "none",
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
        scale = torch.ones(x_dim) if x_scale is None else x_scale
        self.register_buffer("x_scale", scale.square().mean().sqrt())
        sizes = [math.prod(shape) for shape in self.latents.values()]
        self.encoder = ConvolutionalEncoder(
            image_shape_of(x_dim, image_shape),
            2 * sum(sizes),
            channels,
            blocks=blocks,
            hidden=hidden,
            activation=activation,
            normalization=normalization,
        )
        self.sizes = sizes

    def forward(self, x: Tensor) -> None:
        """Sample every latent site given ``x`` of shape ``(B, x_dim)``."""
        with pyro.plate("data", len(x), dim=-1):
            for name, posterior in self.posterior(x).items():
                pyro.sample(name, posterior)

    def posterior(self, x: Tensor) -> dict[str, Any]:
        """``q(z_site | x)`` for every site, batch shape ``(B,)``."""
        loc, raw = self.encoder((x - self.x_mean) / self.x_scale).chunk(2, -1)
        found, batch = {}, loc.shape[:-1]
        parts = zip(loc.split(self.sizes, -1), raw.split(self.sizes, -1), strict=True)
        for (name, shape), (centre, width) in zip(self.latents.items(), parts, strict=True):
            scale = softplus(width) + 1e-4
            normal = dist.Normal(centre.reshape(batch + shape), scale.reshape(batch + shape))
            found[name] = normal.to_event(len(shape))
        return found
