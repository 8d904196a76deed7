"""Bounds on the log evidence: ``(K, B)`` log importance weights to ``(B,)`` nats per datum.

Most are members of one family, the Rényi bounds (Li & Turner 2016)::

    L_alpha = log( mean_k w_k^(1 - alpha) ) / (1 - alpha)

with the ELBO at ``alpha = 1``, the importance-weighted ELBO at ``alpha = 0``, and upper bounds
(CUBO) at ``alpha < 0``. MIWAE and CIWAE lie between the ELBO and the IW-ELBO; the thermodynamic
bounds integrate along a path from q to p. Any other callable ``(K, B) -> (B,)`` will do as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pvae.errors import ObjectiveError, OptionError
from pvae.log_weights import log_mean_exp

__all__ = [
    "CombinedBound",
    "GroupedBound",
    "RenyiBound",
    "SmoothBound",
    "ThermodynamicBound",
    "ciwae",
    "cubo",
    "elbo",
    "iw_elbo",
    "miwae",
    "renyi",
    "tvo",
]


@runtime_checkable
class SmoothBound(Protocol):
    """A bound ``L`` of known derivative, which some gradient estimators are written in."""

    def __call__(self, log_weights: Tensor) -> Tensor:
        """``L`` of each datum: ``(K, B) -> (B,)``."""

    def weights(self, log_weights: Tensor) -> Tensor:
        """``v_k = dL/dlog w_k``: ``(K, B) -> (K, B)``."""

    def elasticity(self, log_weights: Tensor) -> Tensor:
        """``dlog v_k/dlog w_k``: ``(K, B) -> (K, B)``."""


def check_bound(bound: Callable[[Tensor], Tensor], num_particles: int) -> None:
    """Refuse what cannot be raised, or not with so many particles.

    Raises:
        ObjectiveError: The bound is an upper one, does not fit K, or gives no number per datum.
    """
    if getattr(bound, "is_upper", False):
        raise ObjectiveError(
            f"{bound!r} is an upper bound, and raising it does not raise the evidence: "
            "train with elbo, iw_elbo or renyi(alpha >= 0) and evaluate it afterwards"
        )
    check: Any = getattr(bound, "check", None)
    if check is not None:
        check(num_particles)
    try:
        shape = tuple(bound(torch.zeros(num_particles, 2)).shape)
    except Exception:  # whatever it is, it is no function of log weights
        shape = ()
    if shape != (2,):
        raise ObjectiveError(
            f"bound maps log weights (K, B) to (B,) nats, which {bound!r} does not: use elbo, "
            "iw_elbo or renyi(alpha) of pvae.bounds, with its arguments where it takes any"
        )


@dataclass(frozen=True)
class RenyiBound:
    r"""``L_alpha = log( (1/K) sum_k w_k^(1 - alpha) ) / (1 - alpha)``, the mean of log w at 1.

    Calling it maps log weights ``(K, B)`` to ``(B,)`` nats per datum.
    """

    alpha: float

    def __call__(self, log_weights: Tensor) -> Tensor:
        """The bound of each datum: ``(K, B) -> (B,)``."""
        if self.alpha == 1:
            return log_weights.mean(0)
        return log_mean_exp((1 - self.alpha) * log_weights) / (1 - self.alpha)

    def weights(self, log_weights: Tensor) -> Tensor:
        r"""``dL/dlog w``, which sums to one over particles: ``(K, B) -> (K, B)``."""
        return torch.softmax((1 - self.alpha) * log_weights, 0)

    def elasticity(self, log_weights: Tensor) -> Tensor:
        r"""``dlog v_k/dlog w_k = (1 - alpha)(1 - v_k)``: ``(K, B) -> (K, B)``."""
        return (1 - self.alpha) * (1 - self.weights(log_weights))

    @property
    def additive(self) -> bool:
        """Whether the bound is linear in log w: only the ELBO is."""
        return self.alpha == 1

    @property
    def is_upper(self) -> bool:
        """Whether the bound lies above the log evidence (in expectation, for large K)."""
        return self.alpha < 0

    def __repr__(self) -> str:
        names = {1.0: "elbo", 0.0: "iw_elbo"}
        return names.get(self.alpha, f"renyi({self.alpha:g})")


elbo = RenyiBound(1.0)
"""The evidence lower bound ``mean_k log w_k`` (Kingma & Welling 2014): ``(K, B) -> (B,)``."""

iw_elbo = RenyiBound(0.0)
"""The importance-weighted ELBO ``log mean_k w_k`` (Burda et al. 2016): ``(K, B) -> (B,)``."""


def renyi(alpha: float) -> RenyiBound:
    """The Rényi bound of order ``alpha`` (Li & Turner 2016); 1 is the ELBO, 0 the IW-ELBO.

    Raises:
        OptionError: ``alpha`` is not a finite number.
    """
    if not math.isfinite(alpha):
        raise OptionError(f"renyi takes a finite order, got alpha={alpha}: try 0.5")
    return RenyiBound(float(alpha))


def cubo(n: float) -> RenyiBound:
    """The chi upper bound ``log( mean_k w_k^n ) / n`` (Dieng et al. 2017), ``n > 1``.

    Raises:
        OptionError: ``n`` is not larger than one.
    """
    if not 1 < n < math.inf:
        raise OptionError(f"cubo is an upper bound for finite n > 1 only, got n={n}: give 2, say")
    return RenyiBound(1.0 - n)


@dataclass(frozen=True)
class GroupedBound:
    r"""The mean of a bound over M groups of K/M particles each: ``(K, B) -> (B,)``.

    With the IW-ELBO inside it is MIWAE (Rainforth et al. 2018), and by Jensen
    ``ELBO <= MIWAE <= IW-ELBO`` for the same K draws.
    """

    groups: int
    inner: RenyiBound = iw_elbo

    def check(self, num_particles: int) -> None:
        """Groups of equal size."""
        if num_particles % self.groups:
            raise ObjectiveError(
                f"{self!r} needs num_particles in {self.groups} groups of equal size, got "
                f"{num_particles}: use {self.groups * -(-num_particles // self.groups)}"
            )

    def __call__(self, log_weights: Tensor) -> Tensor:
        """The bound of each datum: ``(K, B) -> (B,)``."""
        return self.inner(self._columns(log_weights)).reshape(self.groups, -1).mean(0)

    def weights(self, log_weights: Tensor) -> Tensor:
        """``dL/dlog w``, which sums to one over particles: ``(K, B) -> (K, B)``."""
        return self._rows(self.inner.weights(self._columns(log_weights))) / self.groups

    def elasticity(self, log_weights: Tensor) -> Tensor:
        """``dlog v_k/dlog w_k``, that of the particle's own group: ``(K, B) -> (K, B)``."""
        return self._rows(self.inner.elasticity(self._columns(log_weights)))

    def _columns(self, log_weights: Tensor) -> Tensor:
        """``(K, B)`` as ``(K/M, M B)``: each group a datum of its own."""
        return log_weights.reshape(len(log_weights) // self.groups, -1)

    def _rows(self, columns: Tensor) -> Tensor:
        return columns.reshape(len(columns) * self.groups, -1)

    def __repr__(self) -> str:
        return f"miwae({self.groups})"


def miwae(groups: int) -> GroupedBound:
    """The mean over ``groups`` of the IW-ELBO of each (MIWAE, Rainforth et al. 2018).

    Raises:
        OptionError: it is no whole number of at least one.
    """
    if groups < 1 or groups != int(groups):
        raise OptionError(f"miwae takes a number of groups, 1 or more, got {groups}: give 5, say")
    return GroupedBound(int(groups))


@dataclass(frozen=True)
class CombinedBound:
    r"""``weight * ELBO + (1 - weight) * IW-ELBO`` of the same particles: ``(K, B) -> (B,)``.

    CIWAE, Rainforth et al. (2018).
    """

    weight: float

    def __call__(self, log_weights: Tensor) -> Tensor:
        """The bound of each datum: ``(K, B) -> (B,)``."""
        return self.weight * elbo(log_weights) + (1 - self.weight) * iw_elbo(log_weights)

    def weights(self, log_weights: Tensor) -> Tensor:
        """``dL/dlog w``, which sums to one over particles: ``(K, B) -> (K, B)``."""
        return self.weight / len(log_weights) + (1 - self.weight) * iw_elbo.weights(log_weights)

    def elasticity(self, log_weights: Tensor) -> Tensor:
        """``dlog v_k/dlog w_k``: ``(K, B) -> (K, B)``."""
        normalised = iw_elbo.weights(log_weights)
        slope = (1 - self.weight) * normalised * (1 - normalised)
        return slope / self.weights(log_weights)

    def __repr__(self) -> str:
        return f"ciwae({self.weight:g})"


def ciwae(weight: float) -> CombinedBound:
    """``weight`` times the ELBO, the rest the IW-ELBO (CIWAE, Rainforth et al. 2018).

    Raises:
        OptionError: ``weight`` is not between 0 (IW-ELBO) and 1 (ELBO), both left out.
    """
    if not 0 < weight < 1:
        raise OptionError(
            f"ciwae mixes elbo and iw_elbo for 0 < weight < 1, got {weight}: give 0.5, or take "
            "one of the two"
        )
    return CombinedBound(float(weight))


@dataclass(frozen=True)
class ThermodynamicBound:
    r"""The thermodynamic variational objective: ``(K, B) -> (B,)``, nats per datum.

    ``log p(x)`` is the integral over b from 0 to 1 of ``E[log w]`` under ``pi_b``, proportional to
    ``q w^b``, which rises with b. The left Riemann sum over ``0 = b_0 < ... < b_L = 1`` is a lower
    bound and the right one an upper bound; ``b_1 = start`` and the rest lies log-uniformly. Each
    expectation is estimated with the same K particles and weights ``softmax(b log w)``, biased by
    O(1/K). One interval makes the ELBO. Masrani, Le & Wood (2019).

    Attributes:
        partitions: L.
        start: ``b_1``, where L > 1.
        is_upper: Whether it is the right sum, the upper bound.
    """

    partitions: int
    start: float
    is_upper: bool = False

    def check(self, num_particles: int) -> None:
        """One particle has the weight one at every b."""
        if num_particles < 2 <= self.partitions:
            raise ObjectiveError(
                f"{self!r} moves from q to p by the weights of several particles, got "
                f"num_particles={num_particles}: use at least 2, or bound=elbo"
            )

    @property
    def points(self) -> tuple[tuple[float, float], ...]:
        """Exponent and width of each interval."""
        last = self.partitions - 1
        ends = [0.0, *(self.start ** ((last - i) / last) for i in range(last)), 1.0]
        widths = [right - left for left, right in zip(ends[:-1], ends[1:], strict=True)]
        exponents = ends[1:] if self.is_upper else ends[:-1]
        return tuple(zip(exponents, widths, strict=True))

    def __call__(self, log_weights: Tensor) -> Tensor:
        """The bound of each datum: ``(K, B) -> (B,)``."""
        value = torch.zeros_like(log_weights[0])
        for exponent, width in self.points:
            weights = torch.softmax(exponent * log_weights, 0)
            value = value + width * (weights * log_weights).sum(0)
        return value

    def __repr__(self) -> str:
        upper = ", upper=True" if self.is_upper else ""
        return f"tvo({self.partitions}, {self.start:g}{upper})"


def tvo(partitions: int = 5, start: float = 0.025, *, upper: bool = False) -> ThermodynamicBound:
    """The thermodynamic bound with ``partitions`` intervals, lower or upper (Masrani et al. 2019).

    Raises:
        OptionError: there is not one interval, or ``start`` is not between 0 and 1.
    """
    if partitions < 1 or not 0 < start < 1:
        raise OptionError(
            "tvo takes partitions >= 1 and 0 < start < 1, got "
            f"partitions={partitions}, start={start}: give 5 and 0.025, say"
        )
    return ThermodynamicBound(int(partitions), float(start), upper)
