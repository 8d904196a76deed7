"""Images drawn pixel by pixel: a gated PixelCNN whose pixels also depend on a latent code.

    z ~ Normal(0, I)
    x | z = prod_i p(x_i | x_1 ... x_(i-1), z), pixels in raster order

Van den Oord, Kalchbrenner, Vinyals, Espeholt, Graves & Kavukcuoglu (2016), Conditional image
generation with PixelCNN decoders; with a VAE's encoder the PixelVAE of Gulrajani et al. (2017). The
decoder alone can hold the data, and then z says nothing: free bits or a small ``layers`` keep it in
use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.autoregressive import Autoregressive
from pvae.convolutions import ConvolutionalDecoder, GatedPixelLayer, image_shape_of
from pvae.errors import OptionError, did_you_mean
from pvae.logistic_mixture import mixture_size, pixel_mixture

__all__ = ["PixelCNN"]

_LIKELIHOODS = ("bernoulli", "discretized_logistic")


class PixelCNN(nn.Module):
    """Images: ``z`` from a standard normal, ``x | z`` from a gated PixelCNN.

    Args:
        x_dim: Number of features of a datum.
        image_shape: ``(H, W)``, ``(C, H, W)`` or ``(H, W, C)``; a square grey image if left out.
        z_dim: Number of latent dimensions.
        width: Channels of each layer.
        layers: Number of gated layers; each sees ``kernel // 2`` pixels further.
        kernel: Side of the square that a convolution's mask cuts, odd.
        channels: Channels of the network that lays z out over the image, as in ``conv``.
        likelihood: bernoulli (binary data) or discretized_logistic (integer levels, a mixture for
            each pixel, in which a channel depends on the pixel's earlier ones).
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
        width: int = 16,
        layers: int = 3,
        kernel: int = 5,
        channels: Sequence[int] = (16, 32),
        likelihood: str = "bernoulli",
        num_levels: int = 256,
        mixture_components: int = 5,
    ) -> None:
        super().__init__()
        if likelihood not in _LIKELIHOODS:
            hint = did_you_mean(likelihood, _LIKELIHOODS)
            raise OptionError(f"no likelihood is called {likelihood!r}: {hint}")
        if min(width, layers, mixture_components) < 1 or kernel < 3 or kernel % 2 == 0:
            raise OptionError(
                "width, layers and mixture_components are at least 1 and kernel is odd and at "
                f"least 3; got width={width}, layers={layers}, kernel={kernel}, "
                f"mixture_components={mixture_components}"
            )
        self.shape = image_shape_of(x_dim, image_shape)
        self.x_dim, self.z_dim, self.likelihood = x_dim, z_dim, likelihood
        self.num_levels, self.mixture_components = num_levels, mixture_components
        colours, numbers = self.shape.channels, self.shape.channels
        if likelihood == "discretized_logistic":
            numbers = mixture_size(colours, mixture_components)
        self.layout = ConvolutionalDecoder(z_dim, self.shape, width, channels)
        self.layers = nn.ModuleList(
            GatedPixelLayer(colours if first else width, width, kernel, first=first)
            for first in [True] + [False] * (layers - 1)
        )
        self.output = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, numbers, 1)
        )
        self.register_buffer("prior_loc", torch.zeros(z_dim))

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

    def decode(self, z: Tensor) -> Autoregressive:
        """``p(x | z)`` for ``z`` of shape ``(*, z_dim)``: events of shape ``(x_dim,)``."""
        laid_out = self.layout(z)

        def conditionals(x: Tensor) -> Any:
            code = laid_out.reshape(*z.shape[:-1], *laid_out.shape[1:])
            code = code.expand(*x.shape[:-1], *laid_out.shape[1:]).reshape(-1, *laid_out.shape[1:])
            return self._conditionals(x, code)

        values: Any = constraints.boolean
        if self.likelihood == "discretized_logistic":
            values = constraints.integer_interval(0, self.num_levels - 1)  # type: ignore[no-untyped-call]
        support = constraints.independent(values, 1)  # type: ignore[no-untyped-call]
        return Autoregressive(conditionals, self._order(), z.shape[:-1], support=support, like=z)

    def _conditionals(self, x: Tensor, code: Tensor) -> Any:
        """The distribution of each pixel given those before it, for rows ``(*, x_dim)``."""
        batch = x.shape[:-1]
        top = 1 if self.likelihood == "bernoulli" else self.num_levels - 1
        down = left = 2 * self.shape.to_images(x) / top - 1
        for layer in self.layers:
            down, left = layer(down, left, code)
        images = self.output(left)
        if self.likelihood == "bernoulli":
            return dist.Bernoulli(logits=self.shape.to_rows(images, batch)).to_event(1)
        return pixel_mixture(
            images.reshape(*batch, *images.shape[1:]),
            self.shape.channels,
            self.mixture_components,
            self.num_levels,
            channels_last=self.shape.channels_last,
        )

    def _order(self) -> list[list[int]]:
        """The features of each pixel, pixels in raster order."""
        places = torch.arange(self.x_dim)
        by_pixel: list[list[int]] = self.shape.to_images(places)[0].flatten(1).T.tolist()
        return by_pixel
