"""Discrete draws with a surrogate gradient: the values and masses are exact, the gradient is not.

The value is a draw of the discrete distribution itself and ``log_prob`` its exact log mass, so the
bound that a guide of these gives is a bound, whatever the temperature; only the gradient is biased.

- *Straight-through* (Bengio et al. 2013): the derivative of the value is that of the mean.
- *Gumbel-softmax* (Jang et al. 2017; Maddison et al. 2017), in its straight-through form: the
  derivative is that of ``softmax((logits + gumbel) / temperature)``, at the noise that was drawn.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pvae.errors import OptionError, did_you_mean

__all__ = ["RELAXATIONS", "RelaxedBernoulli", "RelaxedOneHot", "check_relaxation"]

RELAXATIONS = ("gumbel_softmax", "none", "straight_through")


def check_relaxation(relaxation: str, temperature: float) -> None:
    """Refuse what does not exist.

    Raises:
        OptionError: there is no such relaxation, or the temperature is not positive.
    """
    if relaxation not in RELAXATIONS:
        hint = did_you_mean(relaxation, RELAXATIONS)
        raise OptionError(f"no relaxation is called {relaxation!r}: {hint}")
    if not temperature > 0:
        raise OptionError(f"temperature must be positive, got {temperature}")


def _gumbel(like: Tensor, shape: Any) -> Tensor:
    return -torch.empty(shape, dtype=like.dtype, device=like.device).exponential_().log()


class RelaxedOneHot(dist.OneHotCategorical):  # type: ignore[misc]
    """One-hot draws of a categorical distribution, with a relaxed derivative.

    Args:
        logits: ``(*, C)``.
        relaxation: straight_through or gumbel_softmax.
        temperature: Of gumbel_softmax.
    """

    has_rsample = True

    def __init__(
        self, logits: Tensor, *, relaxation: str, temperature: float = 1.0, **options: Any
    ) -> None:
        self.relaxation, self.temperature = relaxation, temperature
        super().__init__(logits=logits, **options)

    def expand(self, batch_shape: Any, _instance: Any = None) -> RelaxedOneHot:
        """The same distribution with a larger batch shape."""
        new = self._get_checked_instance(RelaxedOneHot, _instance)
        new.relaxation, new.temperature = self.relaxation, self.temperature
        expanded: RelaxedOneHot = super().expand(batch_shape, _instance=new)
        return expanded

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass, nats, linear in the value so that its derivative passes."""
        if self._validate_args:
            self._validate_sample(value)
        log_mass: Tensor = (value * self.logits).sum(-1)
        return log_mass

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """One-hot draws."""
        shape = self._extended_shape(sample_shape)
        noisy = self.logits + _gumbel(self.logits, shape)
        hard = torch.zeros_like(noisy).scatter(-1, noisy.argmax(-1, keepdim=True), 1.0)
        soft = (noisy / self.temperature).softmax(-1)
        if self.relaxation == "straight_through":
            soft = self.probs.expand(shape)
        value: Tensor = hard + (soft - soft.detach())
        return value


class RelaxedBernoulli(dist.Bernoulli):  # type: ignore[misc]
    """Draws of zero or one, with a relaxed derivative.

    Args:
        logits: ``(*)``.
        relaxation: straight_through or gumbel_softmax, in its binary form.
        temperature: Of gumbel_softmax.
    """

    has_rsample = True

    def __init__(
        self, logits: Tensor, *, relaxation: str, temperature: float = 1.0, **options: Any
    ) -> None:
        self.relaxation, self.temperature = relaxation, temperature
        super().__init__(logits=logits, **options)

    def expand(self, batch_shape: Any, _instance: Any = None) -> RelaxedBernoulli:
        """The same distribution with a larger batch shape."""
        new = self._get_checked_instance(RelaxedBernoulli, _instance)
        new.relaxation, new.temperature = self.relaxation, self.temperature
        expanded: RelaxedBernoulli = super().expand(batch_shape, _instance=new)
        return expanded

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Zeros and ones."""
        shape = self._extended_shape(sample_shape)
        noisy = self.logits + _gumbel(self.logits, shape) - _gumbel(self.logits, shape)
        hard = (noisy > 0).to(noisy.dtype)
        soft = torch.sigmoid(noisy / self.temperature)
        if self.relaxation == "straight_through":
            soft = self.probs.expand(shape)
        value: Tensor = hard + (soft - soft.detach())
        return value
