"""Mixture of factor analysers by EM: a low-rank Gaussian for each part of the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from pvae.baselines.density import at_least
from pvae.baselines.elliptical import Location, diagonal_distance
from pvae.baselines.em import Parameters, Score, Summarize
from pvae.baselines.mixture import Options
from pvae.errors import OptionError

__all__ = ["MixtureOfFactorAnalyzers"]

_LOG_TWO_PI = math.log(2 * math.pi)
_START_ROWS = 2000  # of a component, for its principal directions
_RIDGE = 1e-12  # keeps the regression solvable for a component without rows


class MixtureOfFactorAnalyzers(Location):
    r"""Mixture of low-rank Gaussians: ``sum_k pi_k N(x; m_k, W_k W_k' + diag(psi_k))``.

    Each component is factor analysis, ``x = m_k + W_k z + e`` with ``z ~ N(0, I_q)``, so its cost
    is that of q directions where a full covariance has D: it fits images. EM has z for a latent
    variable beside the component (Ghahramani & Hinton 1996); means and loadings are updated
    together, then the noise, down to its floor, which is the exact constrained maximum. It starts
    from k-means, each component at its rows' principal directions.

    Args:
        n_components: K, or several to choose from by the mean log density of ``valid`` or BIC.
        num_factors: q.
        min_noise: Floor of the noise variances psi. It alone keeps the density of a constant
            feature finite, so compare only densities fitted with the same value.
        **options: Those of every :class:`pvae.baselines.mixture.Mixture`.

    Attributes:
        weights: pi, ``(K,)`` float64.
        means: m, ``(K, D)`` float64.
        loadings: W, ``(K, D, q)`` float64.
        noise: psi, ``(K, D)`` float64.

    Raises:
        OptionError: An option out of its range.
    """

    name = "mixture-of-factor-analysers"

    means: Tensor
    loadings: Tensor
    noise: Tensor

    def __init__(
        self,
        n_components: int | Sequence[int] = 10,
        *,
        num_factors: int = 5,
        min_noise: float = 1e-6,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(n_components, **options)
        self.num_factors = at_least("num_factors", num_factors, 1)
        if not 0 < min_noise < math.inf:
            raise OptionError(f"min_noise must be finite and positive, got {min_noise!r}")
        self.min_noise = min_noise

    @property
    def num_parameters(self) -> int:
        """Per component: D means, D noise variances, W up to a rotation; and ``K - 1`` weights."""
        width, q = self._fitted_shape()[1], self.num_factors
        size: int = self.chosen
        return size * (2 * width + width * q - q * (q - 1) // 2) + size - 1

    def prepare(self, x: Tensor) -> None:
        """Check that there are more features than factors."""
        super().prepare(x)
        if self.num_factors >= x.shape[1]:
            raise OptionError(
                f"MixtureOfFactorAnalyzers(num_factors={self.num_factors}) needs more than "
                f"{self.num_factors} features, got {x.shape[1]}: lower num_factors"
            )

    def initial(
        self, x: Tensor, size: int, generator: torch.Generator
    ) -> tuple[Tensor, Parameters]:
        """The rows' mean and leading principal directions around each k-means centre."""
        label, q = self.labels(x, size, generator), self.num_factors
        noise = torch.randn(size, x.shape[1], q, generator=generator, dtype=torch.float64)
        # Not zero: a column of zeros is a saddle that EM never leaves.
        loadings = 0.1 * self.scale.sqrt()[:, None] * noise.to(self.shift.device)
        means, noises = [], []
        for k in range(size):
            rows = x[label == k][:_START_ROWS].double() - self.shift
            means.append(rows.mean(0) if len(rows) else torch.zeros_like(self.shift))
            rows = rows - means[k]
            _, values, directions = torch.linalg.svd(rows, full_matrices=False)
            found = min(q, len(values))
            root = max(1, len(rows)) ** 0.5
            loadings[k, :, :found] = directions[:found].T * (values[:found] / root)
            left = (rows / root).square().sum(0) - loadings[k].square().sum(1)
            noises.append(torch.maximum(left, 0.05 * self.scale).clamp(min=self.min_noise))
        counts = torch.bincount(label, minlength=size).double()
        parameters = {"means": torch.stack(means) + self.shift, "loadings": loadings}
        return counts / counts.sum(), parameters | {"noise": torch.stack(noises)}

    def score(self, parameters: Parameters, dtype: torch.dtype) -> Score:
        """Woodbury's identity: distances in the D features minus those in the q factors."""
        means = self._shifted(parameters["means"])
        loadings, noise = parameters["loadings"], parameters["noise"]
        size, width, q = loadings.shape
        precise = (loadings / noise[:, :, None]).mT  # (K, q, D)
        root = torch.linalg.cholesky(torch.eye(q).to(loadings) + precise @ loadings)
        whiten = torch.linalg.solve_triangular(root, precise, upper=False)
        eye = torch.eye(q).to(root).expand_as(root)
        inverse = torch.linalg.solve_triangular(root, eye, upper=False)
        log_det = noise.log().sum(1) + 2 * root.diagonal(dim1=1, dim2=2).log().sum(1)
        constant = (-0.5 * (log_det + width * _LOG_TWO_PI)).to(dtype)
        distance = diagonal_distance(means.to(dtype), noise.rsqrt().to(dtype))
        centres = (whiten @ means[:, :, None]).flatten().to(dtype)
        side_by_side = whiten.reshape(size * q, width).T.to(dtype)
        shift = self.shift.to(dtype)
        upward, covariance = inverse.to(dtype), (inverse.mT @ inverse).to(dtype)

        def score(x: Tensor) -> tuple[Tensor, Summarize]:
            moved = x - shift
            white = torch.addmm(-centres, moved, side_by_side).reshape(-1, size, q)
            log_density = distance(moved).sub_(white.square().sum(2)).mul_(-0.5).add_(constant)

            def summarize(responsibilities: Tensor) -> tuple[Tensor, ...]:
                z = torch.einsum("bkq,kqp->bkp", white, upward)  # E[z | x, k]
                z = torch.cat([z, torch.ones_like(z[:, :, :1])], 2)
                weighted = responsibilities[:, :, None] * z
                second = torch.einsum("bki,bkj->kij", weighted, z)
                second[:, :q, :q] += responsibilities.sum(0)[:, None, None] * covariance
                products = (weighted.flatten(1).T @ moved).reshape(size, q + 1, width)
                return second, products, responsibilities.T @ moved.square()

            return log_density, summarize

        return score

    def maximise(self, counts: Tensor, statistics: tuple[Tensor, ...]) -> Parameters:
        """A regression of x on ``(z, 1)``, then the variance that it leaves."""
        second, products, squares = statistics
        floor = _RIDGE * torch.eye(second.shape[1]).to(second)
        coefficients = torch.linalg.solve(second + floor, products)  # (K, q + 1, D)
        left = squares - (coefficients * products).sum(1)
        noise = left / counts.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
        return {
            "means": coefficients[:, -1] + self.shift,
            "loadings": coefficients[:, :-1].mT.contiguous(),
            "noise": noise.clamp(min=self.min_noise),
        }

    def seeded(self, parameters: Parameters, which: Tensor, rows: Tensor) -> Parameters:
        """Means at the rows, loadings and noise of the components in turn."""
        others = torch.arange(len(which), device=which.device) % len(parameters["means"])
        noise = parameters["noise"].mean(0, keepdim=True).expand(len(which), -1)
        return {
            "means": parameters["means"].index_copy(0, which, rows.double()),
            "loadings": parameters["loadings"].index_copy(0, which, parameters["loadings"][others]),
            "noise": parameters["noise"].index_copy(0, which, noise),
        }

    def cancelling(self, parameters: Parameters) -> float:
        """Of each component's ``(m_k - shift)_d^2 / psi_kd``, the largest."""
        means = self._shifted(parameters["means"])
        return float((means.square() / parameters["noise"]).norm(dim=1).max())

    def block_width(self, size: int, width: int) -> int:
        """All components' factors, or the row and its square."""
        return max(size * (self.num_factors + 1), 2 * width)

    def draw(self, parameters: Parameters, which: Tensor, generator: torch.Generator) -> Tensor:
        """``m_k + W_k z + e``."""
        means, loadings = parameters["means"][which], parameters["loadings"][which]
        z = torch.randn(len(which), loadings.shape[2], 1, generator=generator, dtype=torch.float64)
        e = torch.randn(means.shape, generator=generator, dtype=torch.float64)
        return means + (loadings @ z).squeeze(2) + e * parameters["noise"][which].sqrt()
