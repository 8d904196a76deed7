"""Mixture of products of Bernoullis by EM: the classical density of binary images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.baselines import Density, as_sizes, at_least, non_negative
from pvae.errors import DataError, OptionError, PvaeError

__all__ = ["BernoulliMixture"]

_MIN_MEAN = 1e-3  # means stay in [1e-3, 1 - 1e-3], so that no bit is impossible
_BLOCK_ENTRIES = 2**21  # of the (rows, K) matrices held at a time


class BernoulliMixture(Density):
    r"""``p(x) = sum_k pi_k prod_d mu_kd^x_d (1 - mu_kd)^(1 - x_d)`` for rows of 0s and 1s.

    EM on the log-likelihood plus the log prior ``sum_kd s (m_d log mu_kd + (1 - m_d) log(1 -
    mu_kd))``, m the global mean and s ``smoothing``. Its M-step adds s pseudo-images of mean m to
    every component and clamps to [1e-3, 1 - 1e-3]; as the expected objective is concave in each
    mean, that is its exact maximum on the interval and every step must raise the objective, which
    is checked. Components start at ``.5 x_i + .25`` of random training rows. One component is the
    product of independent bits.

    float32 rows are multiplied in float32; sums over components and rows are in float64.

    Args:
        n_components: K, or several to choose from by the mean log density of ``valid``.
        smoothing: s, in pseudo-images per component.
        restarts: Number of starts; the best objective is kept.
        max_iterations: Most EM steps of a start.
        tolerance: Stop at a smaller gain of the objective, nats per datum.
        seed: Of the starts.
        progress: Called as ``progress(iteration, objective)`` from iteration 0, the start.

    Attributes:
        weights: pi, ``(K,)`` float64.
        means: mu, ``(K, D)`` float64.
        history: The objective at each iteration, nats per datum.

    Raises:
        OptionError: An option out of its range.
    """

    name = "bernoulli-mixture"

    weights: Tensor
    means: Tensor
    history: list[float]

    def __init__(
        self,
        n_components: int | Sequence[int] = 10,
        *,
        smoothing: float = 1.0,
        restarts: int = 1,
        max_iterations: int = 100,
        tolerance: float = 1e-3,
        seed: int = 0,
        progress: Callable[[int, float], None] | None = None,
    ) -> None:
        as_sizes(n_components)
        self.n_components = n_components
        self.smoothing = non_negative("smoothing", smoothing)
        self.restarts = at_least("restarts", restarts, 1)
        self.max_iterations = at_least("max_iterations", max_iterations, 1)
        self.tolerance = non_negative("tolerance", tolerance)
        self.seed = seed
        self.progress = progress

    @property
    def num_parameters(self) -> int:
        """``K D`` means and ``K - 1`` weights."""
        width = self._fitted_shape()[1]
        size: int = self.chosen
        return size * (width + 1) - 1

    @property
    def objective(self) -> float:
        """Log-likelihood plus log prior at the parameters kept, nats per training datum."""
        self._fitted_shape()
        return self.history[-1]

    def _check_support(self, x: Tensor, role: str) -> None:
        bits = (x == 0) | (x == 1)
        if not bits.all():
            row, feature = (~bits).nonzero()[0].tolist()
            value = x[row, feature].item()
            raise DataError(
                f"BernoulliMixture takes 0s and 1s, got {value:g} in row {row}, feature {feature} "
                f"of {role}: binarize the data first"
            )

    def _estimate(self, x: Tensor, value: int) -> None:
        if value > len(x):
            raise OptionError(
                f"BernoulliMixture(n_components={value}) starts from {value} distinct rows, "
                f"got {len(x)}: lower n_components or pass more rows"
            )
        generator = torch.Generator().manual_seed(self.seed)
        starts = [torch.randperm(len(x), generator=generator)[:value] for _ in range(self.restarts)]
        best: _Run | None = None
        for rows in starts:
            run = self._run(x, 0.5 * x[rows.to(x.device)].double() + 0.25)
            if best is None or run.history[-1] > best.history[-1]:
                best = run
        assert best is not None
        vars(self).update(vars(best))

    def _run(self, x: Tensor, means: Tensor) -> _Run:
        prior = self.smoothing * x.mean(0, dtype=torch.float64)
        weights = means.new_full((len(means),), 1 / len(means))
        expected = self._expect(x, weights, means, prior)
        history = [self._report(0, expected.objective)]
        for iteration in range(1, self.max_iterations + 1):
            before, old_means = expected, means
            weights, means = _m_step(before)
            expected = self._expect(x, weights, means, prior)
            gain = expected.objective - before.objective
            if not gain >= -_rounding(x, before.objective):
                raise PvaeError(_fall(iteration, gain, before, old_means, means))
            history.append(self._report(iteration, expected.objective))
            if gain <= self.tolerance:
                break
        return _Run(weights, means, history, converged=gain <= self.tolerance)

    def _expect(self, x: Tensor, weights: Tensor, means: Tensor, prior: Tensor) -> _Expected:
        counts, ones, log_likelihood = _e_step(x, weights, means)
        log_prior = _log_bits(torch.full_like(counts, self.smoothing), prior, means).sum()
        objective = float(log_likelihood + log_prior) / len(x)
        return _Expected(counts, counts + self.smoothing, ones + prior, objective)

    def _report(self, iteration: int, objective: float) -> float:
        if self.progress is not None:
            self.progress(iteration, objective)
        return objective

    def _log_density(self, x: Tensor) -> Tensor:
        slope, bias = _linear(x, self.weights, self.means)
        blocks = torch.split(x, _block_rows(len(bias)))
        return torch.cat([_posterior(block, slope, bias)[0] for block in blocks])

    def _draw(self, n: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.multinomial(self.weights.cpu(), n, replacement=True, generator=generator)
        return torch.bernoulli(self.means.cpu()[chosen], generator=generator)


@dataclass(frozen=True)
class _Run:
    """Where one start ended: what ``BernoulliMixture`` keeps of the best."""

    weights: Tensor
    means: Tensor
    history: list[float]
    converged: bool


@dataclass(frozen=True)
class _Expected:
    """What an M-step needs: expected rows, and bits with the pseudo-images, per component."""

    counts: Tensor  # (K,)
    mass: Tensor  # (K,), counts + smoothing
    ones: Tensor  # (K, D), bits that are 1 among mass rows
    objective: float  # nats per datum


def _m_step(expected: _Expected) -> tuple[Tensor, Tensor]:
    """The weights ``(K,)`` and means ``(K, D)`` that maximise the expected objective."""
    # Without smoothing an empty component has no mass: its means are then arbitrary.
    mass = expected.mass.clamp(min=torch.finfo(torch.float64).tiny)
    means = (expected.ones / mass[:, None]).clamp(_MIN_MEAN, 1 - _MIN_MEAN)
    return expected.counts / expected.counts.sum(), means


def _e_step(x: Tensor, weights: Tensor, means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Expected rows ``(K,)`` and ones ``(K, D)`` per component, and the total log-likelihood."""
    counts, ones = torch.zeros_like(weights), torch.zeros_like(means)
    log_likelihood = weights.new_zeros(())
    slope, bias = _linear(x, weights, means)
    for block in torch.split(x, _block_rows(len(weights))):
        log_density, posterior = _posterior(block, slope, bias)
        counts += posterior.sum(0, dtype=torch.float64)
        ones += posterior.T @ block
        log_likelihood += log_density.sum()
    return counts, ones, log_likelihood


def _linear(x: Tensor, weights: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Slope ``(K, D)`` and bias ``(K,)`` with ``log p(x, k) = slope_k x + bias_k``, as ``x`` is."""
    off = torch.log1p(-means)
    return (means.log() - off).to(x), (weights.log() + off.sum(1)).to(x)


def _posterior(x: Tensor, slope: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """``log p(x)``, ``(B,)`` float64, and ``p(k | x)``, ``(B, K)``."""
    log_joint = torch.addmm(bias, x, slope.T)
    top = log_joint.amax(1, keepdim=True)
    ratio = (log_joint - top).exp_()
    total = ratio.sum(1, keepdim=True, dtype=torch.float64)
    return (top + total.log()).squeeze(1), ratio.div_(total.to(ratio))


def _log_bits(mass: Tensor, ones: Tensor, means: Tensor) -> Tensor:
    """``sum_d ones_kd log mu_kd + (mass_k - ones_kd) log(1 - mu_kd)``: ``(K,)``, nats."""
    return (ones * means.log() + (mass[:, None] - ones) * torch.log1p(-means)).sum(1)


def _block_rows(num_components: int) -> int:
    return max(1, _BLOCK_ENTRIES // num_components)


def _rounding(x: Tensor, objective: float) -> float:
    """The most that rounding in the dtype of ``x`` may move the objective, nats per datum."""
    return 8 * torch.finfo(x.dtype).eps * (abs(objective) + x.shape[1])


def _fall(iteration: int, gain: float, before: _Expected, old: Tensor, new: Tensor) -> str:
    change = _log_bits(before.mass, before.ones, new) - _log_bits(before.mass, before.ones, old)
    return (
        f"EM must not lower its objective, but it changed by {gain:.3g} nats per datum at "
        f"iteration {iteration}, most in component {int(change.argmin())}: fit float64 rows, and "
        f"report a fault if that falls too"
    )
