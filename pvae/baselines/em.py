"""Expectation-maximisation for mixtures: in log space, in blocks of rows, monotone by a check.

A family of components is anything with the members of :class:`Family`. What is fitted to rows
``x_n`` is the mean over them of ``log sum_k pi_k p(x_n | k)``, plus the log priors over N.

Dempster, Laird & Rubin (1977); Cappe & Moulines (2009) and Liang & Klein (2009) for the stepwise
form, whose sufficient statistics are ``s <- (1 - eta_t) s + eta_t N/B s_batch`` with
``eta_t = (t + 2)^-0.7``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from pvae.allocation import keep_large_blocks
from pvae.errors import NonFiniteError, PvaeError

__all__ = [
    "EM",
    "Expected",
    "Family",
    "Fit",
    "Parameters",
    "Score",
    "Summarize",
    "block_rows",
    "expect",
    "log_joint",
    "normalise",
]

Parameters: TypeAlias = dict[str, Tensor]
Summarize: TypeAlias = Callable[[Tensor], tuple[Tensor, ...]]
Score: TypeAlias = Callable[[Tensor], tuple[Tensor, Summarize]]

_FORGETTING = 0.7  # of stepwise EM; convergence needs it in (0.5, 1]
_EMPTY = 1e-2  # expected rows below which a component is started again
_ROUNDING = 1e-4  # nats per feature; beyond it, products are taken in float64
_BLOCK_ENTRIES = 2**21  # of the largest matrix held at a time


class Family(Protocol):
    """K densities of one kind: what an EM step needs of them. Parameters are float64."""

    def score(self, parameters: Parameters, dtype: torch.dtype) -> Score:
        """A function of rows ``(B, D)`` in this dtype, made once for many blocks of them.

        It gives log densities ``(B, K)``, which may be overwritten, and the map from
        responsibilities ``(B, K)`` to sums over the rows: the sufficient statistics.
        """

    def maximise(self, counts: Tensor, statistics: tuple[Tensor, ...]) -> Parameters:
        """The parameters that maximise the expected log density plus the log prior."""

    def log_prior(self, parameters: Parameters) -> Tensor:
        """``()``, nats."""

    def slack(self, before: Parameters, after: Parameters, counts: Tensor) -> float:
        """The most, in nats, by which ``maximise`` may fall short of the best step."""

    def seeded(self, parameters: Parameters, which: Tensor, rows: Tensor) -> Parameters:
        """The parameters with components ``which`` started anew at ``rows``."""

    def cancelling(self, parameters: Parameters) -> float:
        """Root of the summed squares of the terms, in nats, that cancel in a log density."""

    def block_width(self, size: int, width: int) -> int:
        """Entries that one row takes of the largest matrix of an E-step."""


@dataclass(frozen=True)
class Expected:
    """One E-step over rows: sums that an M-step needs, and the likelihood.

    Attributes:
        counts: Expected rows of each component, ``(K,)``.
        statistics: Sums over the rows.
        log_density: ``log p(x_n)``, ``(N,)`` float64.
    """

    counts: Tensor
    statistics: tuple[Tensor, ...]
    log_density: Tensor

    def towards(self, other: Expected, rate: float, scale: float) -> Expected:
        """``(1 - rate)`` of these sums and ``rate`` of another's times ``scale``."""

        def mix(old: Tensor, new: Tensor) -> Tensor:
            return (1 - rate) * old + rate * scale * new

        pairs = zip(self.statistics, other.statistics, strict=True)
        statistics = tuple(mix(old, new) for old, new in pairs)
        return Expected(mix(self.counts, other.counts), statistics, other.log_density)


@dataclass(frozen=True)
class Fit:
    """Where one start ended.

    Attributes:
        weights: pi, ``(K,)``.
        parameters: Those of the components.
        history: The objective at each iteration, nats per datum.
        converged: Whether the last gain was below the tolerance.
        reseeded: How many empty components were started again.
    """

    weights: Tensor
    parameters: Parameters
    history: list[float] = field(default_factory=list)
    converged: bool = False
    reseeded: int = 0


def log_joint(family: Family, weights: Tensor, parameters: Parameters, dtype: torch.dtype) -> Score:
    """As :meth:`Family.score`, of ``log pi_k + log p(x | k)``."""
    score, log_weights = family.score(parameters, dtype), weights.log().to(dtype)

    def joint(x: Tensor) -> tuple[Tensor, Summarize]:
        log_density, summarize = score(x)
        return log_density.add_(log_weights), summarize

    return joint


def expect(
    family: Family, weights: Tensor, parameters: Parameters, x: Tensor, *, exact: bool = False
) -> Expected:
    """The E-step over all rows, block by block.

    Products are taken in the dtype of ``x`` where that rounds log densities by less than 1e-4
    nats a feature, else in float64; sums over rows are float64.

    Args:
        family: The kind of components.
        weights: pi, ``(K,)``.
        parameters: Those of the components.
        x: Rows ``(N, D)``.
        exact: Take every product in float64, and no statistics.
    """
    wide = exact or x.dtype == torch.float64 or _rounding(family, parameters, x) is None
    dtype = torch.float64 if wide else x.dtype
    score = log_joint(family, weights, parameters, dtype)
    counts = torch.zeros_like(weights)
    sums: list[Tensor] = []
    # Made beforehand: small results kept between large blocks would leave the heap in holes.
    log_density = torch.empty(len(x)).to(weights)
    size = block_rows(family, x, len(weights))
    for block, found in zip(torch.split(x, size), torch.split(log_density, size), strict=True):
        joint, summarize = score(block.to(weights.device, dtype))
        log_evidence, responsibilities = normalise(joint)
        found.copy_(log_evidence)
        if exact:
            continue
        counts = counts + responsibilities.sum(0, dtype=torch.float64)
        parts = [each.double() for each in summarize(responsibilities)]
        sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
    return Expected(counts, tuple(sums), log_density)


def _rounding(family: Family, parameters: Parameters, x: Tensor) -> float | None:
    """Rounding of a log density by products in the dtype of ``x``; ``None`` if that is too much."""
    rounding = torch.finfo(x.dtype).eps * family.cancelling(parameters)
    return rounding if rounding <= _ROUNDING * x.shape[1] else None


def block_rows(family: Family, x: Tensor, size: int) -> int:
    """Rows that an E-step takes at once."""
    return max(1, _BLOCK_ENTRIES // family.block_width(size, x.shape[1]))


def normalise(joint: Tensor) -> tuple[Tensor, Tensor]:
    """``log p(x)``, ``(B,)`` float64, and ``p(k | x)``, ``(B, K)`` in place of the log joint."""
    top = joint.amax(1, keepdim=True)
    ratio = joint.sub_(top).exp_()
    total = ratio.sum(1, keepdim=True, dtype=torch.float64)
    return (top + total.log()).squeeze(1), ratio.div_(total.to(ratio))


@dataclass(frozen=True)
class EM:
    """How a mixture is fitted.

    Attributes:
        max_iterations: Most M-steps, or passes over the rows of stepwise EM.
        tolerance: Stop at a smaller gain of the objective, nats per datum.
        batch_size: Rows of a step of stepwise EM; ``None`` for full EM, whose objective may not
            fall.
        weight_concentration: Of the Dirichlet prior of the weights; 1 is none.
        seed: Of batches and of components that are started again.
        report: Called with (iteration, objective in nats per datum), from 0, the start.
    """

    max_iterations: int = 100
    tolerance: float = 1e-3
    batch_size: int | None = None
    weight_concentration: float = 1.0
    seed: int = 0
    report: Callable[[int, float], None] = lambda iteration, objective: None

    def run(self, family: Family, x: Tensor, weights: Tensor, parameters: Parameters) -> Fit:
        """From a start to convergence.

        Raises:
            PvaeError: The objective fell, which is a fault; the message names the component.
            NonFiniteError: A row has a log density that is not finite.
        """
        keep_large_blocks()
        start = Fit(weights, parameters)
        return self._stepwise(family, x, start) if self.batch_size else self._full(family, x, start)

    def _full(self, family: Family, x: Tensor, start: Fit) -> Fit:
        generator = torch.Generator().manual_seed(self.seed)
        fit, expected = start, expect(family, start.weights, start.parameters, x)
        objective = self._objective(family, fit, expected)
        history, gain = [self._said(0, objective)], math.inf
        for iteration in range(1, self.max_iterations + 1):
            before, fit = fit, self._maximised(family, fit, expected)
            fit, fresh = self._revived(family, x, fit, expected, generator)
            old, expected = expected, expect(family, fit.weights, fit.parameters, x)
            gain = (found := self._objective(family, fit, expected)) - objective
            if not fresh and gain < 0:
                allowed = self._allowance(family, x, before, fit, old, found)
                if gain < -allowed:
                    raise PvaeError(_fall(iteration, gain, family, x, before, fit))
            objective = self._said(iteration, found)
            history.append(objective)
            if not fresh and abs(gain) < self.tolerance:
                break
        return replace(fit, history=history, converged=abs(gain) < self.tolerance)

    def _stepwise(self, family: Family, x: Tensor, start: Fit) -> Fit:
        assert self.batch_size is not None
        generator = torch.Generator().manual_seed(self.seed)
        rows, fit, step = len(x), start, 0
        first = torch.randperm(rows, generator=generator)[: max(self.batch_size, 10_000)]
        sums = expect(family, fit.weights, fit.parameters, _gather(x, first))
        sums = sums.towards(sums, 1.0, rows / len(first))
        history: list[float] = []
        gain = math.inf
        for iteration in range(1, self.max_iterations + 1):
            total = 0.0
            order = torch.randperm(rows, generator=generator)
            for index in torch.split(order, self.batch_size):
                batch = _gather(x, index)
                found = expect(family, fit.weights, fit.parameters, batch)
                total += self._objective(family, fit, found, rows) * len(index) / rows
                sums = sums.towards(found, (step + 2) ** -_FORGETTING, rows / len(index))
                fit = self._maximised(family, fit, sums)
                fit, _ = self._revived(family, batch, fit, sums, generator)
                step += 1
            gain = total - history[-1] if history else math.inf
            history.append(self._said(iteration, total))
            if gain < self.tolerance:
                break
        return replace(fit, history=history, converged=gain < self.tolerance)

    def _said(self, iteration: int, objective: float) -> float:
        self.report(iteration, objective)
        return objective

    def _objective(
        self, family: Family, fit: Fit, expected: Expected, num_data: int | None = None
    ) -> float:
        """Mean log density of the rows plus the log priors over N, nats per datum."""
        mean = expected.log_density.mean()
        log_prior = family.log_prior(fit.parameters)
        if self.weight_concentration != 1:
            log_prior = log_prior + (self.weight_concentration - 1) * fit.weights.log().sum()
        objective = float(mean + log_prior / (num_data or len(expected.log_density)))
        if not math.isfinite(objective):
            bad = (~expected.log_density.isfinite()).nonzero().flatten().tolist()
            where = f"row {bad[0]} has a log density that is not finite" if bad else "the log prior"
            raise NonFiniteError(f"EM stopped: {where}: fit float64 rows, or take a larger floor")
        return objective

    def _maximised(self, family: Family, fit: Fit, expected: Expected) -> Fit:
        counts = expected.counts + (self.weight_concentration - 1)
        parameters = family.maximise(expected.counts, expected.statistics)
        return replace(fit, weights=counts / counts.sum(), parameters=parameters)

    def _revived(
        self, family: Family, x: Tensor, fit: Fit, expected: Expected, generator: torch.Generator
    ) -> tuple[Fit, bool]:
        """Components without rows, started again at rows of low density; each once on average."""
        empty = (expected.counts < _EMPTY).nonzero().flatten()
        if not len(empty) or fit.reseeded >= len(fit.weights) or len(fit.weights) >= len(x):
            return fit, False
        low = expected.log_density.argsort()[: max(len(empty), len(x) // 10)]
        drawn = low[torch.randperm(len(low), generator=generator)[: len(empty)].to(low.device)]
        rows = _gather(x, drawn).to(fit.weights.device)
        weights = fit.weights.clone()
        weights[empty] = 0.5 / len(weights)
        return (
            replace(
                fit,
                weights=weights / weights.sum(),
                parameters=family.seeded(fit.parameters, empty, rows),
                reseeded=fit.reseeded + len(empty),
            ),
            True,
        )

    def _allowance(
        self, family: Family, x: Tensor, before: Fit, after: Fit, old: Expected, objective: float
    ) -> float:
        """The most by which the objective may fall: what the M-step gave away, and rounding."""
        given = family.slack(before.parameters, after.parameters, old.counts) / len(x)
        eps = torch.finfo(x.dtype).eps
        cancelled = [_rounding(family, fit.parameters, x) or 0.0 for fit in (before, after)]
        return max(given, 0.0) + 8 * (eps * (abs(objective) + x.shape[1]) + max(cancelled))


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x``; in ascending order, so that a mapped file is read from front to back."""
    return x[index.sort().values.to(x.device)]


def _fall(iteration: int, gain: float, family: Family, x: Tensor, before: Fit, after: Fit) -> str:
    """Which component's expected log density fell most, with the responsibilities before."""
    change = torch.zeros_like(before.weights)
    scores = [
        log_joint(family, fit.weights, fit.parameters, torch.float64) for fit in (before, after)
    ]
    for block in torch.split(x, block_rows(family, x, len(change))):
        old, new = (score(block.to(change))[0] for score in scores)
        change += (old.softmax(1) * (new - old)).nan_to_num().sum(0)
    return (
        f"EM must not lower its objective, but it changed by {gain:.3g} nats per datum at "
        f"iteration {iteration}, most in component {int(change.argmin())}: fit float64 rows, and "
        f"report a fault if that falls too"
    )
