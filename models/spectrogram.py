r"""A VAE of spectrograms that end: how long the sound is, and what each frame of it holds.

    z           ~ Normal(0, I)
    length | z  ~ Categorical(softmax(W z + b)),    1 to T
    x_t | z     ~ Normal(decoder(z)_t, diag(noise^2)),    t <= length

Kingma & Welling (2014) with a decoder of convolutions along time, whose channels end in the bands.
What comes after the end adds nothing to the density: a datum is ``(x, lengths)``. The density of
``x`` is that of the spectrogram's own numbers, for a log-mel one natural logarithms of power.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.errors import OptionError
from pvae.markov import Padded
from pvae.networks import MLP

__all__ = ["Spectrogram"]


class FramesDecoder(nn.Module):
    """A vector to frames: a linear map to few steps, then steps doubled and convolved.

    Args:
        z_dim: Size of the vector.
        shape: ``(T, F)``: frames and bands.
        channels: Channels before each doubling, widest last.
    """

    def __init__(self, z_dim: int, shape: tuple[int, ...], channels: Sequence[int]) -> None:
        super().__init__()
        self.length, bands = shape
        widths = tuple(channels)[::-1]
        self.start = (widths[0], math.ceil(self.length / 2 ** len(widths)))
        self.head = MLP(z_dim, math.prod(self.start), (2 * widths[0],), activation_name="silu")
        layers: list[nn.Module] = []
        for width, size in zip(widths, (*widths[1:], widths[-1]), strict=True):
            layers += [nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv1d(width, size, 5, padding=2)]
        self.body = nn.Sequential(*layers, nn.SiLU(), nn.Conv1d(widths[-1], bands, 5, padding=2))

    def forward(self, z: Tensor) -> Tensor:
        """``(*, z_dim)`` to ``(*, T, F)``."""
        y: Tensor = self.body(self.head(z).reshape(-1, *self.start))
        return y[..., : self.length].mT.reshape(*z.shape[:-1], self.length, -1)


class Spectrogram(nn.Module):
    """Spectrograms ``(T, F)``, flattened, with their number of frames.

    Args:
        x_dim: Numbers in a padded spectrogram, ``T * F``.
        image_shape: ``(T, F)``; F is one if it is left out.
        z_dim: Number of latent dimensions.
        channels: Channels of the decoder before each doubling of the frames, widest last.
        padding: What is written after the end of a sound that is generated.
        x_mean: Mean of the data, ``(x_dim,)``: where the decoder starts, band by band.
        x_scale: Their standard deviation, ``(x_dim,)``: the unit of the decoder and its noise.

    Raises:
        OptionError: the shape does not fit, or there are no channels.
    """

    train_defaults = {"guide": "spectrogram"}

    centre: Tensor
    unit: Tensor

    def __init__(
        self,
        x_dim: int,
        *,
        image_shape: tuple[int, ...] | None = None,
        z_dim: int = 32,
        channels: Sequence[int] = (64, 96, 128),
        padding: float = 0.0,
        x_mean: Tensor | None = None,
        x_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        shape = (x_dim, 1) if image_shape is None else tuple(image_shape)
        if len(shape) != 2 or math.prod(shape) != x_dim:
            raise OptionError(
                f"image_shape is the (frames, bands) of a spectrogram of {x_dim} numbers, got "
                f"{shape}: give data of shape (N, frames, bands)"
            )
        if not channels or min(channels) < 1:
            raise OptionError(f"channels are one or more numbers from 1 up, got {tuple(channels)}")
        self.length, self.num_features = shape
        self.z_dim, self.padding = z_dim, padding
        self.decoder = FramesDecoder(z_dim, shape, channels)
        self.ending = nn.Linear(z_dim, self.length)
        self.log_noise = nn.Parameter(torch.zeros(self.num_features))
        mean = torch.zeros(x_dim) if x_mean is None else x_mean
        scale = torch.ones(x_dim) if x_scale is None else x_scale
        self.register_buffer("centre", mean.reshape(shape).mean(0))
        self.register_buffer("unit", scale.reshape(shape).square().mean(0).sqrt())
        self.register_buffer("prior_loc", torch.zeros(z_dim))

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Latent sites and their event shapes."""
        return {"z": (self.z_dim,)}

    def forward(
        self, x: Tensor | None = None, lengths: Tensor | None = None, size: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Score ``x`` ``(B, x_dim)``, or generate ``size`` sounds with ``x=None``.

        Args:
            x: Spectrograms, whatever stands after their end.
            lengths: Frames of each, ``(B,)``, 1 to T; left out, all T.
            size: How many to generate.

        Returns:
            The spectrograms and their lengths.
        """
        if x is not None and lengths is None:
            lengths = torch.full((len(x),), self.length, device=x.device)
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.prior_loc, 1.0).to_event(1))
            last = None if lengths is None else lengths - 1
            length = 1 + pyro.sample("length", self.decode_length(z), obs=last)
            sampled: Tensor = pyro.sample("x", self.decode(z, length), obs=x)
        return sampled, length

    def mask(self, lengths: Tensor) -> Tensor:
        """Which frames count: ``(*,)`` to ``(*, T)``."""
        return torch.arange(self.length, device=lengths.device) < lengths[..., None]

    def decode_length(self, z: Tensor) -> Any:
        """``p(length - 1 | z)`` for ``z`` of shape ``(*, z_dim)``."""
        return dist.Categorical(logits=self.ending(z))

    def decode(self, z: Tensor, lengths: Tensor) -> Padded:
        """``p(x | z, length)``: events ``(x_dim,)``."""
        loc = self.centre + self.unit * self.decoder(z)
        frames = dist.Normal(loc, self.unit * self.log_noise.exp()).to_event(1)
        return Padded(frames, self.mask(lengths), padding=self.padding)

    def mean(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of the frames ``(*, T, F)`` and the likeliest length ``(*,)`` given ``z``."""
        lengths = self.ending(z).argmax(-1) + 1
        loc = self.centre + self.unit * self.decoder(z)
        return loc.masked_fill(~self.mask(lengths)[..., None], self.padding), lengths
