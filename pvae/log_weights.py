"""Pure algebra on log importance weights of shape ``(K, B)``: K particles, B data.

Nothing here knows of models, guides or Pyro. Units are nats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["ess", "log_mean_exp", "pareto_k", "psis", "stderr"]

_MIN_TAIL = 5  # a generalized Pareto fit needs at least this many tail weights


def log_mean_exp(log_weights: Tensor) -> Tensor:
    r"""``log (1/K) sum_k exp(log_weights[k])``: ``(K, B) -> (B,)``, safe against overflow."""
    return torch.logsumexp(log_weights, 0) - math.log(log_weights.shape[0])


def ess(log_weights: Tensor) -> Tensor:
    r"""Effective sample size ``(sum_k w_k)^2 / sum_k w_k^2``, between 1 and K: ``(K, B) -> (B,)``.

    Kong, A. (1992). A note on importance sampling using standardized weights.
    """
    return torch.exp(2 * torch.logsumexp(log_weights, 0) - torch.logsumexp(2 * log_weights, 0))


def stderr(log_weights: Tensor) -> Tensor:
    r"""Standard error of ``log_mean_exp`` by the delta method, in nats: ``(K, B) -> (B,)``.

    ``sqrt((K / ess - 1) / (K - 1))``, which is the coefficient of variation of the weights over
    ``sqrt(K)``. It is infinite for ``K = 1`` and means little where :func:`pareto_k` exceeds 0.7.
    """
    num_particles = log_weights.shape[0]
    if num_particles == 1:
        return torch.full_like(log_weights[0], math.inf)
    excess = (num_particles / ess(log_weights) - 1).clamp(min=0)
    return (excess / (num_particles - 1)).sqrt()


def pareto_k(log_weights: Tensor) -> Tensor:
    r"""Pareto tail index k-hat of each datum's weights: ``(K, B) -> (B,)``, float64.

    Below 0.7 the importance-sampling estimate and its standard error can be trusted; the larger,
    the heavier the tail (Vehtari et al. 2024). Weights that are constant over K (an exact
    posterior as guide) have no tail: ``-inf``. Fewer than 5 tail weights (K <= 20): ``+inf``.
    """
    return psis(log_weights)[1]


def psis(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    r"""Pareto-smoothed importance sampling, each datum on its own.

    The ``min(K/5, 3 sqrt(K))`` largest weights are replaced by the quantiles of a generalized
    Pareto distribution fitted to them (Zhang & Stephens 2009), truncated at the largest raw weight.

    Args:
        log_weights: ``(K, B)`` log weights (not log-likelihoods), nats.

    Returns:
        The smoothed log weights ``(K, B)`` on the scale of the input, and k-hat ``(B,)``, float64.

    Reference:
        Vehtari, Simpson, Gelman, Yao & Gabry (2024). Pareto smoothed importance sampling. JMLR 25.
    """
    largest = log_weights.max(0).values.double()
    raw = log_weights.double() - largest
    num_particles, num_data = raw.shape
    ordered, order = raw.sort(0)
    khat = raw.new_full((num_data,), math.inf)
    tail_size = math.ceil(min(num_particles / 5, 3 * math.sqrt(num_particles)))
    if num_particles > tail_size:
        tiny = math.log(torch.finfo(torch.float64).tiny)
        cutoff = ordered[num_particles - tail_size - 1].clamp(min=tiny)
        lengths = (ordered > cutoff).sum(0)
        for length in sorted(set(lengths.tolist())):  # ties at the cut-off shorten a datum's tail
            if length < _MIN_TAIL:
                continue
            for columns in (lengths == length).nonzero().squeeze(-1).split(512):
                smoothed, khat[columns] = _fit_tail(ordered[-length:, columns], cutoff[columns])
                ordered[-length:, columns] = smoothed
    constant = (raw.min(0).values > -1e-9) & (num_particles > 1)  # one weight says nothing
    smoothed_weights = torch.empty_like(raw).scatter_(0, order, ordered) + largest
    return smoothed_weights, khat.masked_fill(constant, -math.inf)


def _fit_tail(log_tail: Tensor, cutoff: Tensor) -> tuple[Tensor, Tensor]:
    """Smooth one group of equally long tails: ``(M, B)`` sorted log weights, ``(B,)`` cut-offs."""
    length = log_tail.shape[0]
    khat, sigma = _fit_generalized_pareto(log_tail.exp() - cutoff.exp())
    quantiles = (torch.arange(length, dtype=torch.float64)[:, None] + 0.5) / length
    excess = sigma * torch.expm1(-khat * torch.log1p(-quantiles)) / khat
    smoothed = (excess + cutoff.exp()).log().clamp(max=0)
    return torch.where(khat.isfinite(), smoothed, log_tail), khat


def _fit_generalized_pareto(excess: Tensor) -> tuple[Tensor, Tensor]:
    """Empirical-Bayes fit of shape and scale: ``(M, B)`` sorted excesses -> ``(B,)``, ``(B,)``."""
    length = excess.shape[0]
    grid_size = 30 + int(math.sqrt(length))
    grid = 1 - (grid_size / (torch.arange(1, grid_size + 1, dtype=torch.float64) - 0.5)).sqrt()
    quartile = excess[int(length / 4 + 0.5) - 1]
    b = grid[:, None] / (3 * quartile) + 1 / excess[-1]
    k = torch.log1p(-b[:, None] * excess).mean(1)
    profile = length * ((-b / k).log() - k - 1)
    weights = profile.softmax(0)
    weights = weights.masked_fill(weights < 10 * torch.finfo(torch.float64).eps, 0)
    b_mean = (b * weights).sum(0) / weights.sum(0)
    k_mean = torch.log1p(-b_mean * excess).mean(0)
    sigma = -k_mean / b_mean
    return (length * k_mean + 5) / (length + 10), sigma
