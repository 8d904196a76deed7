"""Variational EM: E phases move the guide alone, M phases the model alone.

Both raise one bound, so that coordinate ascent on it is EM where the guide can be the exact
posterior (Neal & Hinton 1998) and its variational form where it cannot.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.data import take
from pvae.engine import METRICS, Problem, Step
from pvae.errors import ObjectiveError, OptionError, ProgramError, did_you_mean
from pvae.particles import owned

__all__ = ["Alternate", "Turns", "as_alternate", "split"]

UNTIL_FLAT = "until-flat"
_PHASES = {"e": "E phases", "m": "M phases", "joint": "joint steps"}


@dataclass(frozen=True)
class Alternate:
    """How E and M phases take turns; each of their steps takes one batch, as any step does.

    The E phase moves what the guide alone uses, the M phase everything else: a parameter that both
    programs use is the model's.

    Args:
        e_steps: Steps of an E phase, or ``"until-flat"``: it lasts until a window's mean bound is
            not above that of the window before (He, Spokoyny, Neubig & Berg-Kirkpatrick 2019).
        m_steps: Steps of an M phase.
        window: Steps of a window, where ``e_steps="until-flat"``.
        most: Longest E phase then.
        epochs: Take turns for so many epochs, then train both together.
        while_rising: Take turns until this column of the history (``"valid_bound"``, ``"kl"``, …)
            is not above its value of the epoch before, then train both together.

    Raises:
        OptionError: A number is below one or not whole, or ``e_steps`` or the column is another
            word.
    """

    e_steps: int | str = 1
    m_steps: int = 1
    window: int = 10
    most: int = 100
    epochs: int | None = None
    while_rising: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.e_steps, str) and self.e_steps != UNTIL_FLAT:
            raise OptionError(
                f"e_steps is a number of steps or {UNTIL_FLAT!r}, got {self.e_steps!r}"
            )
        numbers = {n: getattr(self, n) for n in ("e_steps", "m_steps", "window", "most", "epochs")}
        for name, value in numbers.items():
            if value in (None, UNTIL_FLAT):
                continue
            if not isinstance(value, int) or value < 1:
                raise OptionError(
                    f"alternate takes {name} of at least 1, a whole number, got {value!r}"
                )
        columns = [*METRICS, *(f"valid_{name}" for name in METRICS)]
        if self.while_rising is not None and self.while_rising not in columns:
            raise OptionError(
                f"while_rising takes no column {self.while_rising!r}: "
                f"{did_you_mean(self.while_rising, columns)}"
            )


def as_alternate(alternate: Alternate | int | str | None) -> Alternate | None:
    """A number of E steps, or ``"until-flat"``, as an :class:`Alternate` with one M step.

    Raises:
        OptionError: it is none of these.
    """
    if alternate is None or isinstance(alternate, Alternate):
        return alternate
    if isinstance(alternate, str) or type(alternate) is int:
        return Alternate(e_steps=alternate)
    raise OptionError(
        f"alternate takes a number of E steps, {UNTIL_FLAT!r} or a pvae.Alternate, got "
        f"{alternate!r}"
    )


def split(
    problem: Problem, rows: Tensor, build: Callable[[Sequence[Tensor]], torch.optim.Optimizer]
) -> dict[str, Problem]:
    """The problem of each half: its own parameters and optimiser, the other half's frozen.

    Args:
        problem: The whole, whose objective is kept.
        rows: An example batch of row numbers.
        build: Makes an optimiser over some parameters.

    Returns:
        ``"e"`` and ``"m"`` -> problem.

    Raises:
        ProgramError: a half has no parameters of its own.
        ObjectiveError: the objective does not move a half.
    """
    weights = problem.parameters
    batch = take(problem.data, rows)
    batch = batch if problem.preprocess is None else problem.preprocess(batch)
    of_model, of_guide = owned(problem.model, problem.guide, batch, weights)
    serve = {name for name in weights if name.startswith("objective.")}  # a control variate, say
    moved = {"e": (of_guide - of_model) | (serve if of_guide - of_model else set())}
    moved["m"] = set(weights) - moved["e"]
    halves = {}
    for phase, names in moved.items():
        if not names:
            raise ProgramError(_NOTHING[phase])
        own = {name: weights[name] for name in weights if name in names}
        frozen = {name: weights[name] for name in weights if name not in names}
        optimizer = build(list(own.values()))
        halves[phase] = dataclasses.replace(
            problem, parameters=own, frozen=frozen, optimizer=optimizer
        )
        _check_moved(halves[phase], rows, phase)
    return halves


_NOTHING = {
    "e": "alternate has nothing to move in its E phases, since the guide has no parameters that "
    "the model does not use too (guides.Exact takes the E-step exactly): leave alternate out",
    "m": "alternate has nothing to move in its M phases, since the model has no parameters: leave "
    "alternate out",
}


def _check_moved(half: Problem, rows: Tensor, phase: str) -> None:
    loss = half.loss(rows, 1.0).loss
    gradients: tuple[Tensor | None, ...] = ()
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, list(half.parameters.values()), allow_unused=True)
    if all(gradient is None for gradient in gradients):
        gradient = getattr(half.objective, "gradient", half.objective)
        raise ObjectiveError(
            f"{gradient!r} gives {next(iter(half.parameters))!r} no gradient, so the "
            f"{_PHASES[phase]} of alternate would move nothing: use another gradient, or leave "
            "alternate out"
        )


class Turns:
    """The step of a run whose halves take turns: that of the phase it is in.

    Args:
        plan: When they change.
        problems: ``"e"``, ``"m"`` and ``"joint"`` -> problem.
        make: Gives the step of a problem; called with the problem, the number of steps it may take
            and its name in words when it is first needed.
        total_steps: Steps of the whole run.
    """

    def __init__(
        self,
        plan: Alternate,
        problems: Mapping[str, Problem],
        make: Callable[[Problem, int, str], Step],
        total_steps: int,
    ) -> None:
        self.plan, self.problems, self.make = plan, problems, make
        self.total_steps = total_steps
        self.steps: dict[str, Step] = {}
        self.before = -math.inf  # the column that has to rise, an epoch ago
        self.counts = dict.fromkeys(_PHASES, 0)
        self.waiting: dict[str, Any] = {}  # states of steps that are not needed yet
        self._begin("e")

    def _begin(self, phase: str) -> None:
        self.phase, self.taken = phase, 0
        self.last = -math.inf
        self._clear()

    def _clear(self) -> None:
        self.sums: Any = 0.0
        self.rows = 0

    @property
    def name(self) -> str:
        """The engines in use."""
        return _together({_PHASES[phase]: step.name for phase, step in self.steps.items()})

    @property
    def reason(self) -> str:
        """Why they were chosen."""
        return _together({_PHASES[phase]: step.reason for phase, step in self.steps.items()})

    @property
    def seconds(self) -> float:
        """Time they took to become ready."""
        return sum(step.seconds for step in self.steps.values())

    def __call__(self, index: Tensor, step: int, beta: float) -> Tensor:
        """Take one step of the phase at hand."""
        if self.phase not in self.steps:
            steps = max(1, round(self.total_steps * self._share()))
            self.steps[self.phase] = self.make(
                self.problems[self.phase], steps, _PHASES[self.phase]
            )
            if self.phase in self.waiting:
                self.steps[self.phase].restore(self.waiting.pop(self.phase))
        found = self.steps[self.phase](index, step, beta)
        self.counts[self.phase] += 1
        self.taken += 1
        if self.phase == "m" and self.taken == self.plan.m_steps:
            self._begin("e")
        elif self.phase == "e" and self._is_over(found, len(index)):
            self._begin("m")
        return found

    def _is_over(self, found: Tensor, rows: int) -> bool:
        """Whether the E phase ends here; the bound is read once a window, never within a step."""
        plan = self.plan
        if not isinstance(plan.e_steps, str):
            return self.taken == plan.e_steps
        self.sums, self.rows = self.sums + found[0], self.rows + rows
        if self.taken % plan.window:
            return self.taken >= plan.most
        mean = float(self.sums) / self.rows
        flat = not mean > self.last
        self.last = mean
        self._clear()
        return flat or self.taken >= plan.most

    def _share(self) -> float:
        """The largest share of all steps that the phase may take."""
        m_steps = self.plan.m_steps
        if self.phase == "joint" or (self.phase == "e" and isinstance(self.plan.e_steps, str)):
            return 1.0
        shortest = self.plan.e_steps
        if isinstance(shortest, str):
            shortest = min(2 * self.plan.window, self.plan.most)
        return (shortest if self.phase == "e" else m_steps) / (shortest + m_steps)

    def end_epoch(self, row: Mapping[str, float]) -> dict[str, float]:
        """Steps of each phase in the epoch, for the history; from here on together if it is time.

        Args:
            row: The epoch's entries so far.
        """
        counted: dict[str, float] = {
            f"{phase}_steps": count for phase, count in self.counts.items()
        }
        self.counts = dict.fromkeys(_PHASES, 0)
        plan = self.plan
        over = plan.epochs is not None and row["epoch"] >= plan.epochs
        if plan.while_rising is not None and plan.while_rising in row:
            value = row[plan.while_rising]
            over = over or not value > self.before
            self.before = value
        if over and self.phase != "joint":
            self._begin("joint")
        return counted

    def finish(self) -> None:
        """Bring the optimisers' own states up to date."""
        for step in self.steps.values():
            step.finish()

    def state(self) -> dict[str, Any]:
        """The phase at hand and how far it is; the steps of each phase."""
        steps = {phase: step.state() for phase, step in self.steps.items()}
        numbers = {name: _or_none(getattr(self, name)) for name in ("last", "before")}
        counted = {"phase": self.phase, "taken": self.taken, "counts": self.counts}
        window = {"sums": float(self.sums), "rows": self.rows}
        return {"steps": self.waiting | steps, **counted, **window, **numbers}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on in the phase of then."""
        self.waiting = dict(state["steps"])
        self.phase, self.taken, self.counts = state["phase"], state["taken"], dict(state["counts"])
        self.sums, self.rows = state["sums"], state["rows"]
        for name in ("last", "before"):
            setattr(self, name, -math.inf if state[name] is None else state[name])


def _or_none(value: float) -> float | None:
    """``-inf`` has no place in JSON."""
    return None if value == -math.inf else value


def _together(words: Mapping[str, str]) -> str:
    """One word where all are the same, else each with its phase."""
    if len(set(words.values())) == 1:
        return next(iter(words.values()))
    return ", ".join(f"{phase} {word}" for phase, word in words.items())
