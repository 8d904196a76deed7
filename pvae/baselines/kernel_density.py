"""A Gaussian kernel on every training row, with scikit-learn behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pvae.baselines.density import Density
from pvae.errors import DataError, OptionError

__all__ = ["KernelDensity"]

_NUM_BANDWIDTHS = 15


class KernelDensity(Density):
    r"""A Gaussian kernel on every training row: ``p(x) = 1/N sum_i N(x; x_i, h^2 I)``.

    Args:
        bandwidth: h in the data's units, or several to choose from by the mean log density of
            ``valid``; ``"valid"`` chooses among 15, evenly spaced in log h from 0.01 to 3 times the
            root mean variance of the features.

    Attributes:
        rows: The training rows, ``(N, D)`` float64.

    Raises:
        OptionError: An option out of its range.
    """

    name = "kernel-density"
    option = "bandwidth"

    rows: Tensor

    def __init__(self, bandwidth: float | str | Sequence[float] = "valid") -> None:
        self.bandwidth = bandwidth
        if bandwidth != "valid":
            self._given()

    @property
    def num_parameters(self) -> int:
        """``N D + 1``: as a mixture of N Gaussians, its means and one bandwidth."""
        rows, width = self._fitted_shape()
        return rows * width + 1

    def _given(self) -> tuple[float, ...]:
        given = self.bandwidth
        several = given if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
        try:
            values = tuple(float(value) for value in several)
        except (TypeError, ValueError):
            values = ()
        if not values or not all(0 < value < math.inf for value in values):
            raise OptionError(
                f"bandwidth must be a positive number, several, or 'valid', got {given!r}"
            )
        return values

    def _candidates(self, x: Tensor) -> Sequence[float]:
        if self.bandwidth != "valid":
            return self._given()
        scale = float(x.double().var(0, correction=0).mean().sqrt())
        if scale == 0:
            raise DataError(
                f"KernelDensity finds no spread in {len(x)} equal rows to set a bandwidth by: "
                f"give bandwidth a number"
            )
        grid = torch.logspace(-2, math.log10(3), _NUM_BANDWIDTHS, dtype=torch.float64)
        return [float(value) for value in scale * grid]

    def _estimate(self, x: Tensor, value: float) -> None:
        from sklearn.neighbors import KernelDensity as Kernels

        # One leaf sums over all rows. With the default leaf_size the tree's running bounds cancel
        # in high dimension: scikit-learn's log densities are then wrong by 10 to 5000 nats.
        kernels = Kernels(bandwidth=value, kernel="gaussian", leaf_size=len(x))
        self.rows = x.double().cpu()
        self._kernels = kernels.fit(self.rows.numpy())

    def _log_density(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self._kernels.score_samples(x.double().cpu().numpy()))

    def _draw(self, n: int, seed: int) -> Tensor:
        return torch.from_numpy(self._kernels.sample(n, random_state=seed))

    def _state(self) -> dict[str, Tensor]:
        return {"rows": self.rows}

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        self._estimate(state["rows"], self.chosen)
