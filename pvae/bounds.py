"""Bounds on the log evidence: ``(K, B)`` log importance weights to ``(B,)`` nats per datum.

All of them are members of one family, the Rényi bounds (Li & Turner 2016)::

    L_alpha = log( mean_k w_k^(1 - alpha) ) / (1 - alpha)

with the ELBO at ``alpha = 1``, the importance-weighted ELBO at ``alpha = 0``, and upper bounds
(CUBO) at ``alpha < 0``. Any other callable ``(K, B) -> (B,)`` will do as a bound as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.errors import OptionError
from pvae.log_weights import log_mean_exp

__all__ = ["RenyiBound", "cubo", "elbo", "iw_elbo", "renyi"]


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
