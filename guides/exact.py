"""The exact posterior of a model that knows it, as a guide.

With it, log weights are constant over particles and equal to ``log p(x)``, and stochastic
variational inference is a stochastic form of EM: every step takes the E-step exactly.
"""

from __future__ import annotations

from typing import Any

import pyro
from torch import Tensor, nn

from pvae.errors import ProgramError

__all__ = ["Exact"]


class Exact(nn.Module):
    """``q(z | x) = p(z | x)``, for a model with a ``posterior(x) -> {site: distribution}``.

    Args:
        model: The model, whose parameters the guide shares.

    Raises:
        ProgramError: the model has no ``posterior`` method.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        if not hasattr(model, "posterior"):
            raise ProgramError(
                f"{type(model).__name__} has no posterior(x) method, so its exact posterior is not "
                "known: use the gaussian guide"
            )
        self.model = model

    def forward(self, x: Tensor) -> None:
        """Sample every latent site from its posterior given ``x``."""
        with pyro.plate("data", len(x), dim=-1):
            for name, posterior in self.model.posterior(x).items():
                pyro.sample(name, posterior)
