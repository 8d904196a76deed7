r"""The variational autoencoder of sentences with a recurrent decoder.

    z ~ Normal(0, I),    w_t | w_1 ... w_{t-1}, z ~ Categorical(LSTM(w_1 ... w_{t-1}, z))

Bowman, Vilnis, Vinyals, Dai, Jozefowicz & Bengio (2016), Generating sentences from a continuous
space; ``z`` sets the LSTM's first state and joins each of its inputs, as in He, Spokoyny, Neubig &
Berg-Kirkpatrick (2019). A decoder this strong can do without ``z``, and a plain ELBO lets it: train
with free bits or a cyclical KL weight, and look at ``pvae.evidence.information``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.sentences import Sentences, WordDecoder

__all__ = ["Text"]


class Text(nn.Module):
    """``z ~ Normal(0, I)`` and an LSTM that writes a sentence from it, word by word.

    Args:
        x_dim: Words of a padded sentence, T.
        num_levels: Size of the vocabulary with padding, end and unknown.
        z_dim: Number of latent dimensions.
        embedding: Size of a word's embedding.
        hidden: Width of the LSTM.
        dropout: Share of embeddings and outputs dropped in training.
        word_dropout: Share of the words the decoder reads that training replaces by ``<unk>``.
        tied: A word's embedding is also its weights in the output layer.
        skip_padding: Compute at words alone: less work by the share of padding, but then a step
            cannot be staged.
    """

    takes_padding = True
    train_defaults = {"guide": "text"}

    def __init__(
        self,
        x_dim: int,
        *,
        num_levels: int = 256,
        z_dim: int = 32,
        embedding: int = 128,
        hidden: int = 128,
        dropout: float = 0.0,
        word_dropout: float = 0.0,
        tied: bool = False,
        skip_padding: bool = True,
    ) -> None:
        super().__init__()
        self.x_dim, self.num_levels, self.z_dim = x_dim, num_levels, z_dim
        self.skip_padding = skip_padding
        self.decoder = WordDecoder(
            num_levels, z_dim, embedding=embedding, hidden=hidden, dropout=dropout,
            word_dropout=word_dropout, tied=tied,
        )  # fmt: skip
        self.register_buffer("prior_loc", torch.zeros(z_dim))

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Latent sites and their event shapes."""
        return {"z": (self.z_dim,)}

    def forward(self, x: Tensor | None = None, size: int = 1) -> Tensor:
        """Score word numbers ``(B, T)``, or generate ``size`` sentences with ``x=None``."""
        length = self.x_dim if x is None else x.shape[1]
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.prior_loc, 1.0).to_event(1))
            sampled: Tensor = pyro.sample("x", self.decode(z, length), obs=x)
        return sampled

    def decode(self, z: Tensor, length: int | None = None) -> Any:
        """``p(x | z)`` for ``z`` of shape ``(*, z_dim)``: events ``(length,)``."""
        length = self.x_dim if length is None else length
        return Sentences(self.decoder, z, z.shape[-2], length, skip_padding=self.skip_padding)

    @torch.no_grad()
    def write(
        self,
        z: Tensor,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        length: int | None = None,
        avoid: Sequence[int] = (),
    ) -> Tensor:
        """Sentences from ``z`` ``(B, z_dim)``: word numbers ``(B, length)``.

        Args:
            z: Latents.
            temperature: 1 draws from the model, 0 takes the likeliest word at each place.
            top_p: Draw among the likeliest words alone that have this probability together.
            length: Most words, the end counted; T if left out.
            avoid: Numbers of words that are never written: ``[2]`` is the unknown word.

        Raises:
            OptionError: ``avoid`` names no word, or every one.
        """
        length = self.x_dim if length is None else length
        training = self.training
        self.eval()
        try:
            return self.decoder.write(z, len(z), length, temperature, top_p, avoid)
        finally:
            self.train(training)
