r"""A sequential VAE of the samples of a sound, cut into frames that follow each other.

    z_t | z_{t-1}      ~ Normal(loc(z_{t-1}), diag(scale(z_{t-1})^2)),    z_0 learned
    x_t | z_t, x_{t-1} ~ Normal(a(z_t, x_{t-1}), (exp(b(z_t)) + 0.001)^2)

``x_t`` are the D samples of frame t, ``a`` and ``b`` networks: the frame before gives the phase,
which a state drawn anew could not know, the state the sound, and one loudness for the whole frame.
The state-space model of Krishnan, Shalit & Sontag (2017) with the data's own past in its emission,
as in Fraccaro et al. (2016), Sequential neural models with stochastic layers. The density is that
of samples between -1 and 1, which are 2^-15 apart in a file of 16 bits.
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from pvae.errors import OptionError
from pvae.markov import GaussianChain, Padded, step_mask
from pvae.networks import MLP, join

__all__ = ["Waveform"]

_QUIETEST = 1e-3  # of samples between -1 and 1: 33 of the 32768 steps of 16 bits
_MOST_FRAMES = 128  # where none are asked for: a state that has not learned yet drifts far


def _frames(x_dim: int) -> tuple[int, int]:
    if x_dim <= _MOST_FRAMES:
        return x_dim, 1
    lengths = [length for length in range(16, _MOST_FRAMES + 1) if x_dim % length == 0]
    if not lengths:
        raise OptionError(
            f"a sound of {x_dim} samples is not made of 16 to {_MOST_FRAMES} equal frames: cut the "
            "clips to a multiple of 96 samples"
        )
    length = min(lengths, key=lambda length: abs(math.log(length / 96)))
    return length, x_dim // length


class Drift(nn.Module):
    """``z_{t-1} -> loc, scale``: a change of the state.

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


class Waveform(nn.Module):
    """Sounds ``(T, D)``, flattened: T frames of D samples, the guide forward_backward fits it.

    Args:
        x_dim: Samples of a sound, ``T * D``.
        image_shape: ``(T, D)``; if it is left out, the T of 16 to 128 nearest to 96 that divides
            ``x_dim``, and of short sounds frames of one sample.
        z_dim: Number of state dimensions.
        width: Width of the networks.

    Raises:
        OptionError: the shape does not fit.
    """

    train_defaults = {"guide": "forward_backward"}

    def __init__(
        self,
        x_dim: int,
        *,
        image_shape: tuple[int, ...] | None = None,
        z_dim: int = 16,
        width: int = 128,
    ) -> None:
        super().__init__()
        shape = _frames(x_dim) if image_shape is None else tuple(image_shape)
        if len(shape) != 2 or shape[0] * shape[1] != x_dim:
            raise OptionError(
                f"image_shape is the (frames, samples of each) of a sound of {x_dim} samples, got "
                f"{shape}: cut the clips to a multiple of a frame"
            )
        self.length, self.num_features = shape
        self.z_dim = z_dim
        self.transition = Drift(z_dim, width)
        self.start = nn.Parameter(torch.zeros(z_dim))
        self.emission = MLP(
            z_dim + self.num_features, self.num_features, (width, width), activation_name="silu"
        )
        self.loudness = MLP(z_dim, 1, (width,), activation_name="silu")

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Latent sites and their event shapes, for sounds of the full length."""
        return {"z": (self.length, self.z_dim)}

    def forward(
        self, x: Tensor | None = None, lengths: Tensor | None = None, size: int = 1
    ) -> Tensor:
        """Score ``x`` of shape ``(B, T * D)`` or ``(B, T, D)``, or generate with ``x=None``.

        Args:
            x: Sounds.
            lengths: Frames of each that count, ``(B,)``; all if left out.
            size: How many to generate, of the full length.
        """
        if x is None:
            return self._generate(size)
        frames = x.reshape(len(x), -1, self.num_features).to(self.start.dtype)
        mask = self.mask(frames, lengths)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.chain(mask))
            steps = self.decode(z, pad(frames, (0, 0, 1, -1)))
            sampled: Tensor = pyro.sample("x", Padded(steps, mask), obs=frames.flatten(1))
        return sampled

    def _generate(self, size: int) -> Tensor:
        """Frame after frame: each needs the one before."""
        mask = torch.ones(size, self.length, dtype=torch.bool, device=self.start.device)
        before = self.start.new_zeros(size, self.num_features)
        frames = []
        with pyro.plate("data", size, dim=-1):
            z = pyro.sample("z", self.chain(mask))
            for t in range(self.length):
                before = pyro.sample(f"x_{t}", self.decode(z[..., t, :], before))
                frames.append(before)
        return torch.cat(frames, -1)

    def mask(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Which frames of ``x`` ``(B, T, D)`` count: ``(B, T)``."""
        if lengths is None:
            return torch.ones_like(x[..., 0], dtype=torch.bool)
        return step_mask(x, lengths)

    def chain(self, mask: Tensor) -> GaussianChain:
        """``p(z)`` of sounds whose frames are marked in ``mask`` ``(B, T)``."""
        return GaussianChain(self.transition, self.start, mask.shape[-1], mask=mask)

    def decode(self, z: Tensor, before: Tensor) -> Any:
        """``p(x_t | z_t, x_{t-1})`` of ``(*, z_dim)`` and ``(*, D)``: events ``(D,)``."""
        loudness = self.loudness(z).clamp(max=2).exp() + _QUIETEST
        loc = self.emission(join(z, 4 * before))
        return dist.Normal(loc, loudness).to_event(1)
