r"""The disentangled sequential VAE: what a video keeps, and what changes from frame to frame.

    f             ~ Normal(0, I)
    z_t | z_{t-1} ~ Normal(loc(z_{t-1}), diag(scale(z_{t-1})^2)),    z_0 learned
    x_t | f, z_t  ~ Normal(sum_k mask_k(z_t) colour_k(f), noise^2),  sum_k mask_k = 1 in each pixel

Li & Mandt (2018), Disentangled sequential autoencoder. Two things differ from theirs. The prior of
the motion is a chain of first order instead of an LSTM. And the decoder cuts a frame into parts,
as Burgess et al. (2019), MONet, do: ``z_t`` says where each part is, ``f`` what colour it has. So
``f`` can move nothing, and the error of a small part goes straight to its colour.

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
    """Frames whose parts are where ``z_t`` says, in the colours of ``f``.

    Args:
        f_dim: Number of static dimensions.
        z_dim: Number of dimensions of a frame.
        shape: ``(C, H, W)`` of a frame.
        channels: Channels before each doubling of height and width, widest last.
        parts: Number of parts, each of one colour.
    """

    def __init__(
        self, f_dim: int, z_dim: int, shape: tuple[int, ...], channels: Sequence[int], parts: int
    ) -> None:
        super().__init__()
        self.shape, self.parts, widths = shape, parts, tuple(channels)[::-1]
        sides = (math.ceil(side / 2 ** len(channels)) for side in shape[1:])
        self.start = (widths[0], *sides)
        self.layout = nn.Linear(z_dim, math.prod(self.start))
        self.layers = nn.ModuleList(
            nn.ConvTranspose2d(width, size, 4, 2, 1)
            for width, size in zip(widths, (*widths[1:], parts), strict=True)
        )
        self.colours = MLP(f_dim, shape[0] * parts, (64,), activation_name="silu")

    def forward(self, f: Tensor, z: Tensor) -> Tensor:
        """``(*, f_dim)`` and ``(*, T, z_dim)`` to ``(*, T, C, H, W)``."""
        colours = self.colours(f).unflatten(-1, (1, self.shape[0], self.parts))
        frames: Tensor = colours @ self.masks(z).flatten(-2)
        return frames.reshape(*z.shape[:-1], *self.shape)

    def masks(self, z: Tensor) -> Tensor:
        """``(*, z_dim)`` to the share of each part in every pixel, ``(*, parts, H, W)``."""
        y: Tensor = self.layout(z).reshape(-1, *self.start)
        for layer in self.layers:
            y = layer(silu(_normalized(y)))
        # Sides that are no multiple of 2^n are cut.
        y = y[..., : self.shape[1], : self.shape[2]].softmax(1)
        return y.reshape(*z.shape[:-1], *y.shape[1:])


def _normalized(maps: Tensor) -> Tensor:
    """Maps ``(N, C, h, w)`` of mean zero and variance one over places."""
    centred = maps - maps.mean((-2, -1), keepdim=True)
    return centred * (centred.square().mean((-2, -1), keepdim=True) + 1e-5).rsqrt()


class DisentangledSequence(nn.Module):
    """Videos: one ``f`` for all frames, a chain of ``z_t``; a datum is ``(T, C, H, W)``, flattened.

    Args:
        x_dim: Numbers in a video, ``T * C * H * W``.
        image_shape: ``(T, C, H, W)``, or ``(T, H, W)`` where it is grey, or ``(T, W)`` where each
            frame is a row of pixels; left out, every number is a frame of one pixel.
        f_dim: Number of static dimensions.
        z_dim: Number of dimensions of a frame.
        channels: Channels of the decoder before each doubling, widest last.
        parts: Parts of one colour that a frame is made of.
        transition_hidden: Width of the network of the chain.

    Raises:
        OptionError: the shape is no video's, or there are no channels or parts.
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
        parts: int = 24,
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
        if parts < 1:
            raise OptionError(f"parts must be at least 1, got {parts}")
        self.length, self.frame_shape = shape[0], shape[1:]
        self.f_dim, self.z_dim = f_dim, z_dim
        self.decoder = FrameDecoder(f_dim, z_dim, shape[1:], channels, parts)
        self.transition = Transition(z_dim, transition_hidden)
        self.start = nn.Parameter(torch.zeros(z_dim))
        self.register_buffer("prior_loc", torch.zeros(f_dim))
        self.raw_noise = nn.Parameter(torch.tensor(-3.0))

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Latent sites and their event shapes."""
        return {"f": (self.f_dim,), "z": (self.length, self.z_dim)}

    def forward(self, x: Tensor | None = None, size: int = 1) -> Tensor:
        """Score ``x``, or generate ``size`` videos of the full length with ``x=None``.

        Args:
            x: Videos ``(B, x_dim)``, or clips of fewer frames than those of the data set.
            size: How many to generate.
        """
        length = self.length if x is None else x.shape[-1] // math.prod(self.frame_shape)
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            f = pyro.sample("f", dist.Normal(self.prior_loc, 1.0).to_event(1))
            z = pyro.sample("z", self.chain(length))
            sampled: Tensor = pyro.sample("x", self.decode(f, z), obs=x)
        return sampled

    def chain(self, length: int | None = None) -> GaussianChain:
        """``p(z)`` of that many frames, all if left out: events ``(T, z_dim)``."""
        return GaussianChain(self.transition, self.start, length or self.length)

    def decode(self, f: Tensor, z: Tensor) -> Any:
        """``p(x | f, z)`` of ``(*, f_dim)`` and ``(*, T, z_dim)``: events ``(x_dim,)``."""
        loc = self.decoder(f, z).flatten(-4)
        return dist.Normal(loc, softplus(self.raw_noise) + _SMALLEST_NOISE).to_event(1)
