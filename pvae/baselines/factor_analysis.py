"""Linear-Gaussian latent variables: factor analysis and probabilistic principal components."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal

from pvae.baselines.density import (
    Density,
    as_sizes,
    at_least,
    non_negative,
    watch_convergence,
)
from pvae.errors import DataError, OptionError

__all__ = ["PPCA", "FactorAnalysis"]

_BLOCK_ROWS = 8192


class FactorAnalysis(Density):
    r"""Linear-Gaussian factors with a noise variance per feature: ``N(m, W W' + diag(psi))``.

    ``x = m + W z + e`` with ``z ~ N(0, I_q)`` and ``e ~ N(0, diag(psi))``, by maximum likelihood
    with scikit-learn (Barber 2012, section 21.1).

    Args:
        n_components: q, or several to choose from by the mean log density of ``valid``.
        min_noise: Floor of the noise variances ``psi`` after the fit. It alone keeps the density of
            a constant feature from being a spike, so compare only densities with the same value.
        max_iterations: Most EM steps.
        tolerance: Stop at a smaller gain of the training log-likelihood, nats in total.
        seed: Of the randomised SVD.

    Attributes:
        mean: m, ``(D,)`` float64.
        loadings: W, ``(D, q)`` float64.
        noise_variance: psi, ``(D,)`` float64.

    Raises:
        OptionError: An option out of its range.
    """

    name = "factor-analysis"

    mean: Tensor
    loadings: Tensor
    noise_variance: Tensor

    def __init__(
        self,
        n_components: int | Sequence[int] = 10,
        *,
        min_noise: float = 1e-6,
        max_iterations: int = 1000,
        tolerance: float = 1e-2,
        seed: int = 0,
    ) -> None:
        as_sizes(n_components)
        self.n_components = n_components
        self.min_noise = non_negative("min_noise", min_noise)
        self.max_iterations = at_least("max_iterations", max_iterations, 1)
        self.tolerance = non_negative("tolerance", tolerance)
        self.seed = seed

    @property
    def num_parameters(self) -> int:
        """``D`` means, ``D`` noise variances and ``W`` up to a rotation."""
        width = self._fitted_shape()[1]
        return 2 * width + _loadings(width, self.chosen)

    def _estimate(self, x: Tensor, value: int) -> None:
        from sklearn.decomposition import FactorAnalysis as Factors

        if value > x.shape[1]:
            raise OptionError(
                f"FactorAnalysis(n_components={value}) needs at least {value} features, "
                f"got {x.shape[1]}: lower n_components"
            )
        if self.min_noise == 0:
            _refuse_constant(x)
        factors = Factors(
            value, max_iter=self.max_iterations, tol=self.tolerance, random_state=self.seed
        )
        rows = x.double().cpu().numpy()
        fitted, self.converged = watch_convergence(lambda: factors.fit(rows))
        found = (fitted.mean_, fitted.components_.T.copy(), fitted.noise_variance_)
        self.mean, self.loadings, noise = (torch.from_numpy(array) for array in found)
        self.noise_variance = noise.clamp(min=self.min_noise)

    def _log_density(self, x: Tensor) -> Tensor:
        mean, loadings, noise = (
            each.to(x.device) for each in (self.mean, self.loadings, self.noise_variance)
        )
        normal: Any = LowRankMultivariateNormal(mean, loadings, noise, validate_args=False)
        blocks = torch.split(x, _BLOCK_ROWS)
        return torch.cat([normal.log_prob(rows.double()) for rows in blocks])

    def _draw(self, n: int, seed: int) -> Tensor:
        return _draw_linear(n, seed, self.mean, self.loadings, self.noise_variance)

    def _state(self) -> dict[str, Tensor]:
        return {
            "mean": self.mean,
            "loadings": self.loadings,
            "noise_variance": self.noise_variance,
        }


class PPCA(Density):
    r"""Probabilistic principal components, in closed form: ``N(m, W W' + s2 I)``.

    ``x = m + W z + e`` with ``z ~ N(0, I_q)`` and ``e ~ N(0, s2 I)``. With the eigenvalues
    ``l_1 >= l_2 >= ...`` of the sample covariance (over N, not N - 1) and its eigenvectors U, the
    likelihood is largest where ``s2`` is the mean of the D - q last eigenvalues and
    ``W = U_q (diag(l_1 .. l_q) - s2 I)^(1/2)``.

    Tipping & Bishop (1999). Probabilistic principal component analysis.

    Args:
        n_components: q < D, or several to choose from by the mean log density of ``valid``.

    Attributes:
        mean: m, ``(D,)`` float64.
        noise_variance: s2, a float64 scalar.

    Raises:
        OptionError: An option out of its range.
    """

    name = "ppca"

    mean: Tensor
    noise_variance: Tensor
    _variances: Tensor
    _directions: Tensor

    def __init__(self, n_components: int | Sequence[int] = 10) -> None:
        as_sizes(n_components)
        self.n_components = n_components

    @property
    def num_parameters(self) -> int:
        """``D`` means, one noise variance and ``W`` up to a rotation."""
        width = self._fitted_shape()[1]
        return width + 1 + _loadings(width, self.chosen)

    @property
    def loadings(self) -> Tensor:
        """W, ``(D, q)``."""
        self._fitted_shape()
        scale: Tensor = (self._variances - self.noise_variance).clamp(min=0).sqrt()
        return self._directions * scale

    def _estimate(self, x: Tensor, value: int) -> None:
        if value >= x.shape[1]:
            raise OptionError(
                f"PPCA(n_components={value}) needs more than {value} features, "
                f"got {x.shape[1]}: lower n_components"
            )
        self.mean = x.double().mean(0)
        centred = x.double() - self.mean
        eigenvalues, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
        noise = eigenvalues[:-value].mean()
        if noise <= x.shape[1] * torch.finfo(torch.float64).eps * eigenvalues[-1]:
            raise DataError(
                f"PPCA(n_components={value}) leaves no variance for the noise in {len(x)} rows: "
                f"lower n_components or pass more rows"
            )
        self.noise_variance = noise
        self._variances, self._directions = eigenvalues[-value:], vectors[:, -value:]

    def _log_density(self, x: Tensor) -> Tensor:
        noise, variances = self.noise_variance.to(x.device), self._variances.to(x.device)
        centred = x.double() - self.mean.to(x.device)
        along = (centred @ self._directions.to(x.device)).square()
        across = centred.square().sum(1) - along.sum(1)
        width, size = self._directions.shape
        log_det = variances.log().sum() + (width - size) * noise.log()
        mahalanobis: Tensor = (along / variances).sum(1) + across / noise
        return -0.5 * (mahalanobis + log_det + width * math.log(2 * math.pi))

    def _state(self) -> dict[str, Tensor]:
        names = ("mean", "noise_variance", "_variances", "_directions")
        return {name: getattr(self, name) for name in names}

    def _draw(self, n: int, seed: int) -> Tensor:
        noise = self.noise_variance.cpu().expand(self.mean.shape)
        return _draw_linear(n, seed, self.mean.cpu(), self.loadings.cpu(), noise)


def _loadings(width: int, size: int) -> int:
    """Free entries of a ``(D, q)`` loading matrix up to a rotation of the latents."""
    return width * size - size * (size - 1) // 2


def _draw_linear(n: int, seed: int, mean: Tensor, loadings: Tensor, noise: Tensor) -> Tensor:
    """``m + W z + e``: means ``(D,)``, loadings ``(D, q)``, variances ``(D,)`` to ``(n, D)``."""
    generator = torch.Generator().manual_seed(seed)
    width, size = loadings.shape
    z = torch.randn(n, size, generator=generator, dtype=torch.float64)
    e = torch.randn(n, width, generator=generator, dtype=torch.float64)
    return mean + z @ loadings.T + e * noise.sqrt()


def _refuse_constant(x: Tensor) -> None:
    constant = (x == x[0]).all(0).nonzero().flatten().tolist()
    if constant:
        raise DataError(
            f"FactorAnalysis(min_noise=0) has no density for feature {constant[0]}, which is "
            f"constant: drop it or give min_noise"
        )
