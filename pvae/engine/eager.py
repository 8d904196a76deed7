"""What every step can do, and the plain one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pvae.engine.problem import Problem, metrics
from pvae.parts import step_in_parts

__all__ = ["Eager", "Step"]


class Step(Protocol):
    """One optimisation step; ``name`` and ``reason`` say which engine took it and why."""

    @property
    def name(self) -> str:
        """The engine's name."""

    @property
    def reason(self) -> str:
        """Why it took the steps."""

    @property
    def seconds(self) -> float:
        """Time it took to become ready: tracing, compiling, recording."""

    def __call__(self, index: Tensor, step: int, beta: float) -> Tensor:
        """Update on the rows ``index``; sums over them of :data:`METRICS`, ``(4,)``, device."""

    def finish(self) -> None:
        """Bring the optimiser's own state up to date."""

    def state(self) -> dict[str, Any]:
        """What the step knows beyond parameters and optimiser, for a checkpoint."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`; parameters and optimiser are those of then."""


class Eager:
    """The plain step: Pyro's handlers run at every call. It works for every pair."""

    name = "eager"
    seconds = 0.0

    def __init__(self, problem: Problem, reason: str = "", *, waits: bool | None = None) -> None:
        self.problem, self.reason = problem, reason
        self.waits = problem.waits if waits is None else waits

    def __call__(self, index: Tensor, step: int, beta: float) -> Tensor:
        """Take one step.

        Raises:
            NonFiniteError: a loss or gradient is not finite; the parameters are unchanged.
        """
        problem = self.problem
        if problem.parts > 1:
            return step_in_parts(problem, self.gradients, index, step, beta)
        problem.seed_noise(step)
        loss = problem.loss(index, beta)
        problem.optimizer.zero_grad(set_to_none=True)
        tensors = list(problem.parameters.values())
        loss.loss.backward(inputs=tensors)  # type: ignore[no-untyped-call]
        norm = nn.utils.get_total_norm([p.grad for p in tensors if p.grad is not None])
        healthy = torch.isfinite(norm) & torch.isfinite(loss.loss)
        # A CPU reads what is there already; a GPU would wait, and is checked once an interval.
        if self.waits and not bool(healthy):
            problem.optimizer.zero_grad(set_to_none=True)
            raise problem.diagnose(index, step, beta)
        if problem.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(tensors, problem.clip_norm, norm)
        problem.optimizer.step()
        return metrics(loss)

    def gradients(
        self, index: Tensor, beta: float
    ) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
        """Those of one part of a batch, see :data:`pvae.parts.Gradients`."""
        loss = self.problem.loss(index, beta)
        tensors = list(self.problem.parameters.values())
        gradients = torch.autograd.grad(loss.loss, tensors, allow_unused=True)
        return metrics(loss), loss.loss.detach(), gradients

    def finish(self) -> None:
        """Nothing is kept apart."""

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing."""
