"""What every mixture shares: its options, its starts and restarts, and its density."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Self, TypedDict, Unpack

import torch
from torch import Tensor

from pvae.baselines.density import Density, as_sizes, at_least, non_negative
from pvae.baselines.em import (
    EM,
    Fit,
    Parameters,
    Score,
    block_rows,
    expect,
    log_joint,
    normalise,
)
from pvae.errors import DataError, OptionError
from pvae.progress import watched

if TYPE_CHECKING:
    from pvae.baselines.density import Rows

__all__ = ["Mixture", "Options", "Smoothed", "bisect", "random_rows", "whole_numbers"]


_BISECTIONS = 60


class Options(TypedDict, total=False):
    """What every mixture's constructor takes besides its own options."""

    restarts: int
    max_iterations: int
    tolerance: float
    batch_size: int | None
    weight_concentration: float
    start: Mixture | None
    seed: int
    progress: bool | Callable[[int, float], None]


class Mixture(Density):
    """``p(x) = sum_k pi_k p(x | k)``, fitted by EM; subclasses say what ``p(x | k)`` is.

    Rows on a GPU are fitted there. Rows mapped from a file are read block by block, and with
    ``batch_size`` they are never held together.

    Args:
        n_components: K, or several to choose from by the mean log density of ``valid`` or BIC.
        restarts: Number of starts; the best objective is kept.
        max_iterations: Most EM steps of a start, or passes over the rows with ``batch_size``.
        tolerance: Stop at a smaller gain of the objective, nats per datum.
        batch_size: Rows of a step of stepwise EM (Liang & Klein 2009), for data larger than memory.
        weight_concentration: Of a Dirichlet prior of the weights; 1 is maximum likelihood.
        start: A fitted mixture of the same kind and size to start from.
        seed: Of the starts.
        progress: ``True`` for a bar on a terminal, or a function of (iteration, objective), called
            from iteration 0, the start.

    Attributes:
        weights: pi, ``(K,)`` float64.
        history: The objective at each iteration of the start that was kept, nats per datum: the
            mean log density of the rows, plus the log priors over N.
        reseeded: How many components lost all their rows and were started again.

    Raises:
        OptionError: An option out of its range.
    """

    weights: Tensor
    history: list[float]
    reseeded: int = 0
    _names: tuple[str, ...] = ()

    def __init__(
        self,
        n_components: int | Sequence[int],
        *,
        restarts: int = 1,
        max_iterations: int = 100,
        tolerance: float = 1e-3,
        batch_size: int | None = None,
        weight_concentration: float = 1.0,
        start: Mixture | None = None,
        seed: int = 0,
        progress: bool | Callable[[int, float], None] = False,
    ) -> None:
        as_sizes(n_components)
        self.n_components = n_components
        self.restarts = at_least("restarts", restarts, 1)
        self.max_iterations = at_least("max_iterations", max_iterations, 1)
        self.tolerance = non_negative("tolerance", tolerance)
        self.batch_size = None if batch_size is None else at_least("batch_size", batch_size, 1)
        if not 1 <= weight_concentration < float("inf"):
            raise OptionError(
                f"weight_concentration must be finite and at least 1 (no prior), got "
                f"{weight_concentration!r}"
            )
        self.weight_concentration = weight_concentration
        if start is not None and (type(start) is not type(self) or start._shape is None):
            raise OptionError(f"start must be a fitted {type(self).__name__}, got {start!r}")
        self.start = start
        self.seed = at_least("seed", seed, 0)
        self.progress = progress

    # --- what a mixture defines -------------------------------------------------------------------

    @abstractmethod
    def initial(
        self, x: Tensor, size: int, generator: torch.Generator
    ) -> tuple[Tensor, Parameters]:
        """Weights and parameters to start from, float64."""

    @abstractmethod
    def score(self, parameters: Parameters, dtype: torch.dtype) -> Score:
        """A function of rows ``(B, D)``: log densities ``(B, K)`` and how to summarise the rows.

        What it summarises with is given responsibilities ``(B, K)`` and returns sums over the rows.
        """

    @abstractmethod
    def maximise(self, counts: Tensor, statistics: tuple[Tensor, ...]) -> Parameters:
        """The parameters that maximise the expected log density plus the log prior."""

    @abstractmethod
    def seeded(self, parameters: Parameters, which: Tensor, rows: Tensor) -> Parameters:
        """The parameters with components ``which`` started anew at ``rows``."""

    @abstractmethod
    def draw(self, parameters: Parameters, which: Tensor, generator: torch.Generator) -> Tensor:
        """A row of each component in ``which``: ``(n,) -> (n, D)``."""

    def prepare(self, x: Tensor) -> None:
        """Set what the family knows of the rows before EM starts; by default nothing."""
        del x

    def log_prior(self, parameters: Parameters) -> Tensor:
        """``()``, nats; zero is maximum likelihood."""
        return next(iter(parameters.values())).new_zeros(())

    def slack(self, before: Parameters, after: Parameters, counts: Tensor) -> float:
        """The most, in nats, by which ``maximise`` may fall short of the best step: zero."""
        del before, after, counts
        return 0.0

    def cancelling(self, parameters: Parameters) -> float:
        """Root of the summed squares of the terms, in nats, that cancel in a log density: none."""
        del parameters
        return 0.0

    def block_width(self, size: int, width: int) -> int:
        """Entries that one row takes of the largest matrix of an E-step."""
        return max(size, width)

    # --- what it gets -----------------------------------------------------------------------------

    @property
    def objective(self) -> float:
        """The last of ``history``: that of the parameters kept, nats per training datum."""
        self._fitted_shape()
        return self.history[-1]

    def responsibilities(self, x: Rows) -> Tensor:
        """``p(k | x)`` of each row: ``(N, D) -> (N, K)`` float64.

        Raises:
            DataError: Not fitted yet, or rows that ``fit`` would refuse, or of another width.
        """
        rows = self._rows(x, "x", self._fitted_shape()[1])
        joint = log_joint(self, self.weights, self._parameters(), torch.float64)
        blocks = torch.split(rows, block_rows(self, rows, len(self.weights)))
        moved = (block.to(self.weights.device, torch.float64) for block in blocks)
        return torch.cat([normalise(joint(block)[0])[1].to(rows.device) for block in moved])

    def _set(self, width: int, weights: Tensor, parameters: Parameters) -> Self:
        """This mixture of known parameters, as if fitted."""
        self._shape, self._dtype, self.chosen = (0, width), torch.float64, len(weights)
        self.selection = {}
        self._take(Fit(weights, parameters, converged=True))
        return self

    def _take(self, fit: Fit) -> None:
        vars(self).update(fit.parameters)
        self._names = tuple(fit.parameters)
        self.weights, self.history = fit.weights, fit.history
        self.converged, self.reseeded = fit.converged, fit.reseeded

    def _parameters(self) -> Parameters:
        return {name: getattr(self, name) for name in self._names}

    def _estimate(self, x: Tensor, value: int) -> None:
        if value > len(x):
            raise OptionError(
                f"{type(self).__name__}(n_components={value}) needs at least {value} rows, "
                f"got {len(x)}: lower n_components or pass more rows"
            )
        self.prepare(x)
        best: Fit | None = None
        for start in range(self.restarts if self.start is None else 1):
            generator = torch.Generator().manual_seed(self.seed + 7919 * start)
            weights, parameters = self._start(x, value, generator)
            with watched(self.progress, f"{self.name}, K = {value}", self.max_iterations) as report:
                fit = self._em(report).run(self, x, weights, parameters)
            if best is None or fit.history[-1] > best.history[-1]:
                best = fit
        assert best is not None
        self._take(best)

    def _start(self, x: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Parameters]:
        if self.start is None:
            return self.initial(x, size, generator)
        known, width = self.start, self.start._fitted_shape()[1]
        if (known.chosen, width) != (size, x.shape[1]):
            raise OptionError(
                f"start has {known.chosen} components of {width} features, expected {size} of "
                f"{x.shape[1]}: give one fitted to rows like these"
            )
        device = x.device
        return known.weights.to(device), {k: v.to(device) for k, v in known._parameters().items()}

    def _em(self, report: Callable[[int, float], None]) -> EM:
        return EM(
            max_iterations=self.max_iterations,
            tolerance=self.tolerance,
            batch_size=self.batch_size,
            weight_concentration=self.weight_concentration,
            seed=self.seed,
            report=report,
        )

    def _log_density(self, x: Tensor) -> Tensor:
        weights, parameters = self.weights.to(x.device), self._parameters()
        moved = {name: value.to(x.device) for name, value in parameters.items()}
        return expect(self, weights, moved, x, exact=True).log_density

    def _draw(self, n: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        weights = self.weights.cpu()
        chosen = torch.multinomial(weights, n, replacement=True, generator=generator)
        parameters = {name: value.cpu() for name, value in self._parameters().items()}
        return self.draw(parameters, chosen, generator)

    def _state(self) -> dict[str, Tensor]:
        history = torch.tensor(self.history, dtype=torch.float64)
        return {"weights": self.weights, "history": history, **self._parameters()}

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        parameters = {k: v for k, v in state.items() if k not in ("weights", "history")}
        self._take(Fit(state["weights"], parameters, state["history"].tolist(), self.converged))


class Smoothed(Mixture):
    """A mixture whose components are pulled to the rows' global law by pseudo-rows.

    Args:
        n_components: K, or several.
        smoothing: s, in pseudo-rows per component.
        **options: Those of every mixture.
    """

    def __init__(
        self,
        n_components: int | Sequence[int] = 10,
        *,
        smoothing: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(n_components, **options)
        self.smoothing = non_negative("smoothing", smoothing)

    def mass(self, counts: Tensor) -> Tensor:
        """Expected rows and pseudo-rows of each component: ``(K,)``, above zero."""
        # Without smoothing an empty component has no mass: its parameters are then arbitrary.
        return (counts + self.smoothing).clamp(min=torch.finfo(torch.float64).tiny)

    def pulled(self, counts: Tensor, total: Tensor, centre: Tensor) -> Tensor:
        """``(total_k + s centre) / (n_k + s)`` for sums ``(K, ...)`` over the rows."""
        mass = self.mass(counts).reshape(-1, *[1] * centre.ndim)
        return (total + self.smoothing * centre) / mass


def random_rows(x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """``size`` different rows, float64, on the device of ``x``."""
    index = torch.randperm(len(x), generator=generator)[:size]
    return x[index.sort().values.to(x.device)].double()


def whole_numbers(x: Tensor, role: str, owner: str) -> None:
    """Refuse rows that are not counts.

    Raises:
        DataError: An entry is negative or broken.
    """
    wrong = (x < 0) | (x != x.floor())
    if wrong.any():
        row, feature = wrong.nonzero()[0].tolist()
        raise DataError(
            f"{owner} takes whole numbers from 0 up, got {x[row, feature].item():g} in row {row}, "
            f"feature {feature} of {role}: leave the data untransformed (transform='none')"
        )


def bisect(is_low: Callable[[Tensor], Tensor], like: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Where a rising function of positive numbers crosses zero, entry by entry, within bounds.

    Args:
        is_low: Whether it is still below zero.
        like: A tensor of the wanted shape and dtype.
        bounds: Between which the roots are looked for, in their logarithm.
    """
    low, high = (torch.full_like(like, bound).log() for bound in bounds)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        below = is_low(middle.exp())
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return ((low + high) / 2).exp()
