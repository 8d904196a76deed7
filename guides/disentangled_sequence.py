r"""Posteriors of videos that keep something and change something.

    q(f, z | x) = Normal(f; a(x)) prod_t Normal(z_t; b_t(x))

``a`` is a function of features of small patches, their mean over frames of the maximum over places.
A patch is seen with its height in the frame, so that trousers are told from hair of that colour.
``b_t`` reads frame t alone (the factorised posterior of Li & Mandt 2018), or, with ``context``,
what a recurrent network makes of the whole video in both directions (their full posterior, without
its dependence on ``f``). It sees each video of a training batch through one random mixture of its
colours, and else in grey: so it learns to tell where things are, not what colour they have. Bai et
al. (2021), Contrastively disentangled sequential VAE, change colours for the same end.
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

from pvae.errors import OptionError, ProgramError
from pvae.networks import MLP
from pvae.recurrent import LSTM

__all__ = ["DisentangledSequence"]


class DisentangledSequence(nn.Module):
    """A Gaussian for ``f`` from all frames, one for each ``z_t`` from its frame or from all.

    Args:
        model: A model of videos with sites ``f`` and ``z`` that states its ``frame_shape``.
        channels: Channels after each halving of height and width, in the network of ``z_t``.
        patches: The same in the network of ``f``; two halvings make patches of seven pixels.
        kinds: Number of features of a patch.
        width: Width of the layer of each frame.
        context: Let ``z_t`` see the other frames.

    Raises:
        OptionError: there are no channels.
        ProgramError: the model is none of such videos.
    """

    def __init__(
        self,
        model: Any,
        *,
        channels: Sequence[int] = (16, 32, 64),
        patches: Sequence[int] = (24, 48),
        kinds: int = 128,
        width: int = 128,
        context: bool = False,
    ) -> None:
        super().__init__()
        latents = getattr(model, "latents", {})
        if set(latents) != {"f", "z"} or not hasattr(model, "frame_shape"):
            raise ProgramError(
                f"the disentangled_sequence guide is for videos with the sites f and z, and those "
                f"of {type(model).__name__} are {', '.join(latents) or 'none'}: use the gaussian "
                "guide"
            )
        if not channels or not patches or min(*channels, *patches, kinds) < 1:
            raise OptionError(
                f"channels are one or more numbers from 1 up, as patches are and kinds is, got "
                f"{tuple(channels)}, {tuple(patches)} and {kinds}"
            )
        self.frame_shape = model.frame_shape
        self.looks = _convolutions(self.frame_shape[0] + 1, patches)
        self.looks.append(nn.Conv2d(patches[-1], kinds, 1))
        self.places = _convolutions(1, channels)
        sides = [math.ceil(side / 2 ** len(channels)) for side in self.frame_shape[1:]]
        places = channels[-1] * math.prod(sides)
        (f_dim,), (_, z_dim) = latents["f"], latents["z"]
        self.static = nn.Sequential(
            nn.LayerNorm(kinds), MLP(kinds, 2 * f_dim, (width,), activation_name="silu")
        )
        self.frame = nn.Linear(places, width)
        self.reader = (
            LSTM(width, width // 2, batch_first=True, bidirectional=True) if context else None
        )
        self.dynamic = nn.Linear(width // 2 * 2 if context else width, 2 * z_dim)

    def forward(self, x: Tensor) -> None:
        """Sample ``f`` and ``z`` given videos ``(B, x_dim)`` or clips of fewer frames."""
        with pyro.plate("data", len(x), dim=-1):
            for name, posterior in self.posterior(x).items():
                pyro.sample(name, posterior)

    def posterior(self, x: Tensor) -> dict[str, Any]:
        """``q(f | x)`` and ``q(z | x)``: batch ``(B,)``, events ``(f_dim,)`` and ``(T, z_dim)``."""
        frames = x.reshape(len(x), -1, *self.frame_shape)
        look = self.looks(_with_height(frames.flatten(0, 1))).amax((-2, -1))
        look = look.reshape(*frames.shape[:2], -1).mean(1)
        places = _normalized(self.places(_normalized(self._grey(frames).flatten(0, 1))))
        hidden = silu(self.frame(places.flatten(1))).reshape(*frames.shape[:2], -1)
        if self.reader is not None:
            hidden, _ = self.reader(hidden)
        # f begins sharp and z blurred: what both could say is then learned by f.
        return {"f": _normal(self.static(look), -2, 1), "z": _normal(self.dynamic(hidden), 0, 2)}

    def _grey(self, frames: Tensor) -> Tensor:
        """One channel of ``(B, T, C, H, W)``: a random mixture for each video, or the mean."""
        weights = torch.ones_like(frames[:, :1, :, :1, :1])
        if self.training:
            weights = torch.randn_like(weights)
        return (frames * weights).mean(2, keepdim=True)


def _with_height(frames: Tensor) -> Tensor:
    """Frames ``(N, C, H, W)`` and, as one more channel, how far down each pixel is."""
    height = torch.linspace(-2, 2, frames.shape[-2], dtype=frames.dtype, device=frames.device)
    down = height[:, None].expand(len(frames), 1, *frames.shape[-2:])
    return torch.cat([4 * frames - 0.4, down], 1)


def _convolutions(width: int, channels: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in channels:
        layers += [nn.Conv2d(width, size, 3, stride=2, padding=1), nn.SiLU()]
        width = size
    return nn.Sequential(*layers)


def _normalized(maps: Tensor) -> Tensor:
    """Maps ``(N, C, h, w)`` of mean zero and variance one over places."""
    centred = maps - maps.mean((-2, -1), keepdim=True)
    return centred * (centred.square().mean((-2, -1), keepdim=True) + 1e-5).rsqrt()


def _normal(output: Tensor, offset: float, event_dims: int) -> Any:
    loc, raw = output.chunk(2, -1)
    return dist.Normal(loc, softplus(raw + offset) + 1e-4).to_event(event_dims)
