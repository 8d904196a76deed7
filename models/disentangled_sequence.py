r"""The disentangled sequential VAE: what a video keeps, and what changes from frame to frame.

    f             ~ Normal(0, I)
    z_t | z_{t-1} ~ Normal(loc(z_{t-1}), diag(scale(z_{t-1})^2)),    z_0 learned
    x_t | f, z_t  ~ Normal(decoder(f, z_t), noise^2)

Li & Mandt (2018), Disentangled sequential autoencoder. Two things differ from theirs. The prior of
the motion is a chain of first order instead of an LSTM. And the decoder is that of Huang & Belongie
(2017), adaptive instance normalisation: ``z_t`` lays out the channels of a frame, each normalised
over its places, and ``f`` says how strong every channel is. So ``z_t`` says where something is and
``f`` what it looks like, from the first step of training on.

All of ``z`` is one latent site ``(T, z_dim)``, scored at all frames at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from pvae.errors import OptionError
from pvae.markov import GaussianChain
from pvae.networks import MLP

__all__ = ["DisentangledSequence"]

_SMALLEST_NOISE = 0.01  # of pixels between 0 and 1: two or three grey levels of 256


class Transition(nn.Module):
    """``z_{t-1} -> loc, scale``: a change of the state, and how sure it is.

    Args:
        z_dim: Number of state dimensions.
        hidden: Width of the network.
    """

    def __init__(self, z_dim: int, hidden: int) -> None:
        super().__init__()
        self.network = MLP(z_dim, 2 * z_dim, (hidden,), activation_name="silu")

    def forward(self, z: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """``(*, z_dim)`` to mean and standard deviation ``(*, z_dim)``."""
        change, raw = self.network(z).chunk(2, -1)
        return z + change, softplus(raw) + 1e-3


class FrameDecoder(nn.Module):
    """Frames laid out by ``z_t`` and coloured by ``f``.

    Args:
        f_dim: Number of static dimensions.
        z_dim: Number of dimensions of a frame.
        shape: ``(C, H, W)`` of a frame.
        channels: Channels before each doubling of height and width, widest last.
    """

    def __init__(
        self, f_dim: int, z_dim: int, shape: tuple[int, ...], channels: Sequence[int]
    ) -> None:
        super().__init__()
        self.shape, self.widths = shape, tuple(channels)[::-1]
        sides = (math.ceil(side / 2 ** len(channels)) for side in shape[1:])
        self.start = (self.widths[0], *sides)
        self.layout = nn.Linear(z_dim, math.prod(self.start))
        self.look = nn.Linear(f_dim, 2 * sum(self.widths))
        outputs = (*self.widths[1:], shape[0])
        self.layers = nn.ModuleList(
            nn.ConvTranspose2d(width, size, 4, 2, 1)
            for width, size in zip(self.widths, outputs, strict=True)
        )

    def forward(self, f: Tensor, z: Tensor) -> Tensor:
        """``(*, f_dim)`` and ``(*, T, z_dim)`` to ``(*, T, C, H, W)``."""
        batch = z.shape[:-1]
        looks = self.look(f)[..., None, :].expand(*batch, -1).flatten(0, -2)
        y: Tensor = self.layout(z).reshape(-1, *self.start)
        for layer, look in zip(
            self.layers, looks.split([2 * w for w in self.widths], -1), strict=True
        ):
            scale, shift = look[..., None, None].chunk(2, 1)
            y = layer(silu(_normalized(y) * (1 + scale) + shift))
        # Sides that are no multiple of 2^n are cut.
        return y[..., : self.shape[1], : self.shape[2]].reshape(*batch, *self.shape)


def _normalized(maps: Tensor) -> Tensor:
    """Maps ``(N, C, h, w)`` of mean zero and variance one over places."""
    variance, mean = torch.var_mean(maps, (-2, -1), keepdim=True, correction=0)
    return (maps - mean) * (variance + 1e-5).rsqrt()


class DisentangledSequence(nn.Module):
    """Videos: one ``f`` for all frames, a chain of ``z_t``; a datum is ``(T, C, H, W)``, flattened.

    Args:
        x_dim: Numbers in a video, ``T * C * H * W``.
        image_shape: ``(T, C, H, W)``, or ``(T, H, W)`` where it is grey, or ``(T, W)`` where each
            frame is a row of pixels; left out, every number is a frame of one pixel.
        f_dim: Number of static dimensions.
        z_dim: Number of dimensions of a frame.
        channels: Channels of the decoder before each doubling, widest last.
        transition_hidden: Width of the network of the chain.

    Raises:
        OptionError: the shape is no video's, or there are no channels.
    """

    train_defaults = {"guide": "disentangled_sequence"}

    def __init__(
        self,
        x_dim: int,
        *,
        image_shape: tuple[int, ...] | None = None,
        f_dim: int = 32,
        z_dim: int = 4,
        channels: Sequence[int] = (16, 32, 64),
        transition_hidden: int = 64,
    ) -> None:
        super().__init__()
        shape = (x_dim, 1) if image_shape is None else tuple(image_shape)
        if len(shape) in (2, 3):
            shape = (shape[0], *((1,) * (4 - len(shape))), *shape[1:])
        if len(shape) != 4 or math.prod(shape) != x_dim or min(shape) < 1:
            raise OptionError(
                f"image_shape is the (frames, channels, height, width) of a video of {x_dim} "
                f"numbers, got {shape}: give data of shape (N, frames, channels, height, width)"
            )
        if not channels or min(channels) < 1:
            raise OptionError(f"channels are one or more numbers from 1 up, got {tuple(channels)}")
        self.length, self.frame_shape = shape[0], shape[1:]
        self.f_dim, self.z_dim = f_dim, z_dim
        self.decoder = FrameDecoder(f_dim, z_dim, shape[1:], channels)
        self.transition = Transition(z_dim, transition_hidden)
        self.start = nn.Parameter(torch.zeros(z_dim))
        self.register_buffer("prior_loc", torch.zeros(f_dim))
        self.raw_noise = nn.Parameter(torch.tensor(-3.0))

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Latent sites and their event shapes."""
        return {"f": (self.f_dim,), "z": (self.length, self.z_dim)}

    def forward(self, x: Tensor | None = None, size: int = 1) -> Tensor:
        """Score ``x`` of shape ``(B, x_dim)``, or generate ``size`` videos with ``x=None``."""
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            f = pyro.sample("f", dist.Normal(self.prior_loc, 1.0).to_event(1))
            z = pyro.sample("z", self.chain())
            sampled: Tensor = pyro.sample("x", self.decode(f, z), obs=x)
        return sampled

    def chain(self) -> GaussianChain:
        """``p(z)``: events ``(T, z_dim)``."""
        return GaussianChain(self.transition, self.start, self.length)

    def decode(self, f: Tensor, z: Tensor) -> Any:
        """``p(x | f, z)`` of ``(*, f_dim)`` and ``(*, T, z_dim)``: events ``(x_dim,)``."""
        loc = self.decoder(f, z).flatten(-4)
        return dist.Normal(loc, softplus(self.raw_noise) + _SMALLEST_NOISE).to_event(1)
