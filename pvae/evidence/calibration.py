r"""Calibration: is ``q(z | x)`` the posterior of the model, over data that the model makes?

Simulate ``z*, x`` from the model, draw ``z_1 ... z_L`` from ``q(z | x)``: if q is the posterior,
the rank of ``z*`` among the draws is uniform on ``0 ... L`` in every coordinate and every function
of z and x (simulation-based calibration). Talts et al. (2018); Modrak et al. (2023) for the log
joint as such a function; Hermans et al. (2022) for expected coverage; Lemos et al. (2023) for the
distance to a random point (TARP).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.data import as_batch, num_rows, take
from pvae.errors import DataError, OptionError, ProgramError
from pvae.evidence.importance import evaluation
from pvae.particles import (
    Layout,
    Particles,
    by_datum,
    draw,
    inspect,
    log_guide,
    log_joint,
    module_of,
    simulate,
)

__all__ = [
    "Calibration",
    "PredictiveChecks",
    "calibration",
    "predictive_checks",
    "ranks_of",
    "uniformity",
]

Progress = Callable[[int, int], None]
Simulator = Callable[[Any], tuple[dict[str, Tensor], Any]]

_STREAM = 103 * 10**7  # apart from that of data simulated with the same small seed
_MAX_PAIRS = 2**14
_MASKED = (
    "site {!r} is masked out for some of the data, which have no truth to rank: take a template "
    "that has it everywhere or nowhere"
)
_DENSITY, _JOINT, _DISTANCE = "log q", "log joint", "distance to a random point"


# --- pure: arrays to ranks to p-values -----------------------------------------------------------


def ranks_of(truth: Tensor, draws: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """How many of the draws lie below the truth; ties are broken by a coin.

    Args:
        truth: ``(N, ...)``.
        draws: ``(L, N, ...)``.
        generator: Of the coins.

    Returns:
        ``(N, ...)`` whole numbers from 0 to L.
    """
    below, ties = (draws < truth).sum(0), (draws == truth).sum(0)
    coins = torch.rand(ties.shape, generator=generator, dtype=torch.float64).to(ties.device)
    return below + ((ties + 1) * coins).floor().long().minimum(ties)


def uniformity(ranks: Tensor, num_draws: int, num_bins: int = 20) -> tuple[Tensor, Tensor]:
    r"""p-values of ranks ``(N, Q)`` against the uniform distribution on ``0 ... num_draws``.

    Args:
        ranks: Whole numbers, ``(N, Q)``.
        num_draws: L; ``L + 1`` must be a multiple of ``num_bins``.
        num_bins: Bins of the chi-square test.

    Returns:
        Of the chi-square test with ``num_bins - 1`` degrees of freedom, and of the Kolmogorov-
        Smirnov test on ``(rank + u) / (L + 1)``, u uniform: each ``(Q,)``.

    Raises:
        OptionError: The bins would not be equally likely.
    """
    if num_bins < 2 or (num_draws + 1) % num_bins:
        raise OptionError(
            f"num_draws + 1 must be a multiple of num_bins for equal bins, got {num_draws} + 1 and "
            f"{num_bins}: take num_draws={num_bins * max(1, (num_draws + 1) // num_bins) - 1}"
        )
    number = len(ranks)
    bins = ranks * num_bins // (num_draws + 1)
    counts = torch.stack([(bins == k).sum(0) for k in range(num_bins)]).double()
    expected = number / num_bins
    statistic = ((counts - expected) ** 2 / expected).sum(0)
    degrees = torch.full_like(statistic, (num_bins - 1) / 2)
    chi_square = torch.special.gammaincc(degrees, statistic / 2)
    return chi_square, _kolmogorov(_positions(ranks, num_draws))


def _positions(ranks: Tensor, num_draws: int) -> Tensor:
    """``(rank + u) / (L + 1)``: exactly uniform on (0, 1) where the ranks are uniform."""
    generator = torch.Generator().manual_seed(20180618)
    jitter = torch.rand(ranks.shape, generator=generator, dtype=torch.float64)
    return (ranks.cpu() + jitter) / (num_draws + 1)


def _kolmogorov(positions: Tensor) -> Tensor:
    """p-value of the largest distance to the diagonal; Stephens' (1970) correction for finite N."""
    number = len(positions)
    ordered = positions.sort(0).values
    steps = torch.arange(number + 1, dtype=torch.float64)[:, None] / number
    distance = torch.maximum((steps[1:] - ordered).amax(0), (ordered - steps[:-1]).amax(0))
    scaled = (math.sqrt(number) + 0.12 + 0.11 / math.sqrt(number)) * distance
    k = torch.arange(1, 101, dtype=torch.float64)[:, None]
    series = 2 * ((-1) ** (k - 1) * torch.exp(-2 * k**2 * scaled**2)).sum(0)
    return torch.where(scaled < 0.3, 1.0, series.clamp(0, 1))


# --- the result ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """Ranks of N simulated truths among L draws of the guide, by quantity.

    Attributes:
        names: The quantities: ``site[j]`` for each latent coordinate, then ``log joint``,
            ``log q`` and the distance to a random point.
        ranks: ``(N, Q)``, from 0 to ``num_draws``.
        num_draws: L.
        num_bins: Bins of the chi-square test.
        alpha: False-alarm rate of each single test.
        corrected: Whether the draws were resampled by their importance weights.
    """

    names: tuple[str, ...]
    ranks: Tensor
    num_draws: int
    num_bins: int = 20
    alpha: float = 5e-4
    corrected: bool = False

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def p_values(self) -> tuple[Tensor, Tensor]:
        """Of the chi-square and of the Kolmogorov-Smirnov test, ``(Q,)`` each."""
        return uniformity(self.ranks, self.num_draws, self.num_bins)

    @property
    def false_alarm(self) -> float:
        """At most so likely is any rejection where the guide is exact: ``2 Q alpha``."""
        return min(1.0, 2 * len(self.names) * self.alpha)

    @property
    def rejected(self) -> tuple[str, ...]:
        """Quantities that fail either test at ``alpha``."""
        chi_square, kolmogorov = self.p_values
        failed = torch.minimum(chi_square, kolmogorov) < self.alpha
        return tuple(name for name, bad in zip(self.names, failed.tolist(), strict=True) if bad)

    def coverage(self, levels: Iterable[float] = (0.5, 0.8, 0.95)) -> Tensor:
        """How often the truth lies in the central interval of each level, ``(levels, Q)``.

        For ``log q`` and ``log joint`` it is the region of highest density instead: the expected
        coverage of Hermans et al. (2022). The standard error is ``sqrt(c (1 - c) / N)``.
        """
        position = _positions(self.ranks, self.num_draws)
        central = (position - 0.5).abs() * 2
        densest = 1 - position
        is_density = torch.tensor([name in (_DENSITY, _JOINT) for name in self.names])
        inside = torch.where(is_density, densest, central)
        return torch.stack([(inside <= level).double().mean(0) for level in levels])

    def rows(self) -> list[dict[str, Any]]:
        """One row per quantity: p-values, coverage, and what the ranks say in words."""
        chi_square, kolmogorov = self.p_values
        half, four_fifths, most = self.coverage((0.5, 0.8, 0.95))
        failed = self.rejected
        return [
            {
                "quantity": name,
                "chi_square_p": float(chi_square[q]),
                "ks_p": float(kolmogorov[q]),
                "coverage_50": float(half[q]),
                "coverage_80": float(four_fifths[q]),
                "coverage_95": float(most[q]),
                "verdict": self._in_words(q) if name in failed else "passes",
            }
            for q, name in enumerate(self.names)
        ]

    def _in_words(self, q: int) -> str:
        position = _positions(self.ranks, self.num_draws)[:, q]
        if self.names[q] in (_DENSITY, _JOINT, _DISTANCE):
            return "differs from the posterior"
        drift = (float(position.mean()) - 0.5) * math.sqrt(12 * len(self))
        spread = float(position.var()) * 12 - 1
        words = []
        if abs(drift) > 3.5:
            words.append("biased low" if drift > 0 else "biased high")
        if abs(spread) * math.sqrt(len(self) / 0.8) > 3.5:
            words.append("too narrow" if spread > 0 else "too wide")
        return " and ".join(words) or "of another shape than the posterior"

    def report(self) -> str:
        """The table, and a sentence on what was rejected at which false-alarm rate."""
        lines = [
            f"{'quantity':<28}{'chi-square p':>13}{'KS p':>9}{'50 %':>8}{'80 %':>8}"
            f"{'95 %':>8}  ranks"
        ]
        for row in self.rows():
            lines.append(
                f"{row['quantity']:<28}{row['chi_square_p']:>13.2g}{row['ks_p']:>9.2g}"
                f"{100 * row['coverage_50']:>7.1f} {100 * row['coverage_80']:>7.1f} "
                f"{100 * row['coverage_95']:>7.1f}   {row['verdict']}"
            )
        kind = "importance-corrected draws" if self.corrected else "draws of the guide"
        found = len(self.rejected)
        verdict = (
            f"{found} of {len(self.names)} quantities are rejected"
            if found
            else "no quantity is rejected"
        )
        lines.append(
            f"{len(self)} simulated data, {self.num_draws} {kind}: {verdict}, each test at "
            f"{self.alpha:g}; an exact posterior is rejected with probability at most "
            f"{self.false_alarm:.2g}."
        )
        if found and not self.corrected:
            lines.append(
                "An amortised guide of a simple family is seldom exact: see whether "
                "importance=… (resampling by weights) passes, which is what evidence rests on."
            )
        return "\n".join(lines)

    __str__ = report


# --- from a pair ---------------------------------------------------------------------------------


def calibration(
    model: Any,
    guide: Any,
    x: Any,
    *,
    num_runs: int = 2000,
    num_draws: int = 99,
    num_bins: int = 20,
    alpha: float = 5e-4,
    importance: int | None = None,
    simulator: Simulator | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Simulation-based calibration of an amortised guide: one forward pass per simulated datum.

    Blocks of data are simulated, weighed and forgotten: only the ranks are kept.

    Args:
        model: The generative program.
        guide: The inference program.
        x: A template: data in the form that the programs take. What the model observes of it is
            replaced by what it draws; the rest (labels, lengths) is used row after row.
        num_runs: N, simulated data.
        num_draws: L, draws per datum.
        num_bins: Bins of the chi-square test; must divide ``num_draws + 1``.
        alpha: False-alarm rate of each test.
        importance: Draw so many particles and resample ``num_draws`` of them by their weights:
            the posterior that importance sampling stands for, instead of the bare guide.
        simulator: ``template rows -> (latent site -> values (B, ...), batch)``, for models that
            Pyro cannot run forward (autoregressive decoders); see ``pvae.particles.simulate``.
        seed: Seed of everything random; the caller's stream is untouched.
        progress: Called with (runs done, ``num_runs``).

    Raises:
        OptionError: A number is out of range.
        ProgramError: The programs do not fit each other, the model cannot be simulated, or a latent
            site is masked out for some of the data.
    """
    uniformity(torch.zeros(1, 1, dtype=torch.long), num_draws, num_bins)
    if num_runs < 2 or not 0 < alpha < 1 or (importance is not None and importance < num_draws):
        raise OptionError(
            f"num_runs must be at least 2, alpha between 0 and 1 and importance at least "
            f"num_draws, got {num_runs}, {alpha} and {importance}"
        )
    device = _device(model, guide)
    template = as_batch(x, device=device)
    particles = importance or num_draws
    block = max(2, min(num_runs, _MAX_PAIRS // particles))
    ranks: list[Tensor] = []
    names: tuple[str, ...] = ()
    make = simulator or (lambda rows: simulate(model, rows, check=not ranks))
    with evaluation(model, guide, seed=_STREAM + seed, device=device):
        layout = inspect(model, guide, _cycled(template, 0, block))
        if layout.globals:
            raise ProgramError(
                f"site {layout.globals[0]!r} is shared by all data: calibration of an amortised "
                "guide needs latents inside the data plate"
            )
        done = 0
        while done < num_runs:
            size = max(2, min(block, num_runs - done))
            truth, rows = make(_cycled(template, done, size))
            before = names
            names, block_ranks = _ranks(
                model, guide, rows, truth, layout, particles, num_draws, importance is not None
            )
            if ranks and names != before:
                raise ProgramError(_MASKED.format(next(iter({*names} ^ {*before}))))
            ranks.append(block_ranks.cpu())
            done += size
            if progress is not None:
                progress(min(done, num_runs), num_runs)
    return Calibration(
        names, torch.cat(ranks)[:num_runs], num_draws, num_bins, alpha, importance is not None
    )


def _device(model: Any, guide: Any) -> torch.device:
    modules = [m for m in (module_of(model), module_of(guide)) if m is not None]
    return next((p.device for m in modules for p in m.parameters()), torch.device("cpu"))


def _cycled(template: Any, start: int, size: int) -> Any:
    """``size`` rows of the template from ``start`` on, from the first again after the last."""
    first = template
    while not isinstance(first, Tensor):
        first = next(iter(first.values() if isinstance(first, Mapping) else first))
    index = torch.arange(start, start + size, device=first.device)
    return take(template, index % num_rows(template))


def _ranks(
    model: Any,
    guide: Any,
    rows: Any,
    truth: Mapping[str, Tensor],
    layout: Layout,
    particles: int,
    num_draws: int,
    resample: bool,  # noqa: FBT001
) -> tuple[tuple[str, ...], Tensor]:
    """Ranks ``(B, Q)`` of one block, and the names of its quantities."""
    drawn = draw(model, guide, rows, particles, layout=layout)
    latents = _present(drawn, layout)
    missing = [name for name in layout.latents if name not in truth]
    if missing:
        raise ProgramError(
            f"the simulator gives no values of site {missing[0]!r}: return every latent site"
        )
    true_values = {n: _as_particle(truth[n], layout, n) for n in layout.latents}
    names: list[str] = []
    ours, theirs = [], []
    for name in latents:
        values = by_datum(drawn.values[name], layout, name).double()
        values = values.reshape(*values.shape[:2], -1)
        true = by_datum(true_values[name], layout, name).double()
        ours.append(true.reshape(1, true.shape[1], -1))
        theirs.append(values)
        width = values.shape[2]
        names += [name] if width == 1 else [f"{name}[{j}]" for j in range(width)]
    coordinates, true_coordinates = torch.cat(theirs, 2), torch.cat(ours, 2)
    scale = coordinates.std((0, 1)).clamp(min=1e-12)
    reference = true_coordinates.roll(1, 1)  # another run's truth: it knows nothing of this one's
    log_q = sum(drawn.log_q.values())
    joint = drawn.log_weights + log_q
    true_joint = log_joint(model, rows, true_values, 1, layout)
    columns = [
        coordinates,
        joint[..., None].double(),
        _density(log_q, resample),
        (((coordinates - reference) / scale).square().sum(2, keepdim=True)).sqrt(),
    ]
    true_columns = [
        true_coordinates,
        true_joint[..., None].double(),
        _density(log_guide(guide, rows, true_values, 1, layout), resample),
        (((true_coordinates - reference) / scale).square().sum(2, keepdim=True)).sqrt(),
    ]
    values = torch.cat([c for c in columns if c is not None], 2)
    true_all = torch.cat([c for c in true_columns if c is not None], 2)[0]
    if resample:
        chosen = torch.multinomial(drawn.log_weights.double().softmax(0).T, num_draws, True).T
        values = values.gather(0, chosen[..., None].expand(-1, -1, values.shape[2]))
    names += [_JOINT, *([] if resample else [_DENSITY]), _DISTANCE]
    return tuple(names), ranks_of(true_all, values)


def _present(drawn: Particles, layout: Layout) -> list[str]:
    """The latent sites without those that are masked out for all data."""
    found = []
    for name in layout.latents:
        absent = ((drawn.log_p[name] == 0) & (drawn.log_q[name] == 0)).all(0)
        if not bool(absent.any()):
            found.append(name)
        elif not bool(absent.all()):
            raise ProgramError(_MASKED.format(name))
    return found


def _density(log_q: Any, resample: bool) -> Tensor | None:  # noqa: FBT001
    """``log q`` as a quantity ``(K, B, 1)``; resampled draws have the log joint for a density."""
    return None if resample else log_q[..., None].double()


def _as_particle(value: Tensor, layout: Layout, name: str) -> Tensor:
    """``(B, ...)`` to ``(1, ..., B, ...)``, the one particle leftmost."""
    batch_dims = value.dim() - layout.event_dims[name]
    return value.reshape((1,) * (-layout.particle_dim - batch_dims) + value.shape)


# --- posterior-predictive checks -----------------------------------------------------------------


@dataclass(frozen=True)
class PredictiveChecks:
    """Statistics of the data beside those of replicated data.

    Attributes:
        observed: Statistic -> its value on the data.
        replicated: Statistic -> its values on R replicated data sets, ``(R,)``.
        num_data: N.
        posterior: Whether latents came from the guide given each datum, or from the prior.
    """

    observed: Mapping[str, float]
    replicated: Mapping[str, Tensor]
    num_data: int
    posterior: bool

    @property
    def p_values(self) -> dict[str, float]:
        """Two-sided: ``min(1, 2 min(P(T_rep >= T), P(T_rep <= T)))``, counting the data once."""
        found = {}
        for name, value in self.observed.items():
            made = self.replicated[name]
            above = (1 + int((made >= value).sum())) / (1 + len(made))
            below = (1 + int((made <= value).sum())) / (1 + len(made))
            found[name] = min(1.0, 2 * min(above, below))
        return found

    def rows(self) -> list[dict[str, Any]]:
        """One row per statistic."""
        return [
            {
                "statistic": name,
                "observed": value,
                "replicated": float(self.replicated[name].mean()),
                "spread": float(self.replicated[name].std()),
                "p": self.p_values[name],
            }
            for name, value in self.observed.items()
        ]

    def report(self) -> str:
        """A table."""
        source = "posterior" if self.posterior else "prior"
        lines = [f"{'statistic':<24}{'data':>12}{'replicated':>12}{'sd':>10}{'p':>8}"]
        for row in self.rows():
            lines.append(
                f"{row['statistic']:<24}{row['observed']:>12.4g}{row['replicated']:>12.4g}"
                f"{row['spread']:>10.2g}{row['p']:>8.2g}"
            )
        count = len(next(iter(self.replicated.values())))
        lines.append(
            f"{source} predictive, {self.num_data} data, {count} replicates; p is two-sided and at "
            f"least {2 / (count + 1):.2g}"
        )
        return "\n".join(lines)

    __str__ = report


def predictive_checks(
    model: Any,
    x: Any,
    statistics: Mapping[str, Callable[[Any], Any]],
    *,
    guide: Any = None,
    num_replicates: int = 199,
    simulator: Simulator | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> PredictiveChecks:
    """Compare functions of the data with the same functions of data that the model makes.

    With a guide, each replicate of datum n is drawn given ``z ~ q(z | x_n)`` (posterior
    predictive): the data are used twice, so p-values are drawn to the middle and a small one says
    the more. Without, latents come from the prior (prior predictive).

    Args:
        model: The generative program.
        x: Data, N rows.
        statistics: Name -> function of data of the form of ``x`` that returns one number.
        guide: The inference program, for the posterior predictive.
        num_replicates: R, replicated data sets.
        simulator: As in :func:`calibration`.
        seed: Seed of everything random; the caller's stream is untouched.
        progress: Called with (replicates done, R).

    Raises:
        OptionError: There is no statistic, or R is below 19.
        DataError: A statistic is not one finite number.
    """
    if not statistics or num_replicates < 19:
        raise OptionError(
            f"give at least one statistic and 19 replicates, got {len(statistics)} and "
            f"{num_replicates}"
        )
    device = _device(model, guide)
    batch = as_batch(x, device=device)
    observed = {name: _one_number(name, f(batch)) for name, f in statistics.items()}
    made: dict[str, list[float]] = {name: [] for name in statistics}
    make = simulator or (
        lambda rows: simulate(model, rows, guide=guide, check=not made[next(iter(made))])
    )
    with evaluation(model, guide, seed=_STREAM + seed, device=device):
        for replicate in range(num_replicates):
            _, rows = make(batch)
            for name, function in statistics.items():
                made[name].append(_one_number(name, function(rows)))
            if progress is not None:
                progress(replicate + 1, num_replicates)
    return PredictiveChecks(
        observed,
        {name: torch.tensor(values, dtype=torch.float64) for name, values in made.items()},
        num_rows(batch),
        guide is not None,
    )


def _one_number(name: str, value: Any) -> float:
    tensor = torch.as_tensor(value)
    if tensor.numel() != 1 or not bool(tensor.isfinite().all()):
        came = f"shape {tuple(tensor.shape)}" if tensor.numel() != 1 else f"{tensor.item()}"
        raise DataError(
            f"statistic {name!r} must return one finite number for a data set, got {came}"
        )
    return float(tensor)
