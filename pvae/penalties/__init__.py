"""Penalties on the latents of a batch: total correlation, moments, discrepancies, free bits.

A penalty is a function of a latent site's draws, posteriors and priors over the batch; its value,
a number of nats per datum, is added to the loss. Where a bound is a sum over data, a penalty looks
at the aggregated posterior ``q(z) = mean_n q(z|x_n)`` and compares data with each other.

Estimates from one batch are biased as their docstrings say.
"""

from __future__ import annotations

from pvae.penalties.correlation import Decomposition, DensityRatio
from pvae.penalties.moments import Discrepancy, FreeDimensions, Moments
from pvae.penalties.protocol import Penalty

__all__ = [
    "Decomposition",
    "DensityRatio",
    "Discrepancy",
    "FreeDimensions",
    "Moments",
    "Penalty",
    "density_ratio",
    "dip",
    "free_dimensions",
    "mmd",
    "total_correlation",
]


def total_correlation(weight: float, estimator: str = "mss") -> Decomposition:
    """``weight`` times the total correlation, from the batch's posteriors (Chen et al. 2018)."""
    return Decomposition(weight, estimator=estimator)


def density_ratio(weight: float) -> DensityRatio:
    """``weight`` times the total correlation, from a discriminator (Kim & Mnih 2018)."""
    return DensityRatio(weight)


def dip(off_diagonal: float = 10.0, diagonal: float = 10.0, kind: str = "ii") -> Moments:
    """The aggregated posterior's covariance held at the identity (Kumar et al. 2018)."""
    return Moments(off_diagonal, diagonal, kind)


def mmd(weight: float = 10.0, kernel: str = "imq", scale: float = 1.0) -> Discrepancy:
    """``weight`` times the MMD between aggregated posterior and prior (Zhao et al. 2019)."""
    return Discrepancy(weight, kernel, scale)


def free_dimensions(nats: float) -> FreeDimensions:
    """Nats below which a latent dimension's KL costs nothing (Kingma et al. 2016)."""
    return FreeDimensions(nats)
