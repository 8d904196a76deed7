r"""Annealed importance sampling: a log evidence that does not hang on how good the guide is.

Neal (2001), Annealed importance sampling; Wu, Burda, Salakhutdinov & Grosse (2017), On the
quantitative analysis of decoder-based generative models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pvae import log_weights as algebra
from pvae.data import as_batch, num_rows, take
from pvae.errors import NonFiniteError, OptionError, did_you_mean
from pvae.evidence.hamiltonian import Evaluate, Steps, move, tune
from pvae.evidence.importance import Evidence, evaluation
from pvae.evidence.paths import Path, Point
from pvae.particles import (
    Layout,
    check_continuous,
    inspect,
    module_of,
    prior_of,
    sample_guide,
    unconstrain,
)

__all__ = ["Annealer", "annealed", "geometric", "linear", "run", "sigmoidal"]

Progress = Callable[[int, int], None]
Schedule = str | Sequence[float] | Tensor | Callable[[int], Tensor]
Resample = Callable[[Tensor, Point], tuple[Tensor, Point]]

_PILOTS = 16  # chains of each datum by which steps and schedule are found
_MAX_PAIRS = {"cpu": 2**9}  # a decoder's activations for these stay in the processor's cache


def annealed(
    model: Any,
    guide: Any,
    x: Any,
    *,
    num_chains: int = 32,
    num_temperatures: int = 1000,
    schedule: Schedule = "adaptive",
    num_leapfrog: int = 10,
    start: str = "guide",
    target_acceptance: float = 0.65,
    max_pairs: int | None = None,
    compiled: bool = False,
    seed: int = 0,
    data_plate: str | None = None,
    vectorize: bool = True,
    progress: Progress | None = None,
) -> Evidence:
    r"""Estimate ``log p(x_n)`` by chains that are annealed from the guide to the posterior.

    With ``0 = beta_0 < ... < beta_T = 1`` and ``f_beta = q(z|x)^(1 - beta) p(x, z)^beta``, a chain
    starts at ``z_0 ~ q``, makes one Hamiltonian move that leaves ``f_beta_t`` invariant at each
    ``t = 1 ... T - 1``, and weighs

        ``log w = sum_t (beta_t - beta_(t-1)) (log p(x, z_(t-1)) - log q(z_(t-1) | x))``.

    ``E[w] = p(x)`` whatever the number of temperatures and however badly the moves mix; more of
    both make its variance smaller. The log of the mean over chains is therefore, in expectation,
    a lower bound that rises to ``log p(x)``. All latent sites of a datum move together as one
    vector of free real numbers, each through the bijection onto its support. Step sizes and, where
    asked for, the schedule are found for each datum on pilot chains of their own, then frozen.

    Args:
        model: The generative program; its latent sites are continuous and local to a datum.
        guide: The inference program; may be ``None`` with ``start="prior"``.
        x: Data: an array, tensor, tuple or dict of them, N rows.
        num_chains: K, independent chains for each datum; k-hat needs more than 20 of them.
        num_temperatures: T, steps from ``beta = 0`` to ``beta = 1``.
        schedule: Where the temperatures lie: ``"adaptive"`` (each datum's own, spaced so that every
            step adds the same variance to a log weight), ``"sigmoidal"``, ``"geometric"``,
            ``"linear"``, a function ``T -> (T + 1,)``, or the T + 1 temperatures themselves.
        num_leapfrog: Leapfrog steps of a move.
        start: ``"guide"`` or ``"prior"``: the density that the path starts from.
        target_acceptance: Mean acceptance that the step sizes are adapted to.
        max_pairs: Cap on chains x data held at once; 512 on a CPU, 262144 on another device, if
            left out.
        compiled: Compile the traced densities: some seconds first, then about half the time for a
            decoder of the usual size. It needs a C++ compiler.
        seed: Seed of the draws; the caller's random stream is untouched.
        data_plate: Name of the plate that indexes the data, where several could.
        vectorize: Run chains at once.
        progress: Called with (data done, N).

    Returns:
        An :class:`Evidence` of N data, its ``num_particles`` the number of chains and its ``elbo``
        the mean log weight.

    Raises:
        OptionError: A number, a schedule or a start that cannot be.
        ProgramError: The programs do not fit each other; a latent site is discrete, or shared by
            all data; or the guide covers a part of the model's support only.
        NonFiniteError: A log weight came out as NaN.
    """
    at_least_one(num_chains=num_chains)
    annealer = Annealer(
        model, guide, num_temperatures=num_temperatures, schedule=schedule,
        num_leapfrog=num_leapfrog, start=start, target_acceptance=target_acceptance,
        max_pairs=max_pairs, compiled=compiled, data_plate=data_plate, vectorize=vectorize,
    )  # fmt: skip

    def weigh(rows: Any) -> Evidence:
        ladder = annealer.ladder(rows)
        return evidence_of(
            annealer.forward(rows, ladder, num_chains), "annealed importance sampling"
        )

    return annealer.over(x, weigh, seed=seed, progress=progress)


# --- schedules ----------------------------------------------------------------------------------


def linear(num_temperatures: int) -> Tensor:
    """``beta_t = t / T``: ``(T + 1,)``."""
    return torch.linspace(0, 1, num_temperatures + 1, dtype=torch.float64)


def sigmoidal(num_temperatures: int, delta: float = 4.0) -> Tensor:
    """``sigmoid(delta (2t/T - 1))``, rescaled to run from 0 to 1: ``(T + 1,)``.

    It is dense at both ends, where a path from a prior to a posterior changes fastest (Grosse,
    Ghahramani & Adams 2015).
    """
    raw = torch.sigmoid(delta * (2 * linear(num_temperatures) - 1))
    return (raw - raw[0]) / (raw[-1] - raw[0])


def geometric(num_temperatures: int, first: float = 1e-3) -> Tensor:
    """0, then ``first`` to 1 in equal ratios: ``(T + 1,)``; dense at the start of the path."""
    rising = torch.logspace(math.log10(first), 0, num_temperatures, dtype=torch.float64)
    return torch.cat([rising.new_zeros(1), rising])


_SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "geometric": geometric,
    "linear": linear,
    "sigmoidal": sigmoidal,
}


def even_speed(steps: Steps, num_temperatures: int) -> Tensor:
    """Temperatures between which a log weight gains equal variance, for each datum: ``(T + 1, B)``.

    A step of ``beta`` adds ``(d beta)^2 Var(log f_1 - log f_0)`` to the variance of a log weight,
    which is one over its conditional effective sample size, less one. Equal steps of
    ``integral sd d beta``, found on the pilot chains, share it out evenly; a twentieth of the
    temperatures is spread linearly. Syed et al. (2024), Optimised annealed sequential Monte Carlo.
    """
    betas = steps.betas
    speed = torch.nan_to_num(steps.speed, posinf=0.0)
    passed = torch.cat(
        [betas.new_zeros(1, betas.shape[1]), (betas.diff(dim=0) * (speed[1:] + speed[:-1]) / 2)]
    ).cumsum(0)
    share = passed / passed[-1].clamp(min=1e-300)
    share = torch.where(passed[-1] > 0, 0.95 * share + 0.05 * betas, betas)
    wanted = linear(num_temperatures).to(betas.device)[:, None].expand(-1, betas.shape[1])
    above = torch.searchsorted(share.T.contiguous(), wanted.T.contiguous()).T
    above = above.clamp(min=1, max=len(betas) - 1)
    low, high = share.gather(0, above - 1), share.gather(0, above)
    part = ((wanted - low) / (high - low)).clamp(0, 1)
    found = torch.lerp(betas.gather(0, above - 1), betas.gather(0, above), part)
    found[0], found[-1] = 0, 1
    return found


def _fixed_schedule(schedule: Schedule, num_temperatures: int) -> Tensor | None:
    """The temperatures ``(T + 1,)`` asked for; ``None`` where each datum gets its own."""
    if isinstance(schedule, str):
        if schedule == "adaptive":
            return None
        if schedule not in _SCHEDULES:
            hint = did_you_mean(schedule, [*_SCHEDULES, "adaptive"])
            raise OptionError(f"no schedule is called {schedule!r}: {hint}")
        return _SCHEDULES[schedule](num_temperatures)
    given = schedule(num_temperatures) if callable(schedule) else schedule
    betas = torch.as_tensor(given, dtype=torch.float64)
    rises = betas.dim() == 1 and len(betas) > 2 and bool((betas.diff() > 0).all())
    if not rises or float(betas[0]) != 0 or float(betas[-1]) != 1:
        raise OptionError(
            f"a schedule rises from 0 to 1 over at least three temperatures, got {given!r}: try "
            "schedule='sigmoidal'"
        )
    return betas


# --- the chains ---------------------------------------------------------------------------------


def run(
    evaluate: Evaluate,
    point: Point,
    betas: Tensor,
    steps: Steps,
    num_leapfrog: int,
    resample: Resample | None = None,
) -> Tensor:
    """Carry chains along a schedule, up or down: their log weights ``(K, B)``, float64, nats.

    Args:
        evaluate: ``u -> Point``.
        point: Draws from the density at ``betas[0]``.
        betas: ``(T + 1, B)``; a schedule that falls from 1 to 0 gives the reverse chain.
        steps: Frozen step sizes.
        num_leapfrog: Leapfrog steps of a move.
        resample: ``(log weights, points) -> (log weights, points)``, before each move.
    """
    log_weights = torch.zeros_like(point.log_f0, dtype=torch.float64)
    last = len(betas) - 1
    for index in range(1, last + 1):
        beta = betas[index]
        log_weights = log_weights + (beta - betas[index - 1]) * point.log_ratio
        if index == last:
            break
        if resample is not None:
            log_weights, point = resample(log_weights, point)
        at = beta.to(point.flat.dtype)
        point, _ = move(evaluate, point, at, steps.at(beta), num_leapfrog)
    return log_weights


@dataclass(frozen=True)
class Ladder:
    """What the pilot chains of one block of data settled: temperatures and step sizes."""

    evaluate: Evaluate
    betas: Tensor
    steps: Steps


@dataclass
class Annealer:
    """A pair and its path, and how it is walked; what the annealed estimators share.

    The arguments are those of :func:`annealed`.
    """

    model: Any
    guide: Any
    num_temperatures: int = 1000
    schedule: Schedule = "adaptive"
    num_leapfrog: int = 10
    start: str = "guide"
    target_acceptance: float = 0.65
    max_pairs: int | None = None
    compiled: bool = False
    data_plate: str | None = None
    vectorize: bool = True
    fixed: Tensor | None = field(init=False)
    layout: Layout = field(init=False)
    path: Path = field(init=False)

    def __post_init__(self) -> None:
        if self.start not in ("guide", "prior"):
            raise OptionError(f"start is 'guide' or 'prior', got {self.start!r}")
        if self.guide is None and self.start == "guide":
            raise OptionError("start='guide' needs a guide, got None: pass one, or start='prior'")
        if self.num_temperatures < 2:
            raise OptionError(
                f"num_temperatures must be at least 2, got {self.num_temperatures}: one step from "
                "guide to posterior is importance sampling, evidence.importance"
            )
        at_least_one(num_leapfrog=self.num_leapfrog)
        if self.max_pairs is not None:
            at_least_one(max_pairs=self.max_pairs)
        if not 0 < self.target_acceptance < 1:
            raise OptionError(
                f"target_acceptance lies between 0 and 1, got {self.target_acceptance}: 0.65 is "
                "usual"
            )
        self.fixed = _fixed_schedule(self.schedule, self.num_temperatures)
        if self.start == "prior" and self.guide is None:
            self.guide = prior_of(self.model)

    @property
    def source(self) -> Any:
        """The program whose density the path starts from."""
        return self.guide if self.start == "guide" else prior_of(self.model)

    @property
    def device(self) -> torch.device:
        """Where the pair's parameters lie."""
        return device_of(self.model, self.guide)

    @property
    def cap(self) -> int:
        """Chains x data held at once."""
        return self.max_pairs or cap_on(self.device)

    def over(
        self,
        x: Any,
        weigh: Callable[[Any], Evidence],
        *,
        seed: int,
        unit: int = 1,
        progress: Progress | None = None,
    ) -> Evidence:
        """Evidence of all data, a block after another, under one seed."""
        batch = as_batch(x, device=self.device, model=self.model)
        with evaluation(self.model, self.guide, seed=seed, device=self.device):
            size = self.look(batch, unit)
            pieces = [weigh(rows) for rows in blocks(batch, size, progress)]
        return joined(pieces)

    def look(self, batch: Any, unit: int = 1) -> int:
        """Inspect the pair on the first data, and settle how many are taken at once.

        As many as leave room for the pilot chains, or for ``unit`` chains, of each.
        """
        size = max(1, min(num_rows(batch), self.cap // max(unit, _PILOTS)))
        rows = next(blocks(batch, size))
        self.layout = inspect(
            self.model, self.guide, rows, data_plate=self.data_plate, vectorize=self.vectorize
        )
        check_continuous(self.model, self.source, rows, self.layout)
        target = self.guide if self.start == "guide" else None
        self.path = Path(self.model, target, self.layout, compiled=self.compiled)
        return size

    def ladder(self, rows: Any) -> Ladder:
        """Temperatures and step sizes of a block of data, from pilot chains of its own."""
        evaluate = self.path.on(rows)
        number = min(self.num_temperatures, max(50, self.num_temperatures // 4))
        pilot = sigmoidal(number) if self.fixed is None else _thinned(self.fixed, number)
        pilot = pilot.to(self.device)[:, None].expand(-1, num_rows(rows))
        flat = self.draws(rows, _PILOTS)
        steps = tune(evaluate, evaluate(flat), pilot, self.num_leapfrog, self.target_acceptance)
        if self.fixed is None:
            return Ladder(evaluate, even_speed(steps, self.num_temperatures), steps)
        betas = self.fixed.to(self.device)[:, None].expand(-1, num_rows(rows))
        return Ladder(evaluate, betas, steps)

    def draws(self, rows: Any, num_chains: int) -> Tensor:
        """``(K, B, L)`` draws from the path's start."""
        if self.vectorize:
            values, _ = sample_guide(self.source, rows, num_chains, self.layout)
            return unconstrain(self.model, rows, values, num_chains, self.layout)
        singles = (sample_guide(self.source, rows, 1, self.layout)[0] for _ in range(num_chains))
        return torch.cat([unconstrain(self.model, rows, v, 1, self.layout) for v in singles])

    def forward(
        self,
        rows: Any,
        ladder: Ladder,
        num_chains: int,
        *,
        unit: int = 1,
        resample: Resample | None = None,
    ) -> Tensor:
        """Log weights ``(K, B)`` of chains from the start to the posterior; ``E[w] = p(x)``.

        Chains are taken in pieces under the cap, each a multiple of ``unit``.
        """
        pieces = []
        for number in portions(num_chains, self.cap // num_rows(rows), unit):
            point = ladder.evaluate(self.draws(rows, number))
            pieces.append(
                run(ladder.evaluate, point, ladder.betas, ladder.steps, self.num_leapfrog, resample)
            )
        return _finite(torch.cat(pieces))

    def reverse(self, rows: Any, ladder: Ladder, flat: Tensor, num_chains: int) -> Tensor:
        """Log weights ``(K, B)`` of chains from one posterior draw ``(1, B, L)`` to the start.

        ``E[w] = 1 / p(x)``.
        """
        pieces = []
        for number in portions(num_chains, self.cap // num_rows(rows), 1):
            point = ladder.evaluate(flat.expand(number, -1, -1).contiguous())
            falling = ladder.betas.flip(0)
            pieces.append(run(ladder.evaluate, point, falling, ladder.steps, self.num_leapfrog))
        return _finite(torch.cat(pieces))


def device_of(*programs: Any) -> torch.device:
    """Where the parameters of some programs lie."""
    modules = (module_of(program) for program in programs)
    tensors = (p for module in modules if module is not None for p in module.parameters())
    return next((p.device for p in tensors), torch.device("cpu"))


def cap_on(device: torch.device) -> int:
    """Chains x data that are held at once on a device, if nobody says otherwise."""
    return _MAX_PAIRS.get(device.type, 2**18)


def evidence_of(log_weights: Tensor, method: str) -> Evidence:
    """Log weights ``(K, B)`` reduced as importance sampling reduces them."""
    return Evidence(
        log_evidence=algebra.log_mean_exp(log_weights).cpu(),
        stderr=algebra.stderr(log_weights).cpu(),
        ess=algebra.ess(log_weights).cpu(),
        pareto_k=algebra.pareto_k(log_weights.cpu()),
        elbo=log_weights.mean(0).cpu(),
        num_particles=len(log_weights),
        method=method,
    )


def joined(pieces: Sequence[Evidence]) -> Evidence:
    """Evidence of several blocks of data as one."""
    first = pieces[0]
    columns = ("log_evidence", "stderr", "ess", "pareto_k", "elbo")
    tensors = {name: torch.cat([getattr(piece, name) for piece in pieces]) for name in columns}
    return replace(first, **tensors)  # type: ignore[arg-type]


def blocks(batch: Any, size: int, progress: Progress | None = None) -> Iterator[Any]:
    """Rows of a batch, ``size`` at a time; progress is told after each."""
    total = num_rows(batch)
    tensors = torch.utils._pytree.tree_leaves(batch)
    for first in range(0, total, size):
        stop = min(first + size, total)
        yield take(batch, torch.arange(first, stop, device=tensors[0].device))
        if progress is not None:
            progress(stop, total)


def portions(total: int, most: int, unit: int) -> list[int]:
    """``total`` cut into parts of at most ``most``, each a multiple of ``unit``."""
    most = max(unit, most // unit * unit)
    return [min(most, total - done) for done in range(0, total, most)]


def _thinned(betas: Tensor, number: int) -> Tensor:
    """About ``number`` temperatures of a schedule, its ends among them."""
    index = torch.linspace(0, len(betas) - 1, number + 1, dtype=torch.float64).round().long()
    return betas[torch.unique(index)]


def _finite(log_weights: Tensor) -> Tensor:
    if bool(log_weights.isnan().any()):
        column = int(log_weights.isnan().any(0).nonzero()[0])
        raise NonFiniteError(
            f"a log weight of datum {column} of a block is NaN: look at log p(x, z) there, or "
            "start from another density (start='prior' or 'guide')"
        )
    return log_weights


def at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise OptionError(f"{name} must be at least 1, got {number}")
