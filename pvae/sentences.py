"""Sentences as rows of word numbers: the recurrent decoder, and its distribution over them.

A sentence is ``w_1 ... w_n <eos>``, padded on the right: numbers are 0 for padding, 1 for the end
of a sentence, 2 for an unknown word, then the words of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import cross_entropy, linear

from pvae.errors import OptionError
from pvae.recurrent import LSTM

__all__ = ["END", "PADDING", "UNKNOWN", "Sentences", "WordDecoder", "choose", "num_words", "trim"]

PADDING, END, UNKNOWN = 0, 1, 2
_MAX_LOGITS = 2**24  # numbers held at once: 64 MiB in single precision


def num_words(x: Tensor) -> Tensor:
    """Words of each sentence, its end counted and padding not: ``(*, T) -> (*,)``, int64."""
    return (x != PADDING).sum(-1)


def trim(x: Tensor) -> Tensor:
    """The columns up to the end of the longest sentence: ``(B, T) -> (B, T')``."""
    return x[:, : max(1, int(num_words(x).max()))]


def choose(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """One class for each row of ``logits`` ``(*, V)``: ``(*,)``.

    Args:
        logits: Unnormalised log probabilities.
        temperature: They are divided by it; 0 takes the largest (greedy).
        top_p: Draw among the likeliest classes alone that together have at least this
            probability (nucleus sampling, Holtzman et al. 2020).

    Raises:
        OptionError: ``temperature`` is negative, or ``top_p`` is not in (0, 1].
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise OptionError(
            f"temperature is at least 0 and top_p in (0, 1], got {temperature} and {top_p}"
        )
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_p < 1:
        ordered, index = logits.sort(-1, descending=True)
        shares = ordered.softmax(-1)
        outside = shares.cumsum(-1) - shares >= top_p  # of the likelier ones alone
        logits = logits.masked_fill(outside.gather(-1, index.argsort(-1)), -torch.inf)
    gumbel = -torch.empty_like(logits).exponential_().log()
    return (logits + gumbel).argmax(-1)


class WordDecoder(nn.Module):
    """An LSTM over the words so far; ``z`` sets its first state and joins each input.

    Args:
        num_classes: Size of the vocabulary with padding, end and unknown: numbers from 0.
        z_dim: Size of ``z``; 0 for a language model.
        embedding: Size of a word's embedding.
        hidden: Width of the LSTM.
        dropout: Share of the embeddings' and of the LSTM's outputs dropped in training.
        word_dropout: Share of the input words that training replaces by ``<unk>``, so that the
            decoder must look at ``z`` (Bowman et al. 2016).
        tied: A word's embedding is also its weights in the output layer (Press & Wolf 2017, Using
            the output embedding to improve language models): fewer numbers to overfit with.
    """

    def __init__(
        self,
        num_classes: int,
        z_dim: int,
        *,
        embedding: int,
        hidden: int,
        dropout: float = 0.0,
        word_dropout: float = 0.0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 3:
            raise OptionError(
                f"a vocabulary has padding, <eos> and <unk> besides its words, got {num_classes}"
            )
        if not 0 <= dropout < 1 or not 0 <= word_dropout <= 1:
            raise OptionError(
                f"dropout and word_dropout are shares, got {dropout} and {word_dropout}"
            )
        self.num_classes, self.word_dropout = num_classes, word_dropout
        self.embedding = nn.Embedding(num_classes, embedding)
        self.initial = nn.Linear(z_dim, 2 * hidden) if z_dim else None
        self.lstm = LSTM(embedding + z_dim, hidden, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        others = num_classes - 1  # padding is never predicted
        self.output = nn.Linear(hidden, embedding if tied else others)
        self.bias = nn.Parameter(torch.zeros(others)) if tied else None
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, words: Tensor, z: Tensor | None) -> Tensor:
        """What the LSTM knows before each word: ``(B, T)`` and ``(*, B, Z)`` to ``(*, B, T, H)``.

        Place t depends on ``words[:, :t]`` alone.
        """
        before = torch.cat([torch.full_like(words[:, :1], END), words[:, :-1]], 1)
        if self.training and self.word_dropout:
            dropped = torch.rand(before.shape, device=before.device) < self.word_dropout
            before = before.masked_fill(dropped, UNKNOWN)
        given = self.dropout(self.embedding(before))
        if z is None:
            return self.dropout(self.lstm(given)[0])  # type: ignore[no-any-return]
        batch = z.shape[:-1]
        given = torch.cat(
            [given.expand(*batch, *given.shape[-2:]),
             z[..., None, :].expand(*batch, given.shape[-2], z.shape[-1])], -1,
        )  # fmt: skip
        output, _ = self.lstm(given.flatten(0, -3), self._first(z.flatten(0, -2)))
        return self.dropout(output).unflatten(0, batch)  # type: ignore[no-any-return]

    def scores(self, known: Tensor) -> Tensor:
        """Unnormalised log probabilities of all but padding: ``(*, H)`` to ``(*, V - 1)``."""
        given: Tensor = self.output(known)
        if self.bias is None:
            return given
        return linear(given, self.embedding.weight[1:], self.bias)

    def _first(self, z: Tensor) -> tuple[Tensor, Tensor]:
        assert self.initial is not None
        hidden, cell = self.initial(z)[None].chunk(2, -1)
        return torch.tanh(hidden).contiguous(), cell.contiguous()

    def write(
        self,
        z: Tensor | None,
        size: int,
        length: int,
        temperature: float,
        top_p: float,
        avoid: Sequence[int] = (),
    ) -> Tensor:
        """Sentences word by word, at most ``length`` words, ``(size, length)``.

        Args:
            z: ``(size, Z)``, or ``None``.
            size: How many.
            length: Most words, the end counted; a sentence without an end is cut there.
            temperature: See :func:`choose`.
            top_p: Likewise.
            avoid: Numbers of words that are never written.

        Raises:
            OptionError: ``avoid`` names no word, or every one.
        """
        device = self.embedding.weight.device
        avoided = self._without(avoid)
        word = torch.full((size,), END, device=device)
        running = torch.ones(size, dtype=torch.bool, device=device)
        state = None if z is None else self._first(z)
        written = []
        for _ in range(length):
            given = self.embedding(word)
            given = given if z is None else torch.cat([given, z], -1)
            output, state = self.lstm(given[:, None], state)
            word = 1 + choose(self.scores(output[:, 0]) + avoided, temperature, top_p)
            written.append(word.masked_fill(~running, PADDING))
            running = running & (word != END)
        return torch.stack(written, -1)

    def _without(self, avoid: Sequence[int]) -> Tensor:
        """What is added to the scores: minus infinity for the words to avoid, 0 for the rest."""
        numbers, last = sorted(set(avoid)), self.num_classes - 1
        if numbers and not 1 <= numbers[0] <= numbers[-1] <= last:
            raise OptionError(f"avoid takes numbers of words, 1 (the end) to {last}: got {numbers}")
        if len(numbers) == last:
            raise OptionError("avoid names every word: leave one that can be written")
        added = self.embedding.weight.new_zeros(last)
        added[[number - 1 for number in numbers]] = -torch.inf
        return added


class Sentences(TorchDistribution):  # type: ignore[misc]
    """``prod_t Categorical(w_t | w_1 ... w_{t-1}, z)`` up to the end of each sentence.

    Events are ``(T,)`` word numbers. A sentence of T words without an end has the probability of
    all sentences that begin so; with these, the probabilities sum to one.

    Args:
        decoder: The network.
        z: ``(*, B, Z)``, or ``None`` for a language model.
        size: B.
        length: T.
        skip_padding: Compute at words alone: much less work, but its shapes depend on the data, so
            that no graph can be traced.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        decoder: WordDecoder,
        z: Tensor | None,
        size: int,
        length: int,
        *,
        skip_padding: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        self.decoder, self.z = decoder, z
        self.skip_padding = skip_padding
        batch = torch.Size([size]) if z is None else z.shape[:-1]
        super().__init__(batch, torch.Size([length]), validate_args=validate_args)

    @property
    def support(self) -> Any:
        """Word numbers, 0 for padding."""
        words = constraints.integer_interval(0, self.decoder.num_classes - 1)  # type: ignore[no-untyped-call]
        return constraints.independent(words, 1)  # type: ignore[no-untyped-call]

    def expand(self, batch_shape: Any, _instance: Any = None) -> Sentences:
        """The same distribution with a larger batch shape."""
        shape = torch.Size(batch_shape)
        new = Sentences.__new__(Sentences)
        new.decoder, new.skip_padding = self.decoder, self.skip_padding
        new.z = None if self.z is None else self.z.expand(*shape, self.z.shape[-1])
        TorchDistribution.__init__(new, shape, self.event_shape, validate_args=False)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of word numbers ``(B, T)``: ``(*, B)``, nats."""
        if self._validate_args:
            self._validate_sample(value)
        words = value.long()
        if self.skip_padding:
            words = trim(words)
        known = self.decoder(words, self.z)
        if self.skip_padding:
            row, place = (words != PADDING).nonzero(as_tuple=True)
            terms = self._log_probs(known[..., row, place, :], words[row, place])
            total = terms.new_zeros((*terms.shape[:-1], len(words))).index_add(-1, row, terms)
        else:
            terms = self._log_probs(known.flatten(-3, -2), words.flatten())
            by_sentence = terms.reshape(*terms.shape[:-1], *words.shape)
            total = by_sentence.masked_fill(words == PADDING, 0.0).sum(-1)
        return total.expand(self.batch_shape)

    def _log_probs(self, known: Tensor, words: Tensor) -> Tensor:
        """``log p(word | known)``: ``(*, n, H)`` and ``(n,)`` to ``(*, n)``."""
        targets = (words - 1).clamp(min=0).expand(known.shape[:-1]).flatten()
        rows = max(1, _MAX_LOGITS // self.decoder.num_classes)
        pieces = [
            -cross_entropy(self.decoder.scores(part), target, reduction="none")
            for part, target in zip(
                torch.split(known.flatten(0, -2), rows), torch.split(targets, rows), strict=True
            )
        ]
        return torch.cat(pieces).reshape(known.shape[:-1])

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Word numbers ``(*sample, *batch, T)``."""
        shape = torch.Size(sample_shape) + self.batch_shape
        z = None if self.z is None else self.z.expand(*shape, -1).reshape(shape.numel(), -1)
        with torch.no_grad():
            written = self.decoder.write(z, shape.numel(), self.event_shape[0], 1.0, 1.0)
        return written.reshape(*shape, -1)
