"""Distributions of counts, by their means, and of counts that share a total."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["MultinomialTotals", "negative_binomial"]


def negative_binomial(
    log_mean: Tensor, log_dispersion: Tensor, gate_logits: Tensor | None = None
) -> Any:
    """A negative binomial by its mean ``m`` and inverse dispersion ``r``; variance ``m + m^2/r``.

    Args:
        log_mean: ``log m``.
        log_dispersion: ``log r``; towards infinity the Poisson.
        gate_logits: Log odds of a zero of another cause (zero-inflated), if any.
    """
    total, logits = log_dispersion.exp(), log_mean - log_dispersion
    if gate_logits is None:
        return dist.NegativeBinomial(total, logits=logits)
    return dist.ZeroInflatedNegativeBinomial(total, logits=logits, gate_logits=gate_logits)


class MultinomialTotals(TorchDistribution):  # type: ignore[misc]
    r"""Counts over V kinds given their total, which may differ from datum to datum.

    ``log p(x) = log N! - sum_v log x_v! + sum_v x_v log p_v`` with ``N = sum_v x_v``.

    Args:
        logits: ``(*, V)``, log probabilities up to a constant.
        total: ``(*,)`` the totals N, by which draws are made; a density takes N from the counts.
    """

    arg_constraints = {"logits": constraints.real_vector}
    support = constraints.independent(constraints.nonnegative_integer, 1)  # type: ignore[no-untyped-call]

    def __init__(self, logits: Tensor, total: Tensor, *, validate_args: bool | None = None) -> None:
        batch = torch.broadcast_shapes(logits.shape[:-1], total.shape)  # type: ignore[no-untyped-call]
        self.logits = logits.expand(*batch, logits.shape[-1])
        self.total = total.expand(batch)
        super().__init__(batch, logits.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MultinomialTotals:
        """The same distribution with a larger batch shape."""
        batch = torch.Size(batch_shape)
        logits = self.logits.expand(batch + self.event_shape)
        return MultinomialTotals(logits, self.total.expand(batch), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of counts ``(*, V)``, nats."""
        if self._validate_args:
            self._validate_sample(value)
        orders = torch.lgamma(value.sum(-1) + 1) - torch.lgamma(value + 1).sum(-1)
        scores: Tensor = orders + (value * self.logits.log_softmax(-1)).sum(-1)
        return scores

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Counts ``(*, V)``: N draws of one kind each."""
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            rows = self.logits.expand(shape).reshape(-1, shape[-1])
            totals = self.total.expand(shape[:-1]).reshape(-1, 1)
            longest = max(int(totals.max()), 1)
            kinds = torch.multinomial(rows.softmax(-1), longest, replacement=True)
            ones = (torch.arange(longest, device=rows.device) < totals).to(rows.dtype)
            return torch.zeros_like(rows).scatter_add(-1, kinds, ones).reshape(shape)

    @property
    def mean(self) -> Tensor:
        """``N p``."""
        return self.total[..., None] * self.logits.softmax(-1)
