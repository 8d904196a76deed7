"""What mixtures of means with covariances share: near-zero rows, distances, moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, Unpack

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pvae.baselines.density import non_negative
from pvae.baselines.em import Parameters
from pvae.baselines.kmeans import assign, kmeans
from pvae.baselines.mixture import Mixture, Options
from pvae.errors import DataError, OptionError, did_you_mean

__all__ = ["Elliptical", "Location", "diagonal_distance"]

Distance: TypeAlias = Callable[[Tensor], Tensor]

_COVARIANCES = ("full", "tied", "diag", "spherical")
_BLOCK_ROWS = 4096
_START_ROWS = 20_000  # a start needs no more of them to find its centres


class Location(Mixture):
    """A mixture whose components are a mean plus noise: rows are moved near zero for its products.

    The shift is the median of a thousand rows, in the rows' own dtype, so that subtracting it is
    exact and a feature that hardly varies ends at zero; parameters do not know of it.
    """

    shift: Tensor
    scale: Tensor

    def prepare(self, x: Tensor) -> None:
        """Find the shift, and each feature's variance over the rows."""
        self.shift = x[:: max(1, len(x) // 1000)].median(0).values.double()
        total, square = torch.zeros_like(self.shift), torch.zeros_like(self.shift)
        for block in torch.split(x, _BLOCK_ROWS):
            rows = block.double() - self.shift
            total, square = total + rows.sum(0), square + rows.square().sum(0)
        self.scale = (square / len(x) - (total / len(x)).square()).clamp(min=0)

    def labels(self, x: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """The k-means component of each row, ``(N,)``; centres come from at most 20,000 rows."""
        index = torch.randperm(len(x), generator=generator)[: max(_START_ROWS, 20 * size)]
        centres = kmeans(x[index.sort().values.to(x.device)], size, generator)
        return assign(x, centres)[1]

    def _shifted(self, means: Tensor) -> Tensor:
        return means - self.shift

    def _state(self) -> dict[str, Tensor]:
        return {**super()._state(), "shift": self.shift, "scale": self.scale}

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        self.shift, self.scale = state["shift"], state["scale"]
        super()._restore({k: v for k, v in state.items() if k not in ("shift", "scale")})


class Elliptical(Location):
    """Components with a mean and a covariance of one of four types.

    Args:
        n_components: K, or several.
        covariance_type: ``"full"``, ``"tied"`` (one S for all), ``"diag"`` or ``"spherical"``.
        reg_covar: Added to the variances in every M-step.
        **options: Those of every mixture.

    Raises:
        OptionError: An option out of its range.
    """

    means: Tensor
    covariances: Tensor

    def __init__(
        self,
        n_components: int | Sequence[int] = 10,
        *,
        covariance_type: str = "full",
        reg_covar: float = 1e-6,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(n_components, **options)
        if covariance_type not in _COVARIANCES:
            hint = did_you_mean(covariance_type, _COVARIANCES)
            raise OptionError(f"no covariance_type is called {covariance_type!r}: {hint}")
        self.covariance_type = covariance_type
        self.reg_covar = non_negative("reg_covar", reg_covar)

    def covariance_shape(self, size: int, width: int) -> tuple[int, ...]:
        """The shape of ``covariances`` for K components of D features."""
        shapes: dict[str, tuple[int, ...]] = {
            "full": (size, width, width),
            "tied": (width, width),
            "diag": (size, width),
            "spherical": (size,),
        }
        return shapes[self.covariance_type]

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

    def moments(
        self, x: Tensor, size: int, generator: torch.Generator
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Rows of each k-means component, and their statistics."""
        label = self.labels(x, size, generator)
        sums: tuple[Tensor, ...] = ()
        blocks = (torch.split(each, _BLOCK_ROWS) for each in (x, label))
        for rows, which in zip(*blocks, strict=True):
            moved = rows.double() - self.shift
            found = self.statistics(moved, one_hot(which, size).double())
            sums = tuple(map(torch.add, sums, found)) if sums else found
        return torch.bincount(label, minlength=size).double(), sums

    def statistics(self, x: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        """Weighted sums of shifted rows, and of what the covariance type needs of ``x x'``."""
        if self.covariance_type in ("full", "tied"):
            # Products of single precision would lose the smallest eigenvalue of a covariance.
            x, weights = x.double(), weights.double()
        w = weights.T
        if self.covariance_type == "tied":
            return w @ x, (x * weights.sum(1, keepdim=True)).T @ x
        if self.covariance_type == "diag":
            return w @ x, w @ x.square()
        if self.covariance_type == "spherical":
            return w @ x, w @ x.square().sum(1)
        weighted = (weights[:, :, None] * x[:, None]).flatten(1)
        return w @ x, (weighted.T @ x).reshape(len(w), -1, x.shape[1])

    def scatter(self, first: Tensor, second: Tensor, means: Tensor) -> Tensor:
        """Weighted sums of ``(x - m_k)(x - m_k)'`` in the shape of ``covariances``."""
        if self.covariance_type == "tied":
            return second - first.T @ means
        if self.covariance_type == "full":
            return second - first[:, :, None] * means[:, None]
        if self.covariance_type == "diag":
            return (second - first * means).clamp(min=0)  # rounding may leave less
        return ((second - (first * means).sum(1)) / means.shape[1]).clamp(min=0)

    def over_mass(self, scatter: Tensor, mass: Tensor) -> Tensor:
        """Covariances: the scatter over its rows, plus ``reg_covar`` in the variances."""
        if self.covariance_type in ("full", "tied"):
            floor = self.reg_covar * torch.eye(scatter.shape[-1]).to(scatter)
        else:
            floor = torch.full_like(scatter, self.reg_covar)
        tied = self.covariance_type == "tied"
        rows = mass.sum() if tied else mass.reshape(-1, *[1] * (scatter.ndim - 1))
        return scatter / rows + floor

    def factor(self, parameters: Parameters) -> Tensor:
        """``P`` with ``S^-1 = P P'``: ``(K, D, D)`` or ``(1, D, D)``, or its diagonal ``(K, D)``.

        Raises:
            DataError: A covariance is singular.
        """
        covariances, width = parameters["covariances"], parameters["means"].shape[1]
        if self.covariance_type in ("diag", "spherical"):
            if not bool((covariances > 0).all()):
                raise DataError(self._singular(covariances <= 0))
            variances = covariances if covariances.ndim == 2 else covariances[:, None]
            return variances.rsqrt().expand(-1, width)
        root, info = torch.linalg.cholesky_ex(covariances.reshape(-1, width, width))
        if bool(info.any()):
            raise DataError(self._singular(info > 0))
        eye = torch.eye(width, dtype=root.dtype, device=root.device).expand_as(root)
        inverse: Tensor = torch.linalg.solve_triangular(root, eye, upper=False)
        return inverse.mT

    def distance(self, parameters: Parameters, factor: Tensor, dtype: torch.dtype) -> Distance:
        """``(x - m_k)' S_k^-1 (x - m_k)`` of shifted rows: ``(B, D) -> (B, K)``."""
        means = self._shifted(parameters["means"]).to(dtype)
        kind = diagonal_distance if factor.ndim == 2 else _dense_distance
        return kind(means, factor.to(dtype))

    def slack(self, before: Parameters, after: Parameters, counts: Tensor) -> float:
        """``r/2 sum_k n_k (tr S_k^-1 before - after)``: what adding r to the variances costs."""
        if not self.reg_covar:
            return 0.0
        ones = torch.ones_like(self.shift)
        old, new = (traces(self.factor(p), ones) for p in (before, after))
        mass = counts.sum() if self.covariance_type == "tied" else counts
        return 0.5 * self.reg_covar * float((mass * (old - new)).sum())

    def seeded(self, parameters: Parameters, which: Tensor, rows: Tensor) -> Parameters:
        """Means at the rows; of everything else the components' average."""
        means = parameters["means"].index_copy(0, which, rows.double())
        others = {}
        for name, value in parameters.items():
            if name != "means" and value.shape[:1] == means.shape[:1]:
                average = value.mean(0, keepdim=True).expand(len(which), *value.shape[1:])
                others[name] = value.index_copy(0, which, average)
        return parameters | others | {"means": means}

    def cancelling(self, parameters: Parameters) -> float:
        """Of each component's ``(P_k' (m_k - shift))_d^2``, the largest."""
        means, factor = self._shifted(parameters["means"]), self.factor(parameters)
        white = means * factor if factor.ndim == 2 else (means[:, None] @ factor).squeeze(1)
        return float(white.square().norm(dim=1).max())

    def block_width(self, size: int, width: int) -> int:
        """All components' whitened rows, where each has a matrix of its own."""
        return size * width if self.covariance_type == "full" else max(size, 2 * width)

    def noise(self, parameters: Parameters, which: Tensor, generator: torch.Generator) -> Tensor:
        """Normal noise with the covariances of the components in ``which``: ``(n, D)``."""
        covariances, width = parameters["covariances"], parameters["means"].shape[1]
        noise = torch.randn(len(which), width, generator=generator, dtype=torch.float64)
        if self.covariance_type == "diag":
            return covariances.sqrt()[which] * noise
        if self.covariance_type == "spherical":
            return covariances.sqrt()[which, None] * noise
        root: Tensor = torch.linalg.cholesky(covariances)
        if self.covariance_type == "tied":
            return noise @ root.mT
        return (root[which] @ noise[:, :, None]).squeeze(2)

    def _singular(self, bad: Tensor) -> str:
        constant = (self.scale == 0).nonzero().flatten().tolist()
        why = f"feature {constant[0]} is constant" if constant else "too few rows for a component"
        component = int(bad.reshape(len(bad), -1).any(1).nonzero()[0])
        return (
            f"{type(self).__name__}(n_components={self.chosen}, reg_covar={self.reg_covar}) met a "
            f"singular covariance in component {component} ({why}): "
            "raise reg_covar or lower n_components"
        )


def half_log_det(factor: Tensor) -> Tensor:
    """``-log |S| / 2``, one for each covariance."""
    diagonal = factor if factor.ndim == 2 else factor.diagonal(dim1=-2, dim2=-1)
    total: Tensor = diagonal.log().sum(-1)
    return total


def traces(factor: Tensor, scale: Tensor) -> Tensor:
    """``tr(diag(scale) S^-1)``, one for each covariance."""
    squares = factor.square()
    return squares @ scale if factor.ndim == 2 else squares.sum(-1) @ scale


def diagonal_distance(means: Tensor, factor: Tensor) -> Distance:
    """``sum_d ((x - m_k) f_k)_d^2`` as two products, with x and its square."""
    precision = factor.square()
    slope, constant = -2 * (means * precision).T, (means * factor).square().sum(1)
    return lambda x: torch.addmm(constant, x, slope).addmm_(x.square(), precision.T)


def _dense_distance(means: Tensor, factor: Tensor) -> Distance:
    """``|P_k' (x - m_k)|^2``, by one product of the rows with all factors side by side."""
    size, width = means.shape
    if len(factor) == 1:  # one covariance for all
        white = means @ factor[0]
        constant = white.square().sum(1)

        def tied(x: Tensor) -> Tensor:
            y = x @ factor[0]
            return torch.addmm(constant, y, white.T, alpha=-2).add_(y.square().sum(1, keepdim=True))

        return tied
    side_by_side = factor.permute(1, 0, 2).reshape(width, size * width)
    centres = (means[:, None] @ factor).flatten()

    def full(x: Tensor) -> Tensor:
        white = torch.addmm(-centres, x, side_by_side)
        return white.square_().reshape(-1, size, width).sum(2)

    return full
