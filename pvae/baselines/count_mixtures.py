"""Mixtures for counts by EM: independent Poisson or negative-binomial features."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from pvae.baselines.em import Parameters, Score, Summarize
from pvae.baselines.mixture import Smoothed, bisect, random_rows, whole_numbers

__all__ = ["NegativeBinomialMixture", "PoissonMixture"]

_MIN_RATE = 1e-8  # so that no count is impossible
_DISPERSION = (1e-3, 1e6)  # at the upper end the counts are Poisson to a millionth


class _CountMixture(Smoothed):
    """What both share: rates near random rows, pulled to the global mean by pseudo-rows."""

    rates: Tensor
    _mean: Tensor

    def _check_support(self, x: Tensor, role: str) -> None:
        whole_numbers(x, role, type(self).__name__)

    def prepare(self, x: Tensor) -> None:
        """Find the global mean."""
        self._mean = x.mean(0, dtype=torch.float64).clamp(min=_MIN_RATE)

    def initial(
        self, x: Tensor, size: int, generator: torch.Generator
    ) -> tuple[Tensor, Parameters]:
        """Random rows mixed half and half with the global mean, with equal weights."""
        rates = 0.5 * random_rows(x, size, generator) + 0.5 * self._mean
        return rates.new_full((size,), 1 / size), self._with_rates(rates)

    def _with_rates(self, rates: Tensor) -> Parameters:
        return {"rates": rates}

    def _rates(self, counts: Tensor, total: Tensor) -> Tensor:
        """Weighted means of the expected rows and the pseudo-rows: ``(K, D)``."""
        return self.pulled(counts, total, self._mean).clamp(min=_MIN_RATE)

    def seeded(self, parameters: Parameters, which: Tensor, rows: Tensor) -> Parameters:
        """As at the start, at the rows."""
        near = self._with_rates(0.5 * rows.double() + 0.5 * self._mean)
        return {name: parameters[name].index_copy(0, which, near[name]) for name in parameters}

    def log_prior(self, parameters: Parameters) -> Tensor:
        """The log density of the pseudo-rows, up to a constant."""
        return self.smoothing * self._pseudo_log_density(parameters).sum()

    @abstractmethod
    def _pseudo_log_density(self, parameters: Parameters) -> Tensor:
        """Of the global mean in place of a count, without ``log x!``: ``(K,)``."""


class PoissonMixture(_CountMixture):
    r"""Mixture of independent Poisson counts: ``sum_k pi_k prod_d Poisson(x_d; rate_kd)``.

    The M-step adds s pseudo-rows at the global mean m to every component: the log prior is
    ``s sum_kd (m_d log rate_kd - rate_kd)``, which a Gamma density is.

    Args:
        n_components: K, or several to choose from by the mean log density of ``valid`` or BIC.
        smoothing: s, in pseudo-rows per component.
        **options: Those of every :class:`pvae.baselines.mixture.Mixture`.

    Attributes:
        weights: pi, ``(K,)`` float64.
        rates: ``(K, D)`` float64.

    Raises:
        OptionError: An option out of its range.
    """

    name = "poisson-mixture"

    @property
    def num_parameters(self) -> int:
        """``K D`` rates and ``K - 1`` weights."""
        width = self._fitted_shape()[1]
        size: int = self.chosen
        return size * (width + 1) - 1

    def score(self, parameters: Parameters, dtype: torch.dtype) -> Score:
        """One product with the log rates; the statistics are the expected totals."""
        rates = parameters["rates"]
        slope, bias = rates.log().T.to(dtype), -rates.sum(1).to(dtype)

        def score(x: Tensor) -> tuple[Tensor, Summarize]:
            base = torch.lgamma(x + 1).sum(1, keepdim=True)
            log_density = torch.addmm(bias, x, slope).sub_(base)
            return log_density, lambda responsibilities: (responsibilities.T @ x,)

        return score

    def maximise(self, counts: Tensor, statistics: tuple[Tensor, ...]) -> Parameters:
        """The mean of the expected rows and the pseudo-rows."""
        return {"rates": self._rates(counts, statistics[0])}

    def _pseudo_log_density(self, parameters: Parameters) -> Tensor:
        rates = parameters["rates"]
        return (self._mean * rates.log() - rates).sum(1)

    def draw(self, parameters: Parameters, which: Tensor, generator: torch.Generator) -> Tensor:
        """Independent counts."""
        return torch.poisson(parameters["rates"][which], generator=generator)


class NegativeBinomialMixture(_CountMixture):
    r"""Mixture of independent overdispersed counts, negative binomial with mean and dispersion.

    ``p(x | k) = prod_d G(x+r)/(G(r) x!) (r/(r+m))^r (m/(r+m))^x`` with mean ``m_kd`` and variance
    ``m + m^2/r``. The mean of the M-step is the weighted mean of the rows, whatever r is; r
    maximises Minka's lower bound of the expected log density, ``a log r + n r log(r/(r+m))`` with
    ``a = r_old sum_n g_n (psi(x_n + r_old) - psi(r_old))``, which touches it at the old r: so the
    objective cannot fall. s pseudo-rows at the global mean are added to every component.

    Minka (2000), Estimating a Dirichlet distribution, for the bound.

    Args:
        n_components: K, or several to choose from by the mean log density of ``valid`` or BIC.
        smoothing: s, in pseudo-rows per component.
        **options: Those of every :class:`pvae.baselines.mixture.Mixture`.

    Attributes:
        weights: pi, ``(K,)`` float64.
        rates: m, ``(K, D)`` float64.
        dispersion: r in [1e-3, 1e6], ``(K, D)`` float64.

    Raises:
        OptionError: An option out of its range.
    """

    name = "negative-binomial-mixture"

    dispersion: Tensor

    @property
    def num_parameters(self) -> int:
        """``K D`` means, ``K D`` dispersions and ``K - 1`` weights."""
        width = self._fitted_shape()[1]
        size: int = self.chosen
        return size * (2 * width + 1) - 1

    def _with_rates(self, rates: Tensor) -> Parameters:
        return {"rates": rates, "dispersion": torch.ones_like(rates)}

    def score(self, parameters: Parameters, dtype: torch.dtype) -> Score:
        """Two products, and one log-gamma function per row, component and feature."""
        rates, r = parameters["rates"], parameters["dispersion"]
        slope = (rates.log() - (rates + r).log()).T.to(dtype)
        bias = (r * (r.log() - (rates + r).log()) - torch.lgamma(r)).sum(1).to(dtype)
        dispersion = r.to(dtype)

        def score(x: Tensor) -> tuple[Tensor, Summarize]:
            base = torch.lgamma(x + 1).sum(1, keepdim=True)
            rising = torch.lgamma(x[:, None] + dispersion).sum(2)
            log_density = torch.addmm(bias, x, slope).sub_(base).add_(rising)

            def summarize(responsibilities: Tensor) -> tuple[Tensor, ...]:
                growth = torch.digamma(x[:, None] + dispersion) - torch.digamma(dispersion)
                weighted = torch.einsum("bk,bkd->kd", responsibilities, growth * dispersion)
                pseudo = r * (torch.digamma(self._mean + r) - torch.digamma(r))
                share = len(x) / self._num_data
                return responsibilities.T @ x, weighted, share * self.smoothing * pseudo.to(x)

            return log_density, summarize

        return score

    def prepare(self, x: Tensor) -> None:
        """Find the global mean and the number of rows."""
        super().prepare(x)
        self._num_data = len(x)

    def maximise(self, counts: Tensor, statistics: tuple[Tensor, ...]) -> Parameters:
        """The weighted mean, and the dispersion where the bound is largest."""
        total, growth, pseudo = statistics
        rates = self._rates(counts, total)
        level = (growth + pseudo) / self.mass(counts)[:, None]
        # r log(1 + m/r) = level, whose left side rises in r from 0 to m
        r = bisect(lambda r: r * torch.log1p(rates / r) < level, rates, _DISPERSION)
        return {"rates": rates, "dispersion": r}

    def _pseudo_log_density(self, parameters: Parameters) -> Tensor:
        m, r = parameters["rates"], parameters["dispersion"]
        rising = torch.lgamma(self._mean + r) - torch.lgamma(r)
        both = r * (r.log() - (m + r).log()) + self._mean * (m.log() - (m + r).log())
        return (rising + both).sum(1)

    def cancelling(self, parameters: Parameters) -> float:
        """Without bound: log-gamma functions of large dispersions need double precision."""
        return math.inf

    def block_width(self, size: int, width: int) -> int:
        """A log-gamma function for every component and feature."""
        return size * width

    def draw(self, parameters: Parameters, which: Tensor, generator: torch.Generator) -> Tensor:
        """Poisson counts with Gamma rates."""
        m, r = parameters["rates"][which], parameters["dispersion"][which]
        rates = torch._standard_gamma(r, generator=generator) * m / r
        return torch.poisson(rates, generator=generator)
