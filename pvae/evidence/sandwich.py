r"""Bounds from both sides, on data that the model drew: how wrong an estimate of log p(x) can be.

A model gives with each datum that it draws one exact draw from the posterior, namely the latents
it was drawn with. From there a chain can be annealed back to the guide, or a set of importance
weights be completed, and either bounds ``log p(x)`` from above.

Grosse, Ghahramani & Adams (2015), Sandwiching the marginal likelihood using bidirectional Monte
Carlo; Grosse, Ancha & Roy (2016), Measuring the reliability of MCMC inference with BDMC; Sobolev &
Vetrov (2019), Importance weighted hierarchical variational inference, for the importance-weighted
upper bound.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.data import as_batch, num_rows, take
from pvae.errors import OptionError
from pvae.evidence.annealing import (
    Annealer,
    Progress,
    Schedule,
    at_least_one,
    blocks,
    cap_on,
    device_of,
    evidence_of,
    joined,
    portions,
)
from pvae.evidence.importance import Evidence, evaluation
from pvae.particles import (
    Layout,
    generate,
    inspect,
    log_guide,
    log_joint,
    sample_guide,
    unconstrain,
)

__all__ = ["Sandwich", "Simulated", "importance_upper", "sandwich", "simulate"]

_APART = 2**32  # between the seeds of data and of what is estimated on them


@dataclass(frozen=True)
class Simulated:
    """Data that a model drew, each with one exact draw from its posterior.

    Attributes:
        x: The data, as the model and the guide are called on them.
        latents: Latent site -> the values that each datum was drawn with, ``(1, N, ...)``.
    """

    x: Any
    latents: Mapping[str, Tensor]

    def __len__(self) -> int:
        return num_rows(self.x)


@dataclass(frozen=True)
class Sandwich:
    """Two-sided bounds of the log evidence of N simulated data; unpacks as ``lower, upper``.

    Attributes:
        lower: Evidence whose expectation is below ``log p(x_n)``.
        upper: Evidence whose expectation is above it.
        simulated: The data, and the latents they were drawn with.
    """

    lower: Evidence
    upper: Evidence
    simulated: Simulated

    def __iter__(self) -> Iterator[Evidence]:
        return iter((self.lower, self.upper))

    @property
    def gap(self) -> Tensor:
        """``(N,)`` upper minus lower, nats; single ones may be negative by chance."""
        return self.upper.log_evidence - self.lower.log_evidence

    @property
    def gap_stderr(self) -> Tensor:
        """``(N,)`` standard errors of :attr:`gap`, given the posterior draw that it started at."""
        return torch.hypot(self.upper.stderr, self.lower.stderr)

    @property
    def mean_gap(self) -> float:
        """Mean gap over the data, nats: in expectation at least the error of either bound."""
        return float(self.gap.mean())

    @property
    def mean_gap_stderr(self) -> float:
        """Standard error of :attr:`mean_gap` over data, draws and chains, nats."""
        if len(self.simulated) < 2:
            return math.inf
        return float(self.gap.std() / math.sqrt(len(self.simulated)))

    def __repr__(self) -> str:
        return (
            f"Sandwich({self.lower.mean:.3f} <= mean log p(x) <= {self.upper.mean:.3f} nats in "
            f"expectation, gap {self.mean_gap:.3f} ± {self.mean_gap_stderr:.3f}, "
            f"N={len(self.simulated)} simulated, K={self.lower.num_particles})"
        )


def simulate(
    model: Any,
    guide: Any,
    num_data: int = 100,
    *,
    example: Any = None,
    seed: int = 0,
    data_plate: str | None = None,
    vectorize: bool = True,
) -> Simulated:
    """Draw data from a model, and keep the latents as one exact posterior draw for each.

    Args:
        model: The generative program: ``model(size=num_data)`` draws data and returns them.
        guide: The inference program; its sites tell latents from data.
        num_data: N.
        example: Data for models that do not generate when called with ``size``: the first N rows
            are passed to the model, which draws its observed sites instead of taking them;
            whatever else is in them (covariates, say) stays.
        seed: Seed of the draws; the caller's random stream is untouched.
        data_plate: Name of the plate that indexes the data, where several could.
        vectorize: Whether the programs take all particles at once.

    Raises:
        ProgramError: The model does not generate; the message says what would help.
        OptionError: ``num_data`` is below one, or above the number of example rows.
    """
    at_least_one(num_data=num_data)
    device = device_of(model, guide)
    if example is not None:
        example = as_batch(example, device=device)
        if num_rows(example) < num_data:
            raise OptionError(
                f"num_data={num_data} asks for more than the {num_rows(example)} example rows: "
                "pass as many rows as data are to be drawn"
            )
        tensors = torch.utils._pytree.tree_leaves(example)
        example = take(example, torch.arange(num_data, device=tensors[0].device))
    with evaluation(model, guide, seed=seed + _APART, device=device):
        x, values, layout = generate(
            model, guide, num_data, example, data_plate=data_plate, vectorize=vectorize
        )
    return Simulated(x, {name: values[name] for name in layout.latents})


def sandwich(
    model: Any,
    guide: Any,
    num_data: int = 100,
    *,
    example: Any = None,
    simulated: Simulated | None = None,
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
) -> Sandwich:
    r"""Bound ``log p(x_n)`` from both sides on simulated data (bidirectional Monte Carlo).

    With ``(z*, x) ~ p``, z* is an exact draw from ``p(z | x)``. Chains from the guide to the
    posterior have weights with ``E[w] = p(x)``; chains from z* back to the guide, along the same
    temperatures with the same frozen moves, have ``E[w'] = 1 / p(x)``. By Jensen's inequality

        ``E[log mean w] <= log p(x) <= E[-log mean w']``,

    each bound is off by more than a + b nats on its own side with probability below ``exp(-b)``
    (Markov), and the gap bounds the error of both. The gap measured on simulated data speaks for
    :func:`~pvae.evidence.annealed` with the same settings on real data as far as these resemble
    what the model draws. All reverse chains of a datum start at its one z*.

    Args:
        model: The generative program.
        guide: The inference program; may be ``None`` with ``start="prior"``.
        num_data: N, data to draw.
        example: See :func:`simulate`.
        simulated: Data drawn before, by :func:`simulate`, in place of new ones.
        num_chains: K chains for each datum and direction.
        num_temperatures: T, steps from ``beta = 0`` to ``beta = 1``.
        schedule: Where the temperatures lie.
        num_leapfrog: Leapfrog steps of a move.
        start: ``"guide"`` or ``"prior"``.
        target_acceptance: Mean acceptance that the step sizes are adapted to.
        max_pairs: Cap on chains x data held at once.
        compiled: Compile the traced densities (see :func:`~pvae.evidence.annealed`).
        seed: Seed of the draws; the caller's random stream is untouched.
        data_plate: Name of the plate that indexes the data, where several could.
        vectorize: Run chains at once.
        progress: Called with (data done, N).

    Returns:
        A :class:`Sandwich`: ``lower, upper = sandwich(...)``.

    Raises:
        ProgramError: The model does not generate, or as :func:`~pvae.evidence.annealed`.
        OptionError: A number, a schedule or a start that cannot be.
        NonFiniteError: A log weight came out as NaN.
    """
    at_least_one(num_chains=num_chains)
    annealer = Annealer(
        model, guide, num_temperatures=num_temperatures, schedule=schedule,
        num_leapfrog=num_leapfrog, start=start, target_acceptance=target_acceptance,
        max_pairs=max_pairs, compiled=compiled, data_plate=data_plate, vectorize=vectorize,
    )  # fmt: skip
    if simulated is None:
        simulated = simulate(
            model, annealer.guide, num_data, example=example, seed=seed, data_plate=data_plate,
            vectorize=vectorize,
        )  # fmt: skip
    lower, upper = [], []
    with evaluation(model, annealer.guide, seed=seed, device=annealer.device):
        size = annealer.look(simulated.x)
        done = 0
        for rows in blocks(simulated.x, size, progress):
            ladder = annealer.ladder(rows)
            stop = done + num_rows(rows)
            values = _between(simulated, done, stop, annealer.layout)
            flat, done = unconstrain(model, rows, values, 1, annealer.layout), stop
            lower.append(_below(annealer.forward(rows, ladder, num_chains)))
            upper.append(_above(annealer.reverse(rows, ladder, flat, num_chains)))
    return Sandwich(joined(lower), joined(upper), simulated)


def importance_upper(
    model: Any,
    guide: Any,
    simulated: Simulated,
    num_particles: int = 5000,
    *,
    max_pairs: int | None = None,
    seed: int = 0,
    data_plate: str | None = None,
    vectorize: bool = True,
    progress: Progress | None = None,
) -> Evidence:
    r"""Bound ``log p(x_n)`` of simulated data from above by importance weights.

    ``log (1/K) sum_k p(x, z_k) / q(z_k | x)`` with ``z_1 = z*``, the exact posterior draw, and
    ``z_2 ... z_K ~ q``. In expectation it falls with K to ``log p(x)``, as the estimate of
    :func:`~pvae.evidence.importance` (all K from q) rises to it; with K = 1 it is the evidence
    plus ``KL(p(z|x) || q)``, averaged over the model's data. Latent sites may be discrete.

    Args:
        model: The generative program.
        guide: The inference program.
        simulated: Data with their posterior draws, from :func:`simulate`.
        num_particles: K, the posterior draw among them.
        max_pairs: Cap on particles x data held at once.
        seed: Seed of the draws from the guide; the caller's random stream is untouched.
        data_plate: Name of the plate that indexes the data, where several could.
        vectorize: Run particles at once.
        progress: Called with (data done, N).

    Returns:
        An :class:`Evidence` of N data, of kind ``"upper bound"``.

    Raises:
        OptionError: ``num_particles`` is below one.
        ProgramError: The programs do not fit each other, a latent site is shared by all data, or
            the guide has sites of its own.
    """
    at_least_one(num_particles=num_particles)
    device = device_of(model, guide)
    cap = max_pairs or cap_on(device)
    size = max(1, min(len(simulated), cap // min(num_particles, cap)))
    pieces, done = [], 0
    with evaluation(model, guide, seed=seed, device=device):
        layout = inspect(
            model, guide, next(blocks(simulated.x, size)), data_plate=data_plate,
            vectorize=vectorize,
        )  # fmt: skip
        for rows in blocks(simulated.x, size, progress):
            stop = done + num_rows(rows)
            posterior, done = _between(simulated, done, stop, layout), stop
            weights = [_log_weights(model, guide, rows, posterior, layout)]
            most = cap // num_rows(rows) if vectorize else 1
            for number in portions(num_particles - 1, most, 1):
                values, log_q = sample_guide(guide, rows, number, layout)
                log_p = log_joint(model, rows, values, number, layout)
                weights.append(log_p.double() - log_q.double())
            found = evidence_of(torch.cat(weights), "importance with one posterior draw")
            pieces.append(dataclasses.replace(found, kind="upper bound"))
    return joined(pieces)


def _log_weights(
    model: Any, guide: Any, rows: Any, values: Mapping[str, Tensor], layout: Layout
) -> Tensor:
    """``(1, B)`` log weights of given latents, float64."""
    log_q = log_guide(guide, rows, values, 1, layout)
    return log_joint(model, rows, values, 1, layout).double() - log_q.double()


def _between(simulated: Simulated, first: int, stop: int, layout: Layout) -> dict[str, Tensor]:
    """The posterior draws of data ``first`` to ``stop``."""
    batch_dims = -layout.particle_dim - (0 if layout.vectorize else 1)
    axis = batch_dims + layout.data_dim
    return {n: v.narrow(axis, first, stop - first) for n, v in simulated.latents.items()}


def _below(log_weights: Tensor) -> Evidence:
    found = evidence_of(log_weights, "annealed importance sampling")
    return dataclasses.replace(found, kind="lower bound")


def _above(log_weights: Tensor) -> Evidence:
    """Weights of mean ``1 / p(x)``: minus the log of their mean."""
    found = evidence_of(log_weights, "reverse annealed importance sampling")
    return dataclasses.replace(
        found, log_evidence=-found.log_evidence, elbo=-found.elbo, kind="upper bound"
    )
