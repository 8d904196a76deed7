"""Classical densities behind one protocol: the floor that a deep model has to beat.

Each is fitted to rows ``x`` of shape ``(N, D)`` and gives exact log densities in nats per datum, on
the same data as a VAE's bound, so that :func:`pvae.compare` may set them side by side::

    baseline = pvae.baselines.GaussianMixture(n_components=[5, 10, 20]).fit(train, valid)
    baseline.score_samples(test)  # (N,) float64

scikit-learn and torch are imported when a density is first fitted.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import operator
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Protocol,
    Self,
    TypeAlias,
    TypeVar,
    runtime_checkable,
)

from pvae.errors import DataError, OptionError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from pvae.baselines.bernoulli_mixture import BernoulliMixture as BernoulliMixture
    from pvae.baselines.factor_analysis import PPCA as PPCA
    from pvae.baselines.factor_analysis import FactorAnalysis as FactorAnalysis
    from pvae.baselines.gaussian_mixture import GaussianMixture as GaussianMixture
    from pvae.baselines.kernel_density import KernelDensity as KernelDensity

    Rows: TypeAlias = Tensor | np.ndarray[Any, Any]

__all__ = [
    "PPCA",
    "Baseline",
    "BernoulliMixture",
    "Density",
    "FactorAnalysis",
    "GaussianMixture",
    "KernelDensity",
    "available",
    "get",
]

# Short name -> class, module under pvae.baselines, what `pvae list` says.
_BASELINES = {
    "bernoulli-mixture": (
        "BernoulliMixture",
        "bernoulli_mixture",
        "mixture of independent bits, by EM (binary data)",
    ),
    "factor-analysis": (
        "FactorAnalysis",
        "factor_analysis",
        "linear-Gaussian factors, a noise variance per feature",
    ),
    "gaussian-mixture": (
        "GaussianMixture",
        "gaussian_mixture",
        "mixture of Gaussians, by EM",
    ),
    "kernel-density": (
        "KernelDensity",
        "kernel_density",
        "a Gaussian kernel on every training row",
    ),
    "ppca": (
        "PPCA",
        "factor_analysis",
        "probabilistic principal components, in closed form",
    ),
}
_MODULES = {cls: module for cls, module, _ in _BASELINES.values()}

Fitted = TypeVar("Fitted")


def available() -> dict[str, str]:
    """Short name -> one line, sorted by name."""
    return {name: line for name, (_, _, line) in sorted(_BASELINES.items())}


def get(name: str) -> type[Density]:
    """The class behind a short name, ``"ppca"`` say.

    Raises:
        OptionError: no baseline has that name.
    """
    if name not in _BASELINES:
        hint = did_you_mean(name, _BASELINES)
        raise OptionError(f"no baseline is called {name!r}: {hint}")
    found: type[Density] = __getattr__(_BASELINES[name][0])
    return found


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'pvae.baselines' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pvae.baselines.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__


@runtime_checkable
class Baseline(Protocol):
    """A density with a tractable likelihood; any object with these members will do."""

    @property
    def name(self) -> str:
        """Short name for tables."""

    @property
    def kind(self) -> str:
        """How ``score_samples`` relates to the log density: ``"exact"``."""

    @property
    def num_parameters(self) -> int:
        """Number of free parameters of the fitted density."""

    def fit(self, x: Rows, valid: Rows | None = None) -> Self:
        """Estimate from rows ``(N, D)``, choosing among sizes on ``valid``; returns itself."""

    def score_samples(self, x: Rows) -> Tensor:
        """Log density of each row, nats per datum: ``(N, D) -> (N,)`` float64."""

    def sample(self, n: int) -> Tensor:
        """``n`` rows drawn from the fitted density: ``(n, D)``."""


class Density(ABC):
    """What every baseline shares: checks of the data, and the choice of a size on held-out rows.

    A subclass names its ``name`` and, when it is not ``n_components``, the ``option`` that is
    chosen; and it defines ``_candidates``, ``_estimate``, ``_log_density``, ``_draw`` and
    ``num_parameters``.

    Attributes:
        chosen: The value of ``option`` in use, after ``fit``.
        selection: Candidate -> mean log density of ``valid`` (nats per datum); empty when there
            was nothing to choose.
        converged: Whether the estimation of the chosen density met its tolerance.
    """

    kind: ClassVar[str] = "exact"
    name: ClassVar[str]
    option: ClassVar[str] = "n_components"

    n_components: int | Sequence[int]
    chosen: Any
    selection: dict[Any, float]
    converged: bool = True
    _dtype: torch.dtype
    _shape: tuple[int, int] | None = None

    def fit(self, x: Rows, valid: Rows | None = None) -> Self:
        """Estimate from rows ``x``; several candidates are judged by the mean log density of valid.

        A fit that fails leaves the object as it was.

        Args:
            x: Training rows, ``(N, D)``.
            valid: Held-out rows, ``(M, D)``; needed only when there is something to choose.

        Raises:
            DataError: The rows are not a finite, non-empty matrix, or do not suit the density.
            OptionError: There are candidates but no ``valid``, or a candidate does not fit ``x``.
        """
        rows = self._rows(x, "x")
        held_out = None if valid is None else self._rows(valid, "valid", rows.shape[1])
        candidates = self._candidates(rows)
        selection: dict[Any, float] = {}
        if len(candidates) == 1:
            best = self._fitted(rows, candidates[0])
        elif held_out is None:
            raise OptionError(
                f"{type(self).__name__} has {len(candidates)} values of {self.option} to choose "
                f"from: pass held-out rows, fit(x, valid), or give one value"
            )
        else:
            best, selection = self._select(rows, held_out, candidates)
        vars(self).update(vars(best), selection=selection)
        return self

    def score_samples(self, x: Rows) -> Tensor:
        """Exact log density of each row, nats per datum: ``(N, D) -> (N,)`` float64.

        Raises:
            DataError: Not fitted yet, or rows that ``fit`` would refuse, or of another width.
        """
        rows = self._rows(x, "x", self._fitted_shape()[1])
        return self._log_density(rows).to(rows.device)

    def sample(self, n: int, *, seed: int = 0) -> Tensor:
        """``n`` independent rows, ``(n, D)``, in the training rows' dtype; equal for equal seeds.

        Raises:
            DataError: Not fitted yet.
            OptionError: ``n`` is below 1.
        """
        self._fitted_shape()
        return self._draw(at_least("n", n, 1), seed).to(self._dtype)

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Number of free parameters of the fitted density."""

    def _candidates(self, x: Tensor) -> Sequence[Any]:
        return as_sizes(self.n_components)

    @abstractmethod
    def _estimate(self, x: Tensor, value: Any) -> None:
        """Set the fitted attributes from rows ``(N, D)`` and one value of ``option``."""

    @abstractmethod
    def _log_density(self, x: Tensor) -> Tensor:
        """``(N, D) -> (N,)`` float64."""

    @abstractmethod
    def _draw(self, n: int, seed: int) -> Tensor:
        """``(n, D)``."""

    def _check_support(self, x: Tensor, role: str) -> None:
        """Refuse finite rows on which the density is not defined; by default none."""
        del x, role

    def _rows(self, x: Rows, role: str, width: int | None = None) -> Tensor:
        rows = as_rows(x, role, width=width)
        self._check_support(rows, role)
        return rows

    def _fitted(self, x: Tensor, value: Any) -> Self:
        fitted = copy.copy(self)
        fitted.chosen, fitted._shape, fitted._dtype = value, (x.shape[0], x.shape[1]), x.dtype
        fitted._estimate(x, value)
        return fitted

    def _select(
        self, x: Tensor, valid: Tensor, candidates: Sequence[Any]
    ) -> tuple[Self, dict[Any, float]]:
        selection: dict[Any, float] = {}
        best = None
        for value in candidates:
            candidate = self._fitted(x, value)
            selection[value] = float(candidate._log_density(valid).mean())
            if best is None or selection[value] > selection[best.chosen]:
                best = candidate
        assert best is not None
        return best, selection

    def _fitted_shape(self) -> tuple[int, int]:
        if self._shape is None:
            raise DataError(f"{type(self).__name__} is not fitted: call fit(x) first")
        return self._shape

    def __repr__(self) -> str:
        names = inspect.signature(type(self)).parameters
        shown = {name: getattr(self, name) for name in names}
        if self._shape is not None:
            shown |= {self.option: self.chosen}
            shown |= {"num_features": self._shape[1], "converged": self.converged}
        kept = {k: v for k, v in shown.items() if v is not None and not callable(v)}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in kept.items())})"


def as_rows(x: Rows, role: str, *, width: int | None = None) -> Tensor:
    """``x`` as a finite floating-point matrix ``(N, D)``: float64 and float32 stay as they are.

    Small integers and bits become float32 (without loss), wider integers float64.

    Raises:
        DataError: Not numbers, not a non-empty matrix, not finite, or not of the width expected.
    """
    import numpy as np
    import torch

    try:
        # np.require copies only what torch cannot share: read-only arrays and negative strides.
        rows = (
            x if isinstance(x, torch.Tensor) else torch.from_numpy(np.require(x, None, ["C", "W"]))
        )
    except (TypeError, ValueError) as error:
        raise DataError(f"{role} must be a matrix of numbers: {error}") from None
    if rows.ndim != 2 or rows.numel() == 0 or rows.is_complex():
        raise DataError(
            f"{role} must be a non-empty real matrix (N, D), got {rows.dtype} of shape "
            f"{tuple(rows.shape)}: flatten each datum to one row"
        )
    if width is not None and rows.shape[1] != width:
        raise DataError(
            f"{role} must have the {width} features of the rows fitted, got {rows.shape[1]}"
        )
    if rows.dtype not in (torch.float32, torch.float64):
        rows = rows.to(torch.float32 if rows.dtype.itemsize <= 2 else torch.float64)
    finite = torch.isfinite(rows)
    if not finite.all():
        row, feature = (~finite).nonzero()[0].tolist()
        value = rows[row, feature].item()
        raise DataError(
            f"{role} must be finite, got {value} in row {row}, feature {feature}: drop or impute it"
        )
    return rows.detach()


def as_sizes(n_components: int | Sequence[int]) -> tuple[int, ...]:
    """One size or several as a tuple.

    Raises:
        OptionError: Empty, or not whole numbers of at least 1.
    """
    sizes = tuple(n_components) if isinstance(n_components, Sequence) else (n_components,)
    if not sizes:
        raise OptionError("n_components takes a whole number or several, got an empty sequence")
    return tuple(at_least("n_components", size, 1) for size in sizes)


def at_least(option: str, value: int, least: int) -> int:
    """``value`` as an int.

    Raises:
        OptionError: Not a whole number, or below ``least``.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise OptionError(f"{option} must be a whole number of at least {least}, got {value!r}")
    return number


def non_negative(option: str, value: float) -> float:
    """``value`` itself.

    Raises:
        OptionError: Negative, infinite or not a number.
    """
    if not 0 <= value < float("inf"):
        raise OptionError(f"{option} must be finite and at least 0, got {value!r}")
    return value


def watch_convergence(fit: Callable[[], Fitted]) -> tuple[Fitted, bool]:
    """``fit()`` and whether scikit-learn gave no ``ConvergenceWarning``; other warnings go on."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted = fit()
    others = [w for w in caught if not issubclass(w.category, ConvergenceWarning)]
    for warning in others:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return fitted, len(others) == len(caught)
