"""The engine that a step is taken by: the one asked for, or the one that pays."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pvae.engine.eager import Eager, Step
from pvae.engine.problem import Problem
from pvae.engine.staged import Staged
from pvae.staging import (
    COMPILING_PAYS,
    STAGING_PAYS,
    StagingError,
)

__all__ = ["Auto", "stage"]


def stage(
    engine: str,
    problem: Problem,
    index: Tensor,
    total_steps: int,
    say: Callable[[str], None],
    reason: str = "asked for",
) -> Step:
    """The step by one of :data:`ENGINES`, falling back with the reason said once.

    Args:
        engine: Its name.
        problem: What the step is about.
        index: An example batch of row numbers, of the usual size.
        total_steps: Steps of the whole run, by which ``auto`` chooses.
        say: Called with what was chosen and why.
        reason: Why this engine is wanted.
    """
    if engine == "auto":
        return Auto(problem, index, total_steps, say)
    if engine == "eager":
        return Eager(problem, reason)
    for compiled, record in _CHAIN[engine]:
        if compiled:
            say("engine: compiling the step")
        try:
            step = Staged(problem, index, compiled=compiled, record=record, reason=reason)
        except StagingError as error:
            reason = str(error)
            continue
        say(f"engine {step.name} ({step.reason}; ready in {step.seconds:.1f} s)")
        return step
    say(f"engine eager instead of {engine}: {reason}")
    return Eager(problem, reason)


# What is tried, in this order, before the programs are run eagerly: compiled, recorded.
_CHAIN = {
    "cudagraph": ((True, True), (False, True), (True, False), (False, False)),
    "compiled": ((True, False), (False, False)),
    "staged": ((False, False),),
}


class Auto:
    """Measures a few eager steps, then takes the engine that pays over the rest of the run.

    Args:
        problem: What the step is about.
        index: An example batch of row numbers, of the usual size.
        total_steps: Steps of the whole run.
        say: Called once with what was chosen and why.
    """

    _measured = 4
    _staging_pays, _compiling_pays = STAGING_PAYS, COMPILING_PAYS

    def __init__(
        self, problem: Problem, index: Tensor, total_steps: int, say: Callable[[str], None]
    ) -> None:
        self.problem, self.total_steps, self.say = problem, total_steps, say
        self.index = index  # the batch at which it is decided may be a smaller one
        self.chosen: Step = Eager(problem)
        self.times: list[float] = []
        self.decided = False

    @property
    def name(self) -> str:
        """The engine in use."""
        return self.chosen.name

    @property
    def reason(self) -> str:
        """Why it was chosen."""
        return self.chosen.reason

    @property
    def seconds(self) -> float:
        """Time the chosen engine took to become ready."""
        return self.chosen.seconds

    def __call__(self, index: Tensor, step: int, beta: float) -> Tensor:
        """Take one step."""
        if self.decided:
            return self.chosen(index, step, beta)
        started = time.perf_counter()
        found = self.chosen(index, step, beta)
        self.times.append(time.perf_counter() - started)
        if len(self.times) > self._measured:
            self._decide()
        return found

    def _decide(self) -> None:
        self.decided = True
        each = sorted(self.times[1:])[self._measured // 2]
        group = self.problem.group
        if group is not None:  # all ranks choose alike
            each = float(group.sum([torch.tensor([each])])[0]) / group.size
        ahead = each * (self.total_steps - len(self.times))
        cost = f"{self.total_steps} steps of {1e3 * each:.1f} ms"
        if ahead < self._staging_pays:
            self.chosen = Eager(self.problem, f"{cost}: staging would not pay")
        else:
            on_cuda = self.problem.device.type == "cuda"  # where launches cost more than the work
            name = "cudagraph" if on_cuda and self.problem.parts == 1 else "compiled"
            name = name if ahead > self._compiling_pays else "staged"
            self.chosen = stage(name, self.problem, self.index, self.total_steps, self.say, cost)
            return
        self.say(f"engine {self.chosen.name} ({self.chosen.reason})")

    def finish(self) -> None:
        """Bring the optimiser's own state up to date."""
        self.chosen.finish()

    def state(self) -> dict[str, Any]:
        """What was chosen and for what size of batch, or the times measured so far."""
        if not self.decided:
            return {"times": self.times}
        rows = self.chosen.batch if isinstance(self.chosen, Staged) else 0
        return {"engine": self.name, "reason": self.reason, "rows": rows}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Choose as before: times measured again would not decide alike."""
        self.times = list(state.get("times", []))
        self.decided = "engine" in state
        if self.decided:
            rows = torch.arange(state["rows"], device=self.problem.device)
            self.chosen = stage(
                state["engine"], self.problem, rows, self.total_steps, self.say, state["reason"]
            )
