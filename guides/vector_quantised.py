"""The encoder of a vector-quantised VAE: all mass on the nearest code vectors.

q(z | x) = 1 where z_m = argmin_e ||h_m(x) - e||,    h the encoder
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pvae.codebooks import NearestCode, nearest_code
from pvae.errors import OptionError, ProgramError
from pvae.networks import Encoder, one_hot

__all__ = ["VectorQuantised"]


class VectorQuantised(nn.Module):
    """A deterministic guide for the vq_vae model, whose codebook it shares.

    The bound's derivative goes straight through to the encoder; the codebook learns by
    ``||stop(h) - e||^2`` and the encoder is held near by ``commitment ||h - stop(e)||^2``. Both
    enter as a factor whose value is zero and whose derivative is theirs, so that the weights stay
    ``log p(x, z)`` and the bound is one. van den Oord et al. (2017).

    With a ``decay`` g the codebook has no loss, but follows moving averages (their appendix A.1):
    of the ``n_c`` features of a batch that are nearest to code c, and of their sum::

        N_c <- g N_c + (1 - g) n_c,    m_c <- g m_c + (1 - g) sum h,    e_c = m_c / N_c

    A code that is dead, its ``N_c`` below ``dead``, is put on a feature of the batch drawn at
    random, and counts as one. In training mode every run does so, before it quantises, as batch
    normalisation keeps its statistics: those are buffers, saved and resumed, and a batch is not
    cut in parts.

    Args:
        x_dim: Number of features of a datum.
        model: A model with a ``codebook`` and one site of code vectors.
        commitment: Weight of the commitment.
        decay: g, of the codebook's moving averages; 0 lets it learn by its loss.
        dead: Number of features in a batch, on average, below which a code is seeded anew; 0 never.
        hidden: Width of each layer of the encoder.
        activation: Its non-linearity.
        x_mean: Mean of the data, subtracted from the encoder's input, ``(x_dim,)``.
        x_scale: Standard deviation of the data, by which the input is divided, ``(x_dim,)``.

    Raises:
        OptionError: ``commitment`` or ``dead`` is negative, or ``decay`` not in [0, 1).
        ProgramError: the model has no codebook.
    """

    counts: Tensor
    sums: Tensor

    def __init__(
        self,
        x_dim: int,
        model: Any,
        *,
        commitment: float = 0.25,
        decay: float = 0.0,
        dead: float = 0.5,
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
        if not (0 <= decay < 1 and 0 <= dead < 1):
            raise OptionError(
                "moving averages take 0 <= decay < 1, and seeding anew 0 <= dead < 1 (a new code "
                f"counts as one), got decay={decay}, dead={dead}: try decay=0.99"
            )
        self.model, self.commitment = model, commitment
        self.decay, self.dead = decay, dead
        ((self.site, self.shape),) = model.latents.items()
        self.encoder = Encoder(
            x_dim, hidden, activation_name=activation, x_mean=x_mean, x_scale=x_scale
        )
        self.head = nn.Linear(self.encoder.out_features, self.shape[0] * self.shape[1])
        if decay:
            codebook = model.codebook.detach()
            self.register_buffer("counts", torch.ones_like(codebook[:, 0]))
            self.register_buffer("sums", codebook.clone())

    def forward(self, x: Tensor) -> None:
        """Draw the code vectors given ``x`` of shape ``(B, x_dim)``."""
        features = self.head(self.encoder(x)).unflatten(-1, self.shape)
        if self.decay and self.training:
            self._follow(features.detach().flatten(0, -2))
        posterior = NearestCode(features, self.model.codebook)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample(self.site, posterior)
            penalty = self._penalty(features)
            pyro.factor("commitment", penalty - penalty.detach(), has_rsample=True)

    @torch.no_grad()
    def _follow(self, features: Tensor) -> None:
        """Move the averages, and the codebook with them, by features ``(B M, D)``."""
        codebook = self.model.codebook
        own = one_hot(nearest_code(features, codebook), len(codebook), features.dtype)
        counts = torch.lerp(own.sum(0), self.counts, self.decay)
        sums = torch.lerp(own.T @ features, self.sums, self.decay)
        drawn = torch.randint(len(features), (len(codebook),), device=features.device)
        dead = counts < self.dead
        self.counts.copy_(torch.where(dead, 1.0, counts))
        self.sums.copy_(torch.where(dead[:, None], features[drawn], sums))
        used = self.counts[:, None] > 1e-6
        codebook.copy_(torch.where(used, self.sums / self.counts[:, None], codebook))

    def _penalty(self, features: Tensor) -> Tensor:
        codebook = self.model.codebook
        code = codebook[nearest_code(features.detach(), codebook)]
        stay: Tensor = self.commitment * (features - code.detach()).square().sum((-1, -2))
        if self.decay:
            return stay
        learn: Tensor = (features.detach() - code).square().sum((-1, -2))
        return learn + stay
