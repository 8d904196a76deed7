r"""The LSTM language model: what a sentence's latent has to beat.

    w_t | w_1 ... w_{t-1} ~ Categorical(LSTM(w_1 ... w_{t-1}))

Its evidence is exact. So that it trains and is judged as every other model is, it has a latent
``z ~ Normal(0, 1)`` that nothing depends on; with the ``exact`` guide, whose posterior is then the
prior, the ELBO is the log likelihood.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.sentences import Sentences, WordDecoder

__all__ = ["LanguageModel"]


class LanguageModel(nn.Module):
    """An LSTM that writes a sentence word by word; train it with the ``exact`` guide.

    Args:
        x_dim: Words of a padded sentence, T.
        num_levels: Size of the vocabulary with padding, end and unknown.
        embedding: Size of a word's embedding.
        hidden: Width of the LSTM.
        dropout: Share of embeddings and outputs dropped in training.
        tied: A word's embedding is also its weights in the output layer.
        skip_padding: Compute at words alone: less work by the share of padding, but then a step
            cannot be staged.
    """

    takes_padding = True
    prior_loc: Tensor

    train_defaults = {"guide": "exact"}

    def __init__(
        self,
        x_dim: int,
        *,
        num_levels: int = 256,
        embedding: int = 128,
        hidden: int = 128,
        dropout: float = 0.0,
        tied: bool = False,
        skip_padding: bool = True,
    ) -> None:
        super().__init__()
        self.x_dim, self.num_levels, self.skip_padding = x_dim, num_levels, skip_padding
        self.decoder = WordDecoder(
            num_levels, 0, embedding=embedding, hidden=hidden, dropout=dropout, tied=tied
        )
        self.register_buffer("prior_loc", torch.zeros(1))

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Latent sites and their event shapes."""
        return {"z": (1,)}

    def forward(self, x: Tensor | None = None, size: int = 1) -> Tensor:
        """Score word numbers ``(B, T)``, or generate ``size`` sentences with ``x=None``."""
        size, length = (size, self.x_dim) if x is None else (x.shape[0], x.shape[1])
        with pyro.plate("data", size, dim=-1):
            pyro.sample("z", dist.Normal(self.prior_loc, 1.0).to_event(1))
            sampled: Tensor = pyro.sample("x", self.decode(size, length), obs=x)
        return sampled

    def decode(self, size: int, length: int) -> Any:
        """``p(x)`` of ``size`` sentences: events ``(length,)``."""
        return Sentences(self.decoder, None, size, length, skip_padding=self.skip_padding)

    def posterior(self, x: Tensor) -> dict[str, Any]:
        """``p(z | x) = Normal(0, 1)``."""
        return {"z": dist.Normal(self.prior_loc.expand(len(x), 1), 1.0).to_event(1)}

    def log_evidence(self, x: Tensor) -> Tensor:
        """``log p(x)``: ``(B, T) -> (B,)``, nats, exact."""
        log_prob: Tensor = self.decode(len(x), x.shape[1]).log_prob(x)
        return log_prob
