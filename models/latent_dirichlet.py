"""Topic models with an amortised posterior: latent Dirichlet allocation and ProdLDA.

    topics ~ Dirichlet(alpha)  or  softmax(Normal(mu, diag(sigma^2)))
    x | topics ~ Multinomial(N, p),    p = softmax(beta' topics)            (product of experts)
                                       p = sum_t topics_t softmax(beta_t)   (mixture: LDA)

Srivastava & Sutton (2017), Autoencoding variational inference for topic models; Blei, Ng & Jordan
(2003). The logistic normal starts as the Laplace approximation of the Dirichlet: ``mu = 0``,
``sigma^2 = (1 - 1/T) / alpha``, in the softmax basis.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.count_distributions import MultinomialTotals
from pvae.errors import OptionError, did_you_mean

__all__ = ["LatentDirichlet"]

_PRIORS = ("dirichlet", "logistic_normal")
_DECODERS = ("mixture", "product")


class LatentDirichlet(nn.Module):
    """Documents as word counts ``(B, V)``; the number of words of each is given.

    Args:
        x_dim: Number of words V in the vocabulary.
        num_topics: Number of topics T.
        prior: logistic_normal (a real site, any guide of real latents) or dirichlet (a site on the
            simplex, the counts guide).
        concentration: The Dirichlet's alpha, the same for all topics.
        decoder: product (ProdLDA) or mixture (LDA).
        batch_norm: Normalise the product's logits over the batch, as ProdLDA does against collapsed
            topics. A datum's density then depends, in training, on its batch; not in evaluation.
        document_length: Number of words of the documents that the model generates.

    Raises:
        OptionError: no prior or decoder is called so, or there are fewer than two topics.
    """

    train_defaults = {"guide": "counts", "transform": "none"}

    def __init__(
        self,
        x_dim: int,
        *,
        num_topics: int = 20,
        prior: str = "logistic_normal",
        concentration: float = 1.0,
        decoder: str = "product",
        batch_norm: bool = False,
        document_length: int = 100,
    ) -> None:
        super().__init__()
        if prior not in _PRIORS:
            raise OptionError(f"no prior is called {prior!r}: {did_you_mean(prior, _PRIORS)}")
        if decoder not in _DECODERS:
            raise OptionError(
                f"no decoder is called {decoder!r}: {did_you_mean(decoder, _DECODERS)}"
            )
        if num_topics < 2:
            raise OptionError(f"num_topics must be at least 2, got {num_topics}")
        self.x_dim, self.num_topics, self.document_length = x_dim, num_topics, document_length
        self.prior, self.product = prior, decoder == "product"
        self.words = nn.Parameter(torch.randn(num_topics, x_dim))
        self.norm = nn.BatchNorm1d(x_dim, affine=False) if batch_norm else None
        if prior == "dirichlet":
            self.register_buffer("concentration", torch.full((num_topics,), concentration))
            return
        variance = (1 - 1 / num_topics) / concentration
        self.prior_loc = nn.Parameter(torch.zeros(num_topics))
        self.prior_log_scale = nn.Parameter(torch.full((num_topics,), variance).log() / 2)

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Latent sites and their event shapes."""
        return {"topics": (self.num_topics,)}

    def forward(self, x: Tensor | None = None, size: int = 1) -> Tensor:
        """Score counts ``x`` of shape ``(B, V)``, or generate ``size`` documents."""
        if x is None:
            total = self.words.new_full((size,), self.document_length)
        else:
            total = x.sum(-1)
        with pyro.plate("data", len(total), dim=-1):
            topics = pyro.sample("topics", self.latent_prior())
            likelihood = MultinomialTotals(self.word_logits(topics), total)
            sampled: Tensor = pyro.sample("x", likelihood, obs=x)
        return sampled

    def latent_prior(self) -> Any:
        """``p(topics)``: weights on the simplex, or their logits."""
        if self.prior == "dirichlet":
            return dist.Dirichlet(self.concentration)
        return dist.Normal(self.prior_loc, self.prior_log_scale.exp()).to_event(1)

    def weights(self, topics: Tensor) -> Tensor:
        """Topic weights ``(*, T)`` on the simplex."""
        return topics if self.prior == "dirichlet" else topics.softmax(-1)

    def word_logits(self, topics: Tensor) -> Tensor:
        """``log p(word | topics)`` up to a constant: ``(*, T) -> (*, V)``."""
        weights = self.weights(topics)
        if not self.product:
            mixed = weights @ self.words.softmax(-1)
            return mixed.clamp(min=torch.finfo(mixed.dtype).tiny).log()
        logits = weights @ self.words
        if self.norm is None:
            return logits
        normed: Tensor = self.norm(logits.reshape(-1, self.x_dim))
        return normed.reshape(logits.shape)
