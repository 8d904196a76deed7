"""A deep exponential family of gamma latents and Poisson counts.

    z_L ~ Gamma(a, a),    z_l | z_{l+1} ~ Gamma(a, a / (z_{l+1} W_l)),    l = L-1 .. 1
    x | z_1 ~ Poisson(z_1 W_0)

with positive weights W: each gamma has the mean that the layer above gives it, and a small shape a
makes it sparse. Ranganath, Tang, Charlin & Blei (2015), Deep exponential families. The weights are
parameters here, not latent.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pvae.errors import OptionError

__all__ = ["SparseGamma"]


class SparseGamma(nn.Module):
    """Layers of positive latents, ``z_1`` nearest the counts.

    Args:
        x_dim: Number of features of a datum.
        widths: Number of latents of each layer, from ``z_1`` upward.
        shape: The gammas' shape a.
        x_mean: Mean of the data, at which the counts' means begin, ``(x_dim,)``.

    Raises:
        OptionError: there is no layer, or the shape is not positive.
    """

    train_defaults = {"guide": "counts", "transform": "none"}

    def __init__(
        self,
        x_dim: int,
        *,
        widths: Sequence[int] = (40, 15),
        shape: float = 0.3,
        x_mean: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise OptionError(f"widths must name at least one layer, got {widths}: try [40, 15]")
        if not shape > 0:
            raise OptionError(f"shape must be positive, got {shape}")
        self.x_dim, self.widths, self.shape = x_dim, tuple(widths), shape
        mean = torch.ones(x_dim) if x_mean is None else x_mean.float().clamp(min=1e-2)
        below = [mean, *(torch.ones(width) for width in widths[:-1])]
        self.raw_weights = nn.ParameterList(
            _inverse_softplus(target / width * torch.empty(width, len(target)).uniform_(0.5, 1.5))
            for target, width in zip(below, widths, strict=True)
        )

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Latent sites and their event shapes, from the top."""
        layers = enumerate(self.widths, start=1)
        return {f"z_{layer}": (width,) for layer, width in reversed(list(layers))}

    def forward(self, x: Tensor | None = None, size: int = 1) -> Tensor:
        """Score counts ``x`` of shape ``(B, x_dim)``, or generate ``size`` data."""
        mean = self.raw_weights[0].new_ones(self.widths[-1])
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            for layer in range(len(self.widths), 0, -1):
                prior = dist.Gamma(torch.full_like(mean, self.shape), self.shape / mean)
                z = pyro.sample(f"z_{layer}", prior.to_event(1))
                mean = z @ softplus(self.raw_weights[layer - 1]) + 1e-6
            sampled: Tensor = pyro.sample("x", dist.Poisson(mean).to_event(1), obs=x)
        return sampled


def _inverse_softplus(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value + torch.log(-torch.expm1(-value)))
