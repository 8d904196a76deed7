"""The encoder of a vector-quantised VAE: all mass on the nearest code vectors.

q(z | x) = 1 where z_m = argmin_e ||h_m(x) - e||,    h the encoder
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
from torch import Tensor, nn

from pvae.codebooks import NearestCode, nearest_code
from pvae.errors import OptionError, ProgramError
from pvae.networks import Encoder

__all__ = ["VectorQuantised"]


class VectorQuantised(nn.Module):
    """A deterministic guide for the vq_vae model, whose codebook it shares.

    The bound's derivative goes straight through to the encoder; the codebook learns by
    ``||stop(h) - e||^2`` and the encoder is held near by ``commitment ||h - stop(e)||^2``. Both
    enter as a factor whose value is zero and whose derivative is theirs, so that the weights stay
    ``log p(x, z)`` and the bound is one. van den Oord et al. (2017).

    Args:
        x_dim: Number of features of a datum.
        model: A model with a ``codebook`` and one site of code vectors.
        commitment: Weight of the commitment.
        hidden: Width of each layer of the encoder.
        activation: Its non-linearity.
        x_mean: Mean of the data, subtracted from the encoder's input, ``(x_dim,)``.
        x_scale: Standard deviation of the data, by which the input is divided, ``(x_dim,)``.

    Raises:
        OptionError: ``commitment`` is negative.
        ProgramError: the model has no codebook.
    """

    def __init__(
        self,
        x_dim: int,
        model: Any,
        *,
        commitment: float = 0.25,
        hidden: Sequence[int] = (200, 200),
        activation: str = "silu",
        x_mean: Tensor | None = None,
        x_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not hasattr(model, "codebook"):
            raise ProgramError(
                f"{type(model).__name__} has no codebook, so there is no nearest code vector: use "
                "the vq_vae model, or another guide"
            )
        if not commitment >= 0:
            raise OptionError(f"commitment must not be negative, got {commitment}")
        self.model, self.commitment = model, commitment
        ((self.site, self.shape),) = model.latents.items()
        self.encoder = Encoder(
            x_dim, hidden, activation_name=activation, x_mean=x_mean, x_scale=x_scale
        )
        self.head = nn.Linear(self.encoder.out_features, self.shape[0] * self.shape[1])

    def forward(self, x: Tensor) -> None:
        """Draw the code vectors given ``x`` of shape ``(B, x_dim)``."""
        features = self.head(self.encoder(x)).unflatten(-1, self.shape)
        posterior = NearestCode(features, self.model.codebook)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample(self.site, posterior)
            penalty = self._penalty(features)
            pyro.factor("commitment", penalty - penalty.detach(), has_rsample=True)

    def _penalty(self, features: Tensor) -> Tensor:
        codebook = self.model.codebook
        code = codebook[nearest_code(features.detach(), codebook)]
        learn = (features.detach() - code).square().sum((-1, -2))
        stay = (features - code.detach()).square().sum((-1, -2))
        penalty: Tensor = learn + self.commitment * stay
        return penalty
