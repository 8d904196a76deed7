"""The encoder that a model owns itself, as a guide.

A VampPrior is made of the encoder's own posteriors, so the model holds the encoder and this guide
is a view of it: one set of weights, trained by both terms of the bound.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pvae.errors import ProgramError

__all__ = ["Shared"]


class Shared(nn.Module):
    """``q(z | x)`` of the encoder in a model's prior, such as ``VAE(prior="vamp")``.

    Args:
        model: The model; ``model.prior.encoder`` is a guide.

    Raises:
        ProgramError: the model's prior holds no encoder.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        encoder = getattr(getattr(model, "prior", None), "encoder", None)
        if encoder is None:
            raise ProgramError(
                f"{type(model).__name__} holds no encoder in its prior: use the gaussian guide, or "
                "give the model prior='vamp'"
            )
        self.encoder = encoder

    def forward(self, x: Tensor) -> None:
        """Sample every latent site given ``x`` of shape ``(B, x_dim)``."""
        self.encoder(x)

    def posterior(self, x: Tensor) -> dict[str, Any]:
        """``q(z_site | x)`` for every site, batch shape ``(B,)``."""
        found: dict[str, Any] = self.encoder.posterior(x)
        return found
