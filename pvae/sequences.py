"""How the log likelihood of sequences is quoted: nats a step, in three ways, and perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.errors import DataError
from pvae.evidence import Evidence

__all__ = ["PerStep", "perplexity", "per_step"]


@dataclass(frozen=True)
class PerStep:
    """Negative log likelihood of N sequences, nats a time step, as the literature quotes it.

    Krishnan, Shalit & Sontag (2017) print ``evidence (bound) {mean_of_sequences}``.

    Attributes:
        evidence: ``-sum_n log p(x_n) / sum_n T_n`` by the estimate of the evidence.
        bound: ``-sum_n ELBO_n / sum_n T_n``: every step counts alike.
        mean_of_sequences: ``mean_n -ELBO_n / T_n``: every sequence counts alike.
        num_sequences: N.
        num_steps: ``sum_n T_n``.
    """

    evidence: float
    bound: float
    mean_of_sequences: float
    num_sequences: int
    num_steps: int

    def __str__(self) -> str:
        return f"{self.evidence:.3f} ({self.bound:.3f}) {{{self.mean_of_sequences:.3f}}}"


def per_step(evidence: Evidence, lengths: Tensor) -> PerStep:
    """The three figures of an evidence of N sequences of ``lengths`` ``(N,)`` steps.

    Raises:
        DataError: a length is below one, or there is not one for each sequence.
    """
    steps = _checked(evidence.log_evidence, lengths)
    return PerStep(
        evidence=float(-evidence.log_evidence.sum() / steps.sum()),
        bound=float(-evidence.elbo.sum() / steps.sum()),
        mean_of_sequences=float((-evidence.elbo / steps).mean()),
        num_sequences=len(steps),
        num_steps=int(steps.sum()),
    )


def perplexity(log_p: Tensor, num_words: Tensor) -> float:
    """``exp(-sum_n log p(x_n) / sum_n words_n)``, the ends of sentences counted as words.

    Args:
        log_p: Log probability of each sentence, ``(N,)``, nats.
        num_words: Words of each, its end among them, ``(N,)``.

    Raises:
        DataError: a sentence has no word, or there is not one number for each.
    """
    words = _checked(log_p, num_words)
    return math.exp(float(-log_p.detach().double().sum() / words.sum()))


def _checked(log_p: Tensor, lengths: Tensor) -> Tensor:
    if lengths.shape != log_p.shape or bool((lengths < 1).any()):
        raise DataError(
            f"lengths must be at least 1, one for each of {len(log_p)} sequences, got shape "
            f"{tuple(lengths.shape)} and least {int(lengths.min()) if lengths.numel() else 'none'}"
        )
    return lengths.to(dtype=torch.float64, device=log_p.device)
