"""Mixture of Gaussians by EM on the device of the rows, equal to scikit-learn's from one start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self, Unpack

import torch
from torch import Tensor

from pvae.baselines.density import non_negative
from pvae.baselines.elliptical import Elliptical, half_log_det, traces
from pvae.baselines.em import Parameters, Score, Summarize
from pvae.baselines.mixture import Options
from pvae.errors import OptionError

__all__ = ["GaussianMixture"]

_LOG_TWO_PI = math.log(2 * math.pi)


class GaussianMixture(Elliptical):
    r"""Mixture of Gaussians, by EM from a k-means start: ``sum_k pi_k N(x; m_k, S_k)``.

    The M-step is scikit-learn's: ``S_k`` is the weighted scatter over its rows plus ``reg_covar``
    in the variances, so that from one start both follow the same path. With a covariance prior,
    ``S_k = (scatter_k + s S_0) / (n_k + s) + reg_covar I``, the mode under an inverse-Wishart prior
    whose own mode is ``S_0``, the diagonal of the features' variances (Fraley & Raftery 2007).

    Args:
        n_components: K, or several to choose from by the mean log density of ``valid`` or BIC.
        covariance_type: ``"full"``, ``"tied"`` (one S for all), ``"diag"`` or ``"spherical"``.
        reg_covar: Added to the variances in every M-step. It alone keeps the density of a constant
            feature finite, so compare only densities fitted with the same value.
        covariance_prior: s, how many rows the prior counts; 0 is maximum likelihood.
        **options: Those of every :class:`pvae.baselines.mixture.Mixture`.

    Attributes:
        weights: pi, ``(K,)`` float64.
        means: m, ``(K, D)`` float64.
        covariances: S: ``(K, D, D)``, ``(D, D)``, ``(K, D)`` or ``(K,)`` by ``covariance_type``.

    Raises:
        OptionError: An option out of its range.
    """

    name = "gaussian-mixture"

    def __init__(
        self,
        n_components: int | Sequence[int] = 10,
        *,
        covariance_type: str = "full",
        reg_covar: float = 1e-6,
        covariance_prior: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            n_components, covariance_type=covariance_type, reg_covar=reg_covar, **options
        )
        self.covariance_prior = non_negative("covariance_prior", covariance_prior)

    @classmethod
    def from_parameters(
        cls, weights: Any, means: Any, covariances: Any, *, covariance_type: str = "full"
    ) -> Self:
        """A mixture that is known: to score and sample, or as the ``start`` of another.

        Raises:
            OptionError: The shapes do not fit each other.
        """
        arrays = [torch.as_tensor(a, dtype=torch.float64) for a in (weights, means, covariances)]
        mixture = cls(len(arrays[0]), covariance_type=covariance_type)
        if arrays[1].ndim != 2 or len(arrays[1]) != len(arrays[0]):
            raise OptionError(
                f"means must have shape ({len(arrays[0])}, D), got {tuple(arrays[1].shape)}"
            )
        shape = mixture.covariance_shape(*arrays[1].shape)
        if arrays[2].shape != shape:
            raise OptionError(
                f"{covariance_type} covariances must have shape {shape}, got "
                f"{tuple(arrays[2].shape)}"
            )
        mixture.shift = mixture.scale = torch.zeros_like(arrays[1][0])
        parameters = {"means": arrays[1], "covariances": arrays[2]}
        return mixture._set(arrays[1].shape[1], arrays[0] / arrays[0].sum(), parameters)

    def initial(
        self, x: Tensor, size: int, generator: torch.Generator
    ) -> tuple[Tensor, Parameters]:
        """The moments of the rows around each k-means centre."""
        counts, statistics = self.moments(x, size, generator)
        return counts / counts.sum(), self.maximise(counts, statistics)

    def score(self, parameters: Parameters, dtype: torch.dtype) -> Score:
        """Squared distances by matrix products of all rows with all components."""
        factor = self.factor(parameters)
        distance = self.distance(parameters, factor, dtype)
        width = parameters["means"].shape[1]
        constant = (half_log_det(factor) - 0.5 * width * _LOG_TWO_PI).to(dtype)
        shift = self.shift.to(dtype)

        def score(x: Tensor) -> tuple[Tensor, Summarize]:
            moved = x - shift
            return distance(moved).mul_(-0.5).add_(constant), lambda r: self.statistics(moved, r)

        return score

    def maximise(self, counts: Tensor, statistics: tuple[Tensor, ...]) -> Parameters:
        """Weighted means and scatter, with the prior's rows and the floor."""
        first, second = statistics
        means = first / counts.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
        scatter = self.scatter(first, second, means) + self.covariance_prior * self._prior_mode()
        mass = self._mass(counts).clamp(min=torch.finfo(torch.float64).tiny)
        return {"means": means + self.shift, "covariances": self.over_mass(scatter, mass)}

    def log_prior(self, parameters: Parameters) -> Tensor:
        """``-s/2 (log |S_k| + tr(S_0 S_k^-1))``, summed over covariances, up to a constant."""
        if not self.covariance_prior:
            return super().log_prior(parameters)
        factor = self.factor(parameters)
        log_det, trace = (
            -2 * half_log_det(factor).sum(),
            traces(factor, self._mode_diagonal()).sum(),
        )
        return -0.5 * self.covariance_prior * (log_det + trace)

    def slack(self, before: Parameters, after: Parameters, counts: Tensor) -> float:
        """As without a prior, whose rows count too."""
        return super().slack(before, after, self._mass(counts))

    def draw(self, parameters: Parameters, which: Tensor, generator: torch.Generator) -> Tensor:
        """The component's mean plus noise."""
        return parameters["means"][which] + self.noise(parameters, which, generator)

    def _mass(self, counts: Tensor) -> Tensor:
        """Rows behind each covariance, those of the prior included; ``(1,)`` where it is tied."""
        rows = counts.sum().reshape(1) if self.covariance_type == "tied" else counts
        return rows + self.covariance_prior

    def _mode_diagonal(self) -> Tensor:
        """The variances of ``S_0``."""
        spherical = self.covariance_type == "spherical"
        return self.scale.mean().expand_as(self.scale) if spherical else self.scale

    def _prior_mode(self) -> Tensor:
        """``S_0`` in the shape of a covariance."""
        diagonal = self._mode_diagonal()
        if self.covariance_type == "spherical":
            return diagonal[0]
        return diagonal if self.covariance_type == "diag" else diagonal.diag()
