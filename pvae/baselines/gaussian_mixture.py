"""Mixture of Gaussians by EM, with scikit-learn behind it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pvae.baselines import Density, as_sizes, at_least, non_negative, watch_convergence
from pvae.errors import DataError, OptionError, did_you_mean

__all__ = ["GaussianMixture"]

_COVARIANCES = ("full", "tied", "diag", "spherical")


class GaussianMixture(Density):
    r"""``p(x) = sum_k pi_k N(x; m_k, S_k)``, estimated by EM from a k-means start.

    Args:
        n_components: K, or several to choose from by the mean log density of ``valid``.
        covariance_type: ``"full"``, ``"tied"`` (one S for all), ``"diag"`` or ``"spherical"``.
        reg_covar: Added to the variances in every M-step. It alone keeps the density of a constant
            feature finite, so compare only densities fitted with the same value.
        restarts: Number of starts; the best training likelihood is kept.
        max_iterations: Most EM steps of a start.
        tolerance: Stop at a smaller gain of the training log-likelihood, nats per datum.
        seed: Of the starts.

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
        restarts: int = 1,
        max_iterations: int = 100,
        tolerance: float = 1e-3,
        seed: int = 0,
    ) -> None:
        if covariance_type not in _COVARIANCES:
            hint = did_you_mean(covariance_type, _COVARIANCES)
            raise OptionError(f"no covariance_type is called {covariance_type!r}: {hint}")
        as_sizes(n_components)
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.reg_covar = non_negative("reg_covar", reg_covar)
        self.restarts = at_least("restarts", restarts, 1)
        self.max_iterations = at_least("max_iterations", max_iterations, 1)
        self.tolerance = non_negative("tolerance", tolerance)
        self.seed = seed

    @property
    def num_parameters(self) -> int:
        """``K D`` means, ``K - 1`` weights and the covariances' free entries."""
        width = self._fitted_shape()[1]
        size: int = self.chosen
        triangle = width * (width + 1) // 2
        covariances = {
            "full": size * triangle,
            "tied": triangle,
            "diag": size * width,
            "spherical": size,
        }
        return size * width + size - 1 + covariances[self.covariance_type]

    def _estimate(self, x: Tensor, value: int) -> None:
        from sklearn.mixture import GaussianMixture as Mixture

        if len(x) < max(value, 2):
            raise OptionError(
                f"GaussianMixture(n_components={value}) needs at least {max(value, 2)} rows, "
                f"got {len(x)}: lower n_components or pass more rows"
            )
        mixture = Mixture(
            value,
            covariance_type=self.covariance_type,
            reg_covar=self.reg_covar,
            n_init=self.restarts,
            max_iter=self.max_iterations,
            tol=self.tolerance,
            random_state=self.seed,
        )
        rows = x.double().cpu().numpy()
        try:
            self._mixture, self.converged = watch_convergence(lambda: mixture.fit(rows))
        except ValueError:
            raise DataError(self._singular(x, value)) from None

    def _singular(self, x: Tensor, value: int) -> str:
        constant = (x == x[0]).all(0).nonzero().flatten().tolist()
        why = f"feature {constant[0]} is constant" if constant else "too few rows for a component"
        return (
            f"GaussianMixture(n_components={value}, reg_covar={self.reg_covar}) met a singular "
            f"covariance ({why}): raise reg_covar or lower n_components"
        )

    def _log_density(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self._mixture.score_samples(x.double().cpu().numpy()))

    def _draw(self, n: int, seed: int) -> Tensor:
        rows, _ = copy.copy(self._mixture).set_params(random_state=seed).sample(n)
        return torch.from_numpy(np.random.default_rng(seed).permutation(rows))
