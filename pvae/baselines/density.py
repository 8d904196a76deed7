"""What every classical density shares: checks of the data, choice of a size, files."""

from __future__ import annotations

import copy
import inspect
import math
import operator
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias, TypeVar

from pvae.errors import DataError, OptionError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    Rows: TypeAlias = Tensor | np.ndarray[Any, Any]

__all__ = [
    "Density",
    "as_rows",
    "as_sizes",
    "at_least",
    "non_negative",
    "watch_convergence",
]

Fitted = TypeVar("Fitted")

_CRITERIA = ("valid", "bic")
_BLOCK_ENTRIES = 2**24  # of the rows looked at together when they are checked


class Density(ABC):
    """What every baseline shares: checks of the data, and the choice of a size on held-out rows.

    A subclass names its ``name`` and, when it is not ``n_components``, the ``option`` that is
    chosen; and it defines ``_candidates``, ``_estimate``, ``_log_density``, ``_draw``, ``_state``
    and ``num_parameters``. Its constructor keeps each argument under its own name.

    Attributes:
        chosen: The value of ``option`` in use, after ``fit``.
        selection: Candidate -> its criterion, nats per datum and higher is better: the mean log
            density of ``valid``, or ``(log p(x) - num_parameters log(N) / 2) / N`` (BIC; Schwarz
            1978). Empty when there was nothing to choose.
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

    def fit(
        self,
        x: Rows,
        valid: Rows | None = None,
        *,
        seed: int | None = None,
        restarts: int | None = None,
        criterion: str = "valid",
    ) -> Self:
        """Estimate from rows ``x``; several candidates are judged by ``valid`` or by BIC.

        A fit that fails leaves the object as it was.

        Args:
            x: Training rows, ``(N, D)``.
            valid: Held-out rows, ``(M, D)``; needed only when there is something to choose.
            seed: Instead of the constructor's, where the density has a random start.
            restarts: Likewise.
            criterion: ``"valid"`` or ``"bic"``, by which the best candidate is taken.

        Raises:
            DataError: The rows are not a finite, non-empty matrix, or do not suit the density.
            OptionError: There are candidates but no ``valid``, or a candidate does not fit ``x``.
        """
        if criterion not in _CRITERIA:
            hint = did_you_mean(criterion, _CRITERIA)
            raise OptionError(f"no criterion is called {criterion!r}: {hint}")
        asked = copy.copy(self)
        for option, value in (("seed", seed), ("restarts", restarts)):
            if value is not None and hasattr(asked, option):
                setattr(asked, option, at_least(option, value, 0 if option == "seed" else 1))
        best, selection = asked._best(x, valid, criterion)
        vars(self).update(vars(best), selection=selection)
        return self

    def _best(self, x: Rows, valid: Rows | None, criterion: str) -> tuple[Self, dict[Any, float]]:
        rows = self._rows(x, "x")
        held_out = None if valid is None else self._rows(valid, "valid", rows.shape[1])
        candidates = self._candidates(rows)
        if len(candidates) == 1:
            return self._fitted(rows, candidates[0]), {}
        if criterion == "bic":
            return self._select(candidates, rows, _bic)
        if held_out is None:
            raise OptionError(
                f"{type(self).__name__} has {len(candidates)} values of {self.option} to choose "
                f"from: pass held-out rows, fit(x, valid), or criterion='bic', or give one value"
            )
        return self._select(
            candidates, rows, lambda density, _: float(density._log_density(held_out).mean())
        )

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

    def save(self, folder: str | Path) -> Path:
        """Write the fitted density: its tensors, and a manifest with their SHA-256.

        :func:`pvae.baselines.load` reads it.

        Raises:
            DataError: Not fitted yet.
        """
        from pvae.checkpoints import save_tensors

        about = {
            "baseline": self.name,
            "options": {name: _plain(getattr(self, name)) for name in self._option_names()},
            "chosen": self.chosen,
            "selection": [[value, score] for value, score in self.selection.items()],
            "converged": self.converged,
            "shape": list(self._fitted_shape()),
            "dtype": str(self._dtype).removeprefix("torch."),
        }
        save_tensors(Path(folder), self._state(), about)
        return Path(folder)

    @classmethod
    def _restored(cls, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> Self:
        import torch

        options = {k: v for k, v in manifest["options"].items() if v is not None}
        density = cls(**options)
        density.chosen, density.converged = manifest["chosen"], manifest["converged"]
        density.selection = {value: score for value, score in manifest["selection"]}
        rows, width = manifest["shape"]
        density._shape, density._dtype = (rows, width), getattr(torch, manifest["dtype"])
        density._restore(tensors)
        return density

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

    @abstractmethod
    def _state(self) -> dict[str, Tensor]:
        """The fitted tensors by name."""

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the tensors of ``_state`` back."""
        vars(self).update(state)

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
        self, candidates: Sequence[Any], x: Tensor, judge: Callable[[Self, Tensor], float]
    ) -> tuple[Self, dict[Any, float]]:
        selection: dict[Any, float] = {}
        best = None
        for value in candidates:
            candidate = self._fitted(x, value)
            selection[value] = judge(candidate, x)
            if best is None or selection[value] > selection[best.chosen]:
                best = candidate
        assert best is not None
        return best, selection

    def _fitted_shape(self) -> tuple[int, int]:
        if self._shape is None:
            raise DataError(f"{type(self).__name__} is not fitted: call fit(x) first")
        return self._shape

    @classmethod
    def _option_names(cls) -> list[str]:
        """What the constructors of the class and its bases take and can be told in a file."""
        names: dict[str, None] = {}
        for base in cls.__mro__:
            if "__init__" in vars(base) and base is not object:
                for name, parameter in inspect.signature(vars(base)["__init__"]).parameters.items():
                    if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                        names.setdefault(name)
        return [name for name in names if name not in ("self", "start", "progress")]

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in self._option_names()}
        if self._shape is not None:
            shown |= {self.option: self.chosen}
            shown |= {"num_features": self._shape[1], "converged": self.converged}
        kept = {k: v for k, v in shown.items() if v is not None and not callable(v)}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in kept.items())})"


def _bic(density: Density, x: Tensor) -> float:
    rows = len(x)
    penalty = density.num_parameters * math.log(rows) / 2
    return float((density._log_density(x).sum() - penalty) / rows)


def _plain(value: Any) -> Any:
    """A value as JSON can hold it; a file or a device is its own text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return [_plain(each) for each in value] if isinstance(value, Sequence) else str(value)


def as_rows(x: Rows, role: str, *, width: int | None = None) -> Tensor:
    """``x`` as a finite floating-point matrix ``(N, D)``: float64 and float32 stay as they are.

    Small integers and bits become float32 (without loss), wider integers float64. An array is
    shared, not copied, where its type allows: one that is mapped from a file is not read whole.

    Raises:
        DataError: Not numbers, not a non-empty matrix, not finite, or not of the width expected.
    """
    import torch

    try:
        rows = x if isinstance(x, torch.Tensor) else _shared(x)
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
    first = 0
    for block in torch.split(rows, max(1, _BLOCK_ENTRIES // rows.shape[1])):
        finite = torch.isfinite(block)
        if not finite.all():
            row, feature = (~finite).nonzero()[0].tolist()
            raise DataError(
                f"{role} must be finite, got {block[row, feature].item()} in row {first + row}, "
                f"feature {feature}: drop or impute it"
            )
        first += len(block)
    return rows.detach()


def _shared(x: Any) -> Tensor:
    """An array as a tensor over the same memory, where torch can have it so."""
    import numpy as np
    import torch

    with warnings.catch_warnings():
        # Read-only memory is shared all the same: no density writes to its rows.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.require(x, None, ["C"]))


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
