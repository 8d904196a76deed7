"""Escalation: the cheap estimator first, a stronger one for the data that need it.

Nothing is kept in silence: the result says for each datum which estimator spoke, and whether it
met the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pvae import log_weights as algebra
from pvae.data import as_batch, num_rows, take
from pvae.errors import NonFiniteError, OptionError
from pvae.evidence.importance import Evidence, evaluation, importance
from pvae.particles import draw, inspect, module_of

__all__ = [
    "Curve",
    "Rung",
    "auto",
    "curve_cost",
    "escalation_report",
    "log_evidence_curve",
    "measured_curve",
    "pareto_limit",
    "standard_ladder",
]

Progress = Callable[[str, int, int], None]
Estimate = Callable[..., Evidence]

_UNMET = "; tolerance not met"
_NOISE = 4.5  # standard errors of a paired difference that chance may explain
_CURVE_SIZES, _CURVE_DRAWS = (1, 4, 16, 64, 256), 512
_STREAM = 104 * 10**7  # apart from that of data simulated with the same small seed
_MAX_PAIRS = {"cpu": 2**11}  # particle rows that a program makes at once, or all k of one datum


class Rung(NamedTuple):
    """An estimator and its price.

    Attributes:
        name: What the result calls it.
        cost: Evaluations of the log joint per datum.
        estimate: ``(model, guide, x, seed=) -> Evidence``.
    """

    name: str
    cost: int
    estimate: Estimate


def pareto_limit(num_particles: int) -> float:
    """``min(1 - 1 / log10(S), 0.7)``: above it a mean of S weights cannot be trusted.

    Vehtari, Simpson, Gelman, Yao & Gabry (2024), JMLR 25.
    """
    return min(1 - 1 / math.log10(max(num_particles, 2)), 0.7)


def standard_ladder(num_particles: int = 1000) -> list[Rung]:
    """Importance sampling; PSIS at 8 times the draws; AIS at 100 and at 1,000 temperatures."""

    def plain(model: Any, guide: Any, x: Any, *, seed: int) -> Evidence:
        return importance(model, guide, x, num_particles, seed=seed)

    def smoothed(model: Any, guide: Any, x: Any, *, seed: int) -> Evidence:
        return importance(model, guide, x, 8 * num_particles, seed=seed, smooth=True)

    return [
        Rung("importance", num_particles, plain),
        Rung("psis", 8 * num_particles, smoothed),
        *(_annealed(temperatures) for temperatures in (100, 1000)),
    ]


def _annealed(num_temperatures: int, num_chains: int = 64, num_leapfrog: int = 5) -> Rung:
    def estimate(model: Any, guide: Any, x: Any, *, seed: int) -> Evidence:
        from pvae.evidence.annealing import annealed

        return annealed(
            model, guide, x, num_chains=num_chains, num_temperatures=num_temperatures,
            num_leapfrog=num_leapfrog, seed=seed,
        )  # fmt: skip

    cost = num_chains * num_temperatures * num_leapfrog
    return Rung(f"annealed, {num_temperatures} temperatures", cost, estimate)


def auto(
    model: Any,
    guide: Any,
    x: Any,
    *,
    tolerance: float = 0.1,
    budget: float | None = 20_000,
    num_particles: int = 1000,
    ladder: Sequence[Rung] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evidence:
    """Estimate each datum by the first estimator of a ladder that it can be trusted with.

    An estimate is accepted where its standard error is at most ``tolerance`` and its k-hat at most
    ``min(1 - 1/log10(S), 0.7)``. All other data go on to the next rung, each time on fresh draws,
    the worst first where the budget does not suffice for all. A datum that no rung serves keeps
    the estimate of smallest error among those with an acceptable k-hat, else the last one, and
    its method ends in ``"; tolerance not met"``.

    Args:
        model: The generative program.
        guide: The inference program.
        x: Data: an array, tensor, tuple or dict of them, N rows.
        tolerance: Largest standard error of a datum's log evidence, nats.
        budget: Evaluations of the log joint per datum, on average over the data; ``None`` for as
            many as it takes.
        num_particles: K of the first rung.
        ladder: Estimators from cheap to strong; :func:`standard_ladder` if ``None``.
        seed: Seed of the draws; rung r uses ``seed + r``.
        progress: Called with (rung, data done, data in all).

    Returns:
        An :class:`Evidence` whose ``methods`` names the estimator of each datum.

    Raises:
        OptionError: ``tolerance`` is not positive, the ladder is empty, or the budget does not pay
            for its first rung.
    """
    rungs = list(standard_ladder(num_particles) if ladder is None else ladder)
    if not tolerance > 0 or not rungs:
        raise OptionError(
            f"auto needs a positive tolerance in nats and at least one rung, got {tolerance} and "
            f"{len(rungs)} rungs"
        )
    batch = as_batch(x, model=model)
    total = num_rows(batch)
    if budget is not None and budget < rungs[0].cost:
        raise OptionError(
            f"a budget of {budget:g} evaluations per datum does not pay for {rungs[0].name} "
            f"({rungs[0].cost} each): raise the budget or lower num_particles"
        )
    left = math.inf if budget is None else budget * total
    state: _State | None = None
    for number, rung in enumerate(rungs):
        index = torch.arange(total) if state is None else state.unmet(tolerance)
        index = index[: int(min(len(index), left // rung.cost))]
        if len(index) == 0:
            break
        if progress is not None:
            progress(rung.name, total - len(index), total)
        found = rung.estimate(model, guide, take(batch, index), seed=seed + number)
        left -= rung.cost * len(index)
        if state is None:
            state = _State(found, [rung.name] * total, pareto_limit(found.num_particles))
        else:
            state.update(index, found, rung.name, tolerance)
    assert state is not None  # the budget pays for the first rung
    return state.result(tolerance)


class _State:
    """The best estimate of each datum so far, with the name of the rung it came from."""

    def __init__(self, first: Evidence, names: list[str], limit: float) -> None:
        self.evidence, self.names = first, names
        self.limits = torch.full((len(first),), limit)

    def trusted(self) -> Tensor:
        return self.evidence.pareto_k <= self.limits

    def unmet(self, tolerance: float) -> Tensor:
        """Data without an acceptable estimate, the worst first."""
        bad = ~(self.trusted() & (self.evidence.stderr <= tolerance))
        badness = torch.where(self.trusted(), self.evidence.stderr, math.inf)
        index = bad.nonzero().squeeze(-1)
        return index[badness[index].argsort(descending=True, stable=True)]

    def update(self, index: Tensor, found: Evidence, name: str, tolerance: float) -> None:
        limit = pareto_limit(found.num_particles)
        new, old = found.pareto_k <= limit, self.trusted()[index]
        smaller = found.stderr < self.evidence.stderr[index]
        taken = torch.where(new == old, smaller | ~new, new)
        columns = ("log_evidence", "stderr", "ess", "pareto_k", "elbo")
        changed = {column: getattr(self.evidence, column).clone() for column in columns}
        for column in columns:
            changed[column][index[taken]] = getattr(found, column)[taken]
        self.evidence = replace(self.evidence, **changed)
        self.limits[index[taken]] = limit
        for place in index[taken].tolist():
            self.names[place] = name

    def result(self, tolerance: float) -> Evidence:
        unmet = set(self.unmet(tolerance).tolist())
        methods = tuple(
            name + _UNMET if place in unmet else name for place, name in enumerate(self.names)
        )
        return replace(self.evidence, method="auto", methods=methods)


def escalation_report(evidence: Evidence) -> str:
    """Which estimator spoke for how many data, in words."""
    methods = list(evidence.methods or (evidence.method,) * len(evidence))
    lines = [f"{'estimator':<52}{'data':>6}{'mean SE':>10}"]
    for name in dict.fromkeys(sorted(methods, key=lambda each: each.endswith(_UNMET))):
        rows = torch.tensor([each == name for each in methods])
        lines.append(f"{name:<52}{int(rows.sum()):>6}{float(evidence.stderr[rows].mean()):>10.3f}")
    return "\n".join(lines)


# --- L_k as k grows ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """The importance-weighted bound ``L_k`` at growing k, mean over the data, nats.

    Attributes:
        sizes: k.
        bounds: ``L_k``.
        stderr: Its standard error over the draws.
        gains: ``L_k`` minus its predecessor, one fewer.
        gain_stderr: Their standard errors, paired by datum and, where shared, by draw.
    """

    sizes: tuple[int, ...]
    bounds: tuple[float, ...]
    stderr: tuple[float, ...]
    gains: tuple[float, ...]
    gain_stderr: tuple[float, ...]

    def __str__(self) -> str:
        lines = [f"{'k':>6}{'L_k':>12}{'SE':>9}"]
        lines += [
            f"{k:>6}{bound:>12.4f}{error:>9.4f}"
            for k, bound, error in zip(self.sizes, self.bounds, self.stderr, strict=True)
        ]
        return "\n".join(lines)


def log_evidence_curve(
    log_weights: Tensor, *, estimate: Callable[[Tensor], Tensor] = algebra.log_mean_exp
) -> Curve:
    """``L_k`` for k = 1, 2, 4, ... from one set of weights, by cutting it into groups of k.

    Args:
        log_weights: ``(K, B)``, nats; the largest k leaves at least two groups.
        estimate: ``(k, B) -> (B,)``, what is done with a group.

    Raises:
        NonFiniteError: ``L_k`` falls by more than 4.5 standard errors of the paired difference, or
            is not a number: a fault of the programs or of the estimator. Minus infinity is neither:
            some draws had a density of zero.
        OptionError: There are fewer than two weights.
    """
    total, num_data = log_weights.shape
    if total < 2:
        raise OptionError(f"a curve needs at least 2 particles, got {total}")
    sizes = [2**power for power in range(int(math.log2(total // 2)) + 1)]
    groups = []
    for size in sizes:
        count = total // sizes[-1] * (sizes[-1] // size)  # the same draws at every k
        cut = log_weights[: count * size].double().reshape(count, size, num_data)
        groups.append(estimate(cut.transpose(0, 1).reshape(size, -1)).reshape(count, num_data))
    differences = [
        large - small.reshape(len(large), 2, num_data).mean(1)
        for small, large in zip(groups, groups[1:], strict=False)
    ]
    return _curve(sizes, groups, differences)


def _num_runs(size: int, num_draws: int) -> int:
    return max(2, min(128, num_draws // size))


def curve_cost() -> int:
    """Draws per datum that :func:`measured_curve` takes at its default sizes."""
    return sum(size * _num_runs(size, _CURVE_DRAWS) for size in _CURVE_SIZES)


def measured_curve(
    model: Any,
    guide: Any,
    x: Any,
    *,
    sizes: Sequence[int] = _CURVE_SIZES,
    num_draws: int = _CURVE_DRAWS,
    seed: int = 0,
) -> Curve:
    """``L_k`` of a pair, every k on fresh draws and by a run of the programs with k particles.

    Args:
        model: The generative program.
        guide: The inference program.
        x: Data, N rows.
        sizes: k, growing.
        num_draws: Draws per datum at each k, cut into runs of k (2 to 128 of them).
        seed: Seed of the draws.

    Raises:
        NonFiniteError: As for :func:`log_evidence_curve`; a program that mixes its particles
            (a sum over the wrong dimension, batch normalisation) shows here.
        OptionError: The sizes do not grow from 1 or more.
    """
    sizes = list(sizes)
    if not sizes or sizes[0] < 1 or any(b <= a for a, b in zip(sizes, sizes[1:], strict=False)):
        raise OptionError(f"sizes must grow from 1 or more, got {sizes}")
    modules = [m for m in (module_of(model), module_of(guide)) if m is not None]
    device = next((p.device for m in modules for p in m.parameters()), torch.device("cpu"))
    batch = as_batch(x, device=device, model=model)
    total = num_rows(batch)
    groups: list[Tensor] = []
    with evaluation(model, guide, seed=_STREAM + seed, device=device):
        layout = inspect(model, guide, batch)
        for size in sizes:
            # All k of a datum in one run: cut up, a program that mixes them would pass.
            block = max(1, min(total, _MAX_PAIRS.get(device.type, 2**16) // size))
            runs = []
            for _ in range(_num_runs(size, num_draws)):
                parts = []
                for start in range(0, total, block):
                    index = torch.arange(start, min(start + block, total), device=device)
                    drawn = draw(model, guide, take(batch, index), size, layout=layout)
                    parts.append(algebra.log_mean_exp(drawn.log_weights.double()))
                runs.append(torch.cat(parts))
            groups.append(torch.stack(runs).cpu())
    differences = [
        (large.mean(0) - small.mean(0), small, large)
        for small, large in zip(groups, groups[1:], strict=False)
    ]
    return _curve(sizes, groups, differences)


def _curve(sizes: Sequence[int], groups: list[Tensor], differences: list[Any]) -> Curve:
    """Means over groups and data; the data are given, so the errors are those of the draws."""
    bounds = [float(group.mean()) for group in groups]
    errors = [_error(group) for group in groups]
    gains, gain_errors = [], []
    for difference in differences:
        if isinstance(difference, tuple):  # independent draws: their errors add up
            mean, small, large = difference
            gains.append(float(mean.mean()))
            gain_errors.append(math.hypot(_error(small), _error(large)))
        else:
            gains.append(float(difference.mean()))
            gain_errors.append(_error(difference))
    curve = Curve(tuple(sizes), tuple(bounds), tuple(errors), tuple(gains), tuple(gain_errors))
    _refuse_falls(curve)
    return curve


def _error(groups: Tensor) -> float:
    """SE of the mean over ``(G, B)``, the B data being given."""
    return float((groups.var(0) / len(groups)).sum().sqrt() / groups.shape[1])


def _refuse_falls(curve: Curve) -> None:
    for place, (gain, error) in enumerate(zip(curve.gains, curve.gain_stderr, strict=True)):
        small, large = curve.sizes[place], curve.sizes[place + 1]
        wrong = any(math.isnan(b) or b == math.inf for b in curve.bounds[place : place + 2])
        # A weight of zero makes a bound -inf and a gain NaN or infinite, which is no fault.
        if wrong or gain < -_NOISE * error - 1e-9 * abs(curve.bounds[place]):
            raise NonFiniteError(
                f"L_{large} is {-gain:.4g} nats below L_{small} (SE {error:.2g}), which no pair of "
                "programs allows: a program mixes its particles (a sum over the wrong dimension, "
                "batch normalisation), or the estimator is wrong"
            )
