"""An amortised Gaussian posterior of a datum and of what it is conditioned on.

q(z | x, y) = prod_site Normal(z_site; loc_site(h), diag(scale_site(h)^2)),    h = encoder(x, y)

The recognition network of Sohn, Lee & Yan (2015).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pvae.errors import ProgramError
from pvae.mean_field import normal_sites, num_outputs
from pvae.networks import MLP, join

__all__ = ["Conditional"]


class Conditional(nn.Module):
    """A diagonal Gaussian per real latent site, for models of batches ``(x, y)``.

    Args:
        x_dim: Number of features of a datum.
        latents: Latent site -> event shape, as a model's ``latents`` gives it.
        model: The model, for its ``y_dim`` and ``condition(y) -> (B, y_dim)``.
        hidden: Width of each hidden layer of the encoder.
        activation: Its non-linearity.
        x_mean: Mean of the data, subtracted from the encoder's input, ``(x_dim,)``.
        x_scale: Standard deviation of the data, by which the input is divided, ``(x_dim,)``.

    Raises:
        ProgramError: the model conditions on nothing.
    """

    x_mean: Tensor
    x_scale: Tensor

    def __init__(
        self,
        x_dim: int,
        latents: Mapping[str, Sequence[int]],
        model: Any,
        *,
        hidden: Sequence[int] = (200, 200),
        activation: str = "silu",
        x_mean: Tensor | None = None,
        x_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not (hasattr(model, "condition") and hasattr(model, "y_dim")):
            raise ProgramError(
                f"{type(model).__name__} has no condition(y) and y_dim, so there is nothing to "
                "condition on: use the gaussian guide"
            )
        self.latents = {name: tuple(shape) for name, shape in latents.items()}
        self.condition = model.condition
        self.register_buffer("x_mean", torch.zeros(x_dim) if x_mean is None else x_mean.clone())
        self.register_buffer("x_scale", torch.ones(x_dim) if x_scale is None else x_scale.clone())
        outputs = num_outputs(self.latents)
        self.encoder = MLP(x_dim + model.y_dim, outputs, hidden, activation_name=activation)

    def forward(self, x: Tensor, y: Tensor) -> None:
        """Sample every latent site given ``x`` ``(B, x_dim)`` and ``y`` ``(B,)`` or wider."""
        with pyro.plate("data", len(x), dim=-1):
            for name, posterior in self.posterior(x, y).items():
                pyro.sample(name, posterior)

    def posterior(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """``q(z_site | x, y)`` for every site, batch shape ``(B,)``."""
        standard = (x - self.x_mean) / self.x_scale
        output = self.encoder(join(standard, self.condition(y)))
        return normal_sites(output, self.latents)
