"""Weights that change during training: ``step -> weight``, and free bits.

Any callable from the step number to a float is a schedule; these are the usual ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pvae.errors import OptionError

__all__ = ["Constant", "Cyclical", "Linear", "Schedule", "as_schedule", "free_bits"]

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Constant:
    """The same weight at every step."""

    value: float = 1.0

    def __call__(self, step: int) -> float:
        """The weight at ``step``."""
        return self.value


@dataclass(frozen=True)
class Linear:
    """From ``start`` to ``stop`` over ``steps`` optimisation steps, then ``stop``.

    The usual KL warm-up (Sønderby et al. 2016).
    """

    steps: int
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise OptionError(f"Linear takes steps >= 1, got {self.steps}")

    def __call__(self, step: int) -> float:
        """The weight at ``step``."""
        return self.start + (self.stop - self.start) * min(step / self.steps, 1.0)


@dataclass(frozen=True)
class Cyclical:
    """``cycles`` ramps from ``start`` to ``stop`` within ``steps`` steps, then ``stop``.

    Each ramp fills the fraction ``ratio`` of its cycle (Fu et al. 2019).
    """

    steps: int
    cycles: int = 4
    ratio: float = 0.5
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.cycles < 1 or not 0 < self.ratio <= 1:
            raise OptionError(
                "Cyclical takes steps >= 1, cycles >= 1 and 0 < ratio <= 1, got steps="
                f"{self.steps}, cycles={self.cycles}, ratio={self.ratio}"
            )

    def __call__(self, step: int) -> float:
        """The weight at ``step``."""
        if step >= self.steps:
            return self.stop
        phase = (step * self.cycles / self.steps) % 1.0
        return self.start + (self.stop - self.start) * min(phase / self.ratio, 1.0)


def as_schedule(weight: float | Schedule) -> Schedule:
    """A number as a constant schedule; a schedule as it is."""
    return weight if callable(weight) else Constant(float(weight))


def free_bits(kl: Tensor, nats: float) -> Tensor:
    """``max(nats, mean KL)`` of one latent site: ``(K, B) -> ()``, nats per datum.

    Below ``nats`` the site's KL costs nothing more and has no gradient (Kingma et al. 2016).
    """
    return kl.mean().clamp(min=nats)
