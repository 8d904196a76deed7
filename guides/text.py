r"""An amortised Gaussian posterior of sentences.

    q(z | w) = Normal(z; loc(w), diag(scale(w)^2))

with a convolutional encoder (kernels of several widths, pooled over the sentence's own words: Kim
2014, Convolutional neural networks for sentence classification) or the last state of an LSTM
(Bowman et al. 2016).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import relu, softplus

from pvae.errors import OptionError, ProgramError
from pvae.recurrent import LSTM
from pvae.sentences import PADDING, num_words, trim

__all__ = ["TextEncoder"]


class TextEncoder(nn.Module):
    """A diagonal Gaussian for each latent site, from the words of a sentence.

    Args:
        latents: Latent site -> event shape, each ``(size,)``.
        model: A model of sentences: its ``num_levels`` is the vocabulary's size.
        encoder: convolutional or lstm.
        embedding: Size of a word's embedding.
        hidden: Channels of each kernel, or width of the LSTM.
        kernel_sizes: Widths of the kernels, in words.
        dropout: Share of the embeddings and of the features dropped in training.

    Raises:
        OptionError: no encoder is called so.
        ProgramError: the model is none of sentences, or a latent is no vector.
    """

    def __init__(
        self,
        latents: Mapping[str, Sequence[int]],
        model: Any,
        *,
        encoder: str = "convolutional",
        embedding: int = 128,
        hidden: int = 128,
        kernel_sizes: Sequence[int] = (1, 3, 5),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if encoder not in ("convolutional", "lstm"):
            raise OptionError(f"encoder is 'convolutional' or 'lstm', got {encoder!r}")
        if not hasattr(model, "decoder") or not hasattr(model, "skip_padding"):
            raise ProgramError(
                f"the text guide reads sentences, and {type(model).__name__} is no model of them: "
                "use the gaussian guide"
            )
        if any(len(shape) != 1 for shape in latents.values()):
            raise ProgramError(f"the text guide takes latents that are vectors, got {latents}")
        self.skip_padding, self.kind = bool(model.skip_padding), encoder
        self.embedding = nn.Embedding(model.num_levels, embedding)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.dropout = nn.Dropout(dropout)
        if encoder == "lstm":
            self.lstm, width = LSTM(embedding, hidden, batch_first=True), hidden
        else:
            self.kernels = nn.ModuleList(
                nn.Conv1d(embedding, hidden, size, padding=size // 2) for size in kernel_sizes
            )
            width = 2 * hidden * len(self.kernels)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(width, 2 * shape[0]) for name, shape in latents.items()}
        )

    def forward(self, x: Tensor) -> None:
        """Sample every latent site given word numbers ``(B, T)``."""
        with pyro.plate("data", len(x), dim=-1):
            for name, posterior in self.posterior(x).items():
                pyro.sample(name, posterior)

    def posterior(self, x: Tensor) -> dict[str, Any]:
        """``q(z_site | x)`` for every site, batch shape ``(B,)``."""
        words = trim(x.long()) if self.skip_padding else x.long()
        features = self.dropout(self._features(words))
        found = {}
        for name, head in self.heads.items():
            loc, raw = head(features).chunk(2, -1)
            found[name] = dist.Normal(loc, softplus(raw) + 1e-4).to_event(1)
        return found

    def _features(self, words: Tensor) -> Tensor:
        mask = (words != PADDING)[..., None]
        given = self.dropout(self.embedding(words)) * mask
        if self.kind == "lstm":
            output, _ = self.lstm(given)
            last = (num_words(words) - 1).clamp(min=0)[:, None, None]
            final: Tensor = output.gather(1, last.expand(-1, 1, output.shape[-1]))[:, 0]
            return final
        count = mask.sum(1).clamp(min=1)
        pooled = []
        for kernel in self.kernels:
            seen = (
                relu(kernel(given.mT).mT[:, : words.shape[1]]) * mask
            )  # not negative, so 0 is least
            pooled += [seen.amax(1), seen.sum(1) / count]
        return torch.cat(pooled, -1)
