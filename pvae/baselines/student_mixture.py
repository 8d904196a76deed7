"""Mixture of Student t densities by EM: a Gaussian mixture that outliers cannot pull."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pvae.baselines.elliptical import Elliptical, half_log_det
from pvae.baselines.em import Parameters, Score, Summarize
from pvae.baselines.mixture import bisect

__all__ = ["StudentTMixture"]

_DOF = (0.5, 200.0)  # beyond, a t is a Gaussian to the eye, and its dof wanders off


class StudentTMixture(Elliptical):
    r"""Mixture of Student t densities, robust to outliers: ``sum_k pi_k t(x; m_k, S_k, nu_k)``.

    A t is a Gaussian whose precision is Gamma distributed; EM has that precision for a latent
    variable beside the component. With ``u = (nu + D) / (nu + d2(x))`` its mean, the M-step takes
    means and scatters weighted by ``r u`` (the scatter over ``sum r``), and nu in [0.5, 200] where
    ``log(nu/2) - psi(nu/2) + 1 + mean(E[log precision] - u)`` is zero.

    Peel & McLachlan (2000). Robust mixture modelling using the t distribution.

    Args:
        n_components: K, or several to choose from by the mean log density of ``valid`` or BIC.
        covariance_type: ``"full"``, ``"tied"`` (one S for all), ``"diag"`` or ``"spherical"``.
        reg_covar: Added to the diagonal of S in every M-step.
        **options: Those of every :class:`pvae.baselines.mixture.Mixture`.

    Attributes:
        weights: pi, ``(K,)`` float64.
        means: m, ``(K, D)`` float64.
        covariances: S, the scale matrices, shaped as a Gaussian mixture's.
        dof: nu, ``(K,)`` float64.

    Raises:
        OptionError: An option out of its range.
    """

    name = "student-t-mixture"

    dof: Tensor

    @property
    def num_parameters(self) -> int:
        """Those of a Gaussian mixture, and K degrees of freedom."""
        return super().num_parameters + int(self.chosen)

    def initial(
        self, x: Tensor, size: int, generator: torch.Generator
    ) -> tuple[Tensor, Parameters]:
        """The moments of the rows around each k-means centre, with ten degrees of freedom."""
        counts, (first, second) = self.moments(x, size, generator)
        zero = torch.zeros_like(counts)
        return counts / counts.sum(), {
            **self.maximise(counts, (first, second, counts, zero)),
            "dof": torch.full_like(counts, 10.0),
        }

    def score(self, parameters: Parameters, dtype: torch.dtype) -> Score:
        """From squared distances ``d2``, with the precision's two expectations beside them."""
        factor, dof = self.factor(parameters), parameters["dof"]
        distance = self.distance(parameters, factor, dtype)
        width = parameters["means"].shape[1]
        half = (dof + width) / 2
        constant = half.lgamma() - (dof / 2).lgamma() - 0.5 * width * (dof * math.pi).log()
        constant = (constant + half_log_det(factor)).to(dtype)
        nu, exponent, digamma = dof.to(dtype), half.to(dtype), half.digamma().to(dtype)
        shift = self.shift.to(dtype)

        def score(x: Tensor) -> tuple[Tensor, Summarize]:
            moved = x - shift
            squared = distance(moved).clamp_(min=0)
            log_density = constant - exponent * torch.log1p(squared / nu)

            def summarize(responsibilities: Tensor) -> tuple[Tensor, ...]:
                precision = 2 * exponent / (nu + squared)
                weighted = responsibilities * precision
                log_precision = digamma - ((nu + squared) / 2).log()
                tail = (responsibilities * (log_precision - precision)).sum(0)
                return *self.statistics(moved, weighted), weighted.sum(0), tail

            return log_density, summarize

        return score

    def maximise(self, counts: Tensor, statistics: tuple[Tensor, ...]) -> Parameters:
        """Means and scatters of the rows weighted by their precision; the degrees of freedom."""
        first, second, precision, tail = statistics
        tiny = torch.finfo(torch.float64).tiny
        means, mass = first / precision.clamp(min=tiny)[:, None], counts.clamp(min=tiny)
        covariances = self.over_mass(self.scatter(first, second, means), mass)
        level = 1 + tail / mass
        # log(nu/2) - psi(nu/2) + level = 0, whose left side falls in nu
        dof = bisect(lambda nu: (nu / 2).log() - (nu / 2).digamma() + level > 0, mass, _DOF)
        return {"means": means + self.shift, "covariances": covariances, "dof": dof}

    def draw(self, parameters: Parameters, which: Tensor, generator: torch.Generator) -> Tensor:
        """Normal noise over the root of a chi-square per degree of freedom."""
        half = parameters["dof"][which] / 2
        precision = torch._standard_gamma(half, generator=generator) / half
        noise = self.noise(parameters, which, generator)
        return parameters["means"][which] + noise / precision.sqrt()[:, None]
