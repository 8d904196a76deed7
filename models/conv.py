"""The variational autoencoder's generative model of images, with a convolutional decoder.

    z ~ Normal(0, I)
    x | z ~ likelihood(decoder(z)), pixel by pixel

Any height, width and number of channels; the residual blocks are those of He et al. (2016), the
mixture of discretised logistics that of Salimans et al. (2017), PixelCNN++; the continuous
Bernoulli that of Loaiza-Ganem & Cunningham (2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pvae.convolutions import ConvolutionalDecoder, image_shape_of
from pvae.errors import OptionError, did_you_mean
from pvae.logistic_mixture import mixture_size, pixel_mixture

__all__ = ["Conv"]

_LIKELIHOODS = ("bernoulli", "continuous_bernoulli", "discretized_logistic", "gaussian")


class Conv(nn.Module):
    """Images: ``z`` from a standard normal, ``x | z`` from a convolutional decoder.

    Args:
        x_dim: Number of features of a datum.
        image_shape: ``(H, W)``, ``(C, H, W)`` or ``(H, W, C)``; a square grey image if left out.
        z_dim: Number of latent dimensions.
        channels: Channels of the decoder, widest last; each entry doubles height and width.
        blocks: Residual blocks before each doubling.
        hidden: Width of a layer between z and the convolutions; 0 for none.
        activation: Non-linearity.
        normalization: none, group or layer.
        likelihood: bernoulli (binary data), continuous_bernoulli (grey values in [0, 1]), gaussian
            (real data, mean and variance learned) or discretized_logistic (integer levels, a
            mixture for each pixel).
        num_levels: Number of integer levels, for discretized_logistic.
        mixture_components: Components for each pixel, for discretized_logistic.

    Raises:
        OptionError: An option that cannot be, or features that are no image of that shape.
    """

    train_defaults = {"guide": "conv"}

    def __init__(
        self,
        x_dim: int,
        image_shape: Sequence[int] | None = None,
        *,
        z_dim: int = 16,
        channels: Sequence[int] = (16, 32),
        blocks: int = 0,
        hidden: int = 128,
        activation: str = "silu",
        normalization: str = "none",
        likelihood: str = "bernoulli",
        num_levels: int = 256,
        mixture_components: int = 5,
    ) -> None:
        super().__init__()
        if likelihood not in _LIKELIHOODS:
            hint = did_you_mean(likelihood, _LIKELIHOODS)
            raise OptionError(f"no likelihood is called {likelihood!r}: {hint}")
        if mixture_components < 1:
            raise OptionError(f"mixture_components must be at least 1, got {mixture_components}")
        self.shape = image_shape_of(x_dim, image_shape)
        self.x_dim, self.z_dim, self.likelihood = x_dim, z_dim, likelihood
        self.num_levels, self.mixture_components = num_levels, mixture_components
        self.decoder = ConvolutionalDecoder(
            z_dim,
            self.shape,
            self._numbers_per_pixel(),
            channels,
            blocks=blocks,
            hidden=hidden,
            activation=activation,
            normalization=normalization,
        )
        self.register_buffer("prior_loc", torch.zeros(z_dim))

    def _numbers_per_pixel(self) -> int:
        colours = self.shape.channels
        if self.likelihood == "discretized_logistic":
            return mixture_size(colours, self.mixture_components)
        return colours * (2 if self.likelihood == "gaussian" else 1)

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Latent sites and their event shapes."""
        return {"z": (self.z_dim,)}

    def forward(self, x: Tensor | None = None, size: int = 1) -> Tensor:
        """Score ``x`` of shape ``(B, x_dim)``, or generate ``size`` data with ``x=None``."""
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            z = pyro.sample("z", self.latent_prior())
            sampled: Tensor = pyro.sample("x", self.decode(z), obs=x)
        return sampled

    def latent_prior(self) -> Any:
        """``p(z)``: events of shape ``(z_dim,)``."""
        return dist.Normal(self.prior_loc, 1.0).to_event(1)

    def decode(self, z: Tensor) -> Any:
        """``p(x | z)`` for ``z`` of shape ``(*, z_dim)``: events of shape ``(x_dim,)``."""
        images, batch = self.decoder(z), z.shape[:-1]
        if self.likelihood == "discretized_logistic":
            return pixel_mixture(
                images.reshape(*batch, *images.shape[1:]),
                self.shape.channels,
                self.mixture_components,
                self.num_levels,
                channels_last=self.shape.channels_last,
            )
        if self.likelihood == "gaussian":
            loc, raw = (self.shape.to_rows(part, batch) for part in images.chunk(2, 1))
            return dist.Normal(loc, softplus(raw) + 1e-3).to_event(1)
        logits = self.shape.to_rows(images, batch)
        if self.likelihood == "bernoulli":
            return dist.Bernoulli(logits=logits).to_event(1)
        return dist.ContinuousBernoulli(logits=logits).to_event(1)
