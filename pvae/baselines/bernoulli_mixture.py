"""Mixture of products of Bernoullis by EM: the classical density of binary images."""

from __future__ import annotations

import torch
from torch import Tensor

from pvae.baselines.em import Parameters, Score, Summarize
from pvae.baselines.mixture import Smoothed, random_rows
from pvae.errors import DataError

__all__ = ["BernoulliMixture"]

_MIN_MEAN = 1e-3  # means stay in [1e-3, 1 - 1e-3], so that no bit is impossible


class BernoulliMixture(Smoothed):
    r"""Mixture of independent bits: ``sum_k pi_k prod_d mu_kd^x_d (1 - mu_kd)^(1 - x_d)``.

    The log prior is ``sum_kd s (m_d log mu_kd + (1 - m_d) log(1 - mu_kd))``, m the global mean and
    s ``smoothing``. Its M-step adds s pseudo-images of mean m to every component and clamps to
    [1e-3, 1 - 1e-3]; as the expected objective is concave in each mean, that is its exact maximum
    on the interval. Components start at ``.5 x_i + .25`` of random training rows. One component
    is the product of independent bits.

    Args:
        n_components: K, or several to choose from by the mean log density of ``valid`` or BIC.
        smoothing: s, in pseudo-images per component.
        **options: Those of every :class:`pvae.baselines.mixture.Mixture`.

    Attributes:
        weights: pi, ``(K,)`` float64.
        means: mu, ``(K, D)`` float64.

    Raises:
        OptionError: An option out of its range.
    """

    name = "bernoulli-mixture"

    means: Tensor
    _mean: Tensor

    @property
    def num_parameters(self) -> int:
        """``K D`` means and ``K - 1`` weights."""
        width = self._fitted_shape()[1]
        size: int = self.chosen
        return size * (width + 1) - 1

    def _check_support(self, x: Tensor, role: str) -> None:
        bits = (x == 0) | (x == 1)
        if not bits.all():
            row, feature = (~bits).nonzero()[0].tolist()
            value = x[row, feature].item()
            raise DataError(
                f"BernoulliMixture takes 0s and 1s, got {value:g} in row {row}, feature {feature} "
                f"of {role}: binarize the data first"
            )

    def prepare(self, x: Tensor) -> None:
        """Find the global mean."""
        self._mean = x.mean(0, dtype=torch.float64)

    def initial(
        self, x: Tensor, size: int, generator: torch.Generator
    ) -> tuple[Tensor, Parameters]:
        """``.5 x_i + .25`` of random rows, with equal weights."""
        means = 0.5 * random_rows(x, size, generator) + 0.25
        return means.new_full((size,), 1 / size), {"means": means}

    def score(self, parameters: Parameters, dtype: torch.dtype) -> Score:
        """One product with the log odds; the statistics are the expected ones."""
        means = parameters["means"]
        off = torch.log1p(-means)
        slope, bias = (means.log() - off).T.to(dtype), off.sum(1).to(dtype)

        def score(x: Tensor) -> tuple[Tensor, Summarize]:
            return torch.addmm(bias, x, slope), lambda responsibilities: (responsibilities.T @ x,)

        return score

    def maximise(self, counts: Tensor, statistics: tuple[Tensor, ...]) -> Parameters:
        """The share of ones among the expected rows and the pseudo-images."""
        (ones,) = statistics
        means = self.pulled(counts, ones, self._mean)
        return {"means": means.clamp(_MIN_MEAN, 1 - _MIN_MEAN)}

    def log_prior(self, parameters: Parameters) -> Tensor:
        """``sum_kd s (m_d log mu_kd + (1 - m_d) log(1 - mu_kd))``."""
        means, mean = parameters["means"], self._mean
        return self.smoothing * (mean * means.log() + (1 - mean) * torch.log1p(-means)).sum()

    def seeded(self, parameters: Parameters, which: Tensor, rows: Tensor) -> Parameters:
        """``.5 x_i + .25`` of the rows."""
        return {"means": parameters["means"].index_copy(0, which, 0.5 * rows.double() + 0.25)}

    def draw(self, parameters: Parameters, which: Tensor, generator: torch.Generator) -> Tensor:
        """Independent bits."""
        return torch.bernoulli(parameters["means"][which], generator=generator)
