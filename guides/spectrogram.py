"""An amortised Gaussian posterior of spectrograms that end.

q(z | x, length) = Normal(z; loc, diag(scale^2)), by convolutions along the frames that count
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

from pvae.errors import OptionError, ProgramError

__all__ = ["Spectrogram"]


class Spectrogram(nn.Module):
    """A diagonal Gaussian of one vector ``z``, from frames and a channel that says which count.

    Args:
        model: A model of spectrograms with the site ``z``, as ``models/spectrogram.py``.
        channels: Channels after each halving of the frames.
        width: Width of the layer after the convolutions.

    Raises:
        OptionError: there are no channels.
        ProgramError: the model is none of such spectrograms.
    """

    centre: Tensor
    unit: Tensor

    def __init__(
        self, model: Any, *, channels: Sequence[int] = (64, 96, 128), width: int = 256
    ) -> None:
        super().__init__()
        if set(getattr(model, "latents", {})) != {"z"} or not hasattr(model, "decode_length"):
            raise ProgramError(
                f"the spectrogram guide is for spectrograms that end, which {type(model).__name__} "
                "does not generate: use the gaussian guide"
            )
        if not channels or min(channels) < 1:
            raise OptionError(f"channels are one or more numbers from 1 up, got {tuple(channels)}")
        self.length, self.num_features = model.length, model.num_features
        self._mask = model.mask
        self.register_buffer("centre", model.centre.clone())
        self.register_buffer("unit", model.unit.clone())
        layers: list[nn.Module] = []
        before = self.num_features + 1
        for size in channels:
            layers += [nn.Conv1d(before, size, 5, stride=2, padding=2), nn.SiLU()]
            before = size
        features = before * math.ceil(self.length / 2 ** len(channels))
        layers += [nn.Flatten(), nn.Linear(features, width), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Linear(width, 2 * model.z_dim))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> None:
        """Sample ``z`` given ``x`` of shape ``(B, x_dim)`` and its numbers of frames ``(B,)``."""
        with pyro.plate("data", len(x), dim=-1):
            for name, posterior in self.posterior(x, lengths).items():
                pyro.sample(name, posterior)

    def posterior(self, x: Tensor, lengths: Tensor | None = None) -> dict[str, Any]:
        """``q(z | x)``, batch shape ``(B,)``, events ``(z_dim,)``."""
        frames = (x.reshape(len(x), self.length, -1) - self.centre) / self.unit
        if lengths is None:
            lengths = torch.full((len(x),), self.length, device=x.device)
        counts = self._mask(lengths)[..., None]
        given = torch.cat([frames.masked_fill(~counts, 0), counts.to(frames.dtype)], -1)
        loc, raw = self.body(given.mT).chunk(2, -1)
        return {"z": dist.Normal(loc, softplus(raw) + 1e-4).to_event(1)}
