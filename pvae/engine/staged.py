"""The step as one graph: traced, compiled, recorded."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pvae.data import is_streamed, num_rows, take
from pvae.engine.eager import Eager
from pvae.engine.problem import Problem, metrics
from pvae.engine.updates import Update
from pvae.parts import part_rows, step_in_parts
from pvae.seeds import seed_noise
from pvae.staging import (
    StagingError,
    capture,
    lower,
)

__all__ = ["Staged"]


class Staged:
    """The step as one graph of tensor operations, traced once through Pyro's handlers.

    Model, guide, gradients and guard are in the graph and, where it is compiled, the update of
    Adam, AdamW, SGD and RMSprop; other optimisers step after it. Batches of another size than the
    first are run eagerly.

    Args:
        problem: What the step is about.
        index: An example batch of row numbers, of the usual size.
        compiled: Compile the graph with Inductor.
        record: Record the graph on the CUDA device and replay it.

    Raises:
        StagingError: it cannot be staged; the message is the reason.
    """

    def __init__(
        self,
        problem: Problem,
        index: Tensor,
        *,
        compiled: bool,
        record: bool = False,
        reason: str = "",
    ) -> None:
        if record and problem.device.type != "cuda":
            raise StagingError(f"a CUDA graph needs a CUDA device, and this is {problem.device}")
        self.reason = reason
        self.name = "cudagraph" if record else "compiled" if compiled else "staged"
        self.batch, self.in_parts = len(index), problem.parts > 1
        index = index[: part_rows(len(index), problem.parts)]
        self.rows = len(index)
        self.eager = Eager(problem)
        self.streamed = is_streamed(problem.data)
        if self.streamed:  # the graph sees one batch, into which the rows are read
            problem = dataclasses.replace(problem, data=take(problem.data, index))
            index = torch.arange(self.rows, device=index.device)
        self.problem, self.whole = problem, self.eager.problem
        self.tensors = list(problem.parameters.values())
        # Operation by operation, torch's own fused update is quicker than the graph's; and parts
        # are added before they are clipped, judged and taken.
        in_graph = (compiled or record) and not self.in_parts
        self.update = Update.of(problem.optimizer, self.tensors) if in_graph else None
        self.used: list[Tensor] = []
        self.taken = 0 if self.update is None else self.update.steps_taken()
        self.scalars = torch.ones(4, device=problem.device, dtype=self.tensors[0].dtype)
        data = torch.utils._pytree.tree_leaves(problem.data)
        others = [*problem.frozen.values(), *problem.buffers()]
        held = [*self.tensors, *others, *self._state(), *data, self.scalars]
        self.inputs = [tensor.detach() for tensor in held]
        before = [tensor.clone() for tensor in self.inputs[: -len(data) - 1]]
        started = time.perf_counter()
        try:
            self.run = self._ready_to_run(held, index, compiled=compiled, record=record)
            self._verify(index, before)
        finally:
            self._restore(before)
        self.seconds = time.perf_counter() - started

    def _state(self) -> list[Tensor]:
        return [] if self.update is None else self.update.state()

    def _restore(self, before: list[Tensor]) -> None:
        with torch.no_grad():
            for tensor, value in zip(self.inputs, before, strict=False):
                tensor.copy_(value)

    def _ready_to_run(
        self, held: list[Tensor], index: Tensor, *, compiled: bool, record: bool
    ) -> Callable[..., Any]:
        graph = capture(lambda held, index: self._body(index), held, index, flat=True)
        run = lower(graph, [*self.inputs, index]) if compiled else graph
        return _record(run, self.inputs, index) if record else run  # type: ignore[no-any-return]

    def _body(self, index: Tensor) -> tuple[Tensor, ...]:
        beta = self.scalars[0]
        loss = self.problem.loss(index, beta)
        gradients = torch.autograd.grad(loss.loss, self.tensors, allow_unused=True)
        norm = _norm(gradients)
        healthy = torch.isfinite(norm) & torch.isfinite(loss.loss.detach())
        if self.problem.clip_norm is not None and not self.in_parts:
            factor = (self.problem.clip_norm / (norm + 1e-6)).clamp(max=1)
            gradients = tuple(None if g is None else g * factor for g in gradients)
        found = torch.cat([metrics(loss), norm[None], healthy[None].to(norm.dtype)])
        if self.update is None:
            # On a GPU nobody waits to see whether it is healthy.
            if not (self.problem.waits or self.in_parts):
                gradients = tuple(
                    None if g is None else torch.where(healthy, g, 0.0) for g in gradients
                )
            pairs = zip(self.tensors, gradients, strict=True)
            self.used = [tensor for tensor, gradient in pairs if gradient is not None]
            return (found, *[g for g in gradients if g is not None])
        from pvae.rewrites import hold  # imports the compiler

        with torch.no_grad():
            self.update(self.tensors, gradients, hold(healthy), self.scalars)
        return (found,)

    def _verify(self, index: Tensor, before: list[Tensor]) -> None:
        """The graph against the program on other rows and noise: nothing may have been baked in."""
        problem = self.problem
        other = (index + 1) % num_rows(problem.data)
        self._restore(before)
        with torch.random.fork_rng(_cuda(problem.device)):
            seed_noise(problem.device, problem.seed, -7)
            loss = problem.loss(other, 1.0)
            gradients = torch.autograd.grad(loss.loss, self.tensors, allow_unused=True)
            expected = torch.cat([metrics(loss), _norm(gradients)[None]])
            self._restore(before)
            seed_noise(problem.device, problem.seed, -7)
            self._fill(1.0, 0.0)
            with torch.no_grad():
                found = self.run(*self.inputs, other)[0][:5]
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
            raise StagingError(
                "the traced graph does not reproduce the program on other data: something in it is "
                "computed outside torch, or from a Python value that changes"
            )

    def _fill(self, beta: float, rate: float) -> None:
        corrections = (1.0, 1.0) if self.update is None else self.update.corrections(self.taken + 1)
        on_device = self.problem.device.type == "cuda"
        values = torch.tensor(
            (beta, rate, *corrections), dtype=self.scalars.dtype, pin_memory=on_device
        )
        self.scalars.copy_(values, non_blocking=on_device)

    def __call__(self, index: Tensor, step: int, beta: float) -> Tensor:
        """Take one step.

        Raises:
            NonFiniteError: a loss or gradient is not finite; the parameters are unchanged.
        """
        problem = self.whole
        if self.in_parts:
            return step_in_parts(problem, self.gradients, index, step, beta)
        if len(index) != self.rows:
            self.finish()
            found = self.eager(index, step, beta)
            self.taken += 1
            return found
        self._fill(beta, problem.optimizer.param_groups[0]["lr"])
        problem.seed_noise(step)
        with torch.no_grad():
            found, *gradients = self.run(*self.inputs, self._ready(index))
        if problem.waits and not bool(found[5]):
            raise problem.diagnose(index, step, beta)
        if self.update is None:
            self._step_outside(gradients)
        self.taken += 1
        sums: Tensor = found[:4]
        return sums

    def _ready(self, index: Tensor) -> Tensor:
        """The rows as the graph counts them; those in a file are read."""
        if not self.streamed:
            return index
        leaves = torch.utils._pytree.tree_leaves
        for window, rows in zip(
            leaves(self.problem.data), leaves(take(self.whole.data, index)), strict=True
        ):
            window.copy_(rows)
        return torch.arange(self.rows, device=index.device)

    def gradients(
        self, index: Tensor, beta: float
    ) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
        """Those of one part of a batch, see :data:`pvae.parts.Gradients`."""
        if len(index) != self.rows:
            return self.eager.gradients(index, beta)
        self._fill(beta, 0.0)
        with torch.no_grad():
            found, *gradients = self.run(*self.inputs, self._ready(index))
        by_tensor = dict(zip(map(id, self.used), gradients, strict=True))
        finite = torch.where(found[5] > 0, 0.0, torch.nan)
        return found[:4], finite, [by_tensor.get(id(tensor)) for tensor in self.tensors]

    def _step_outside(self, gradients: Sequence[Tensor]) -> None:
        for tensor, gradient in zip(self.used, gradients, strict=True):
            tensor.grad = gradient
        self.problem.optimizer.step()

    def finish(self) -> None:
        """Tell the optimiser how many steps the graph has taken."""
        if self.update is not None:
            self.update.set_steps(self.taken)

    def state(self) -> dict[str, Any]:
        """Nothing: the steps taken are in the optimiser."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing."""


def _norm(gradients: Sequence[Tensor | None]) -> Tensor:
    """Euclidean norm of all gradients together, ``()``."""
    squares = [g.detach().square().sum() for g in gradients if g is not None]
    return sum(squares[1:], squares[0]).sqrt()


def _record(run: Callable[..., Any], inputs: list[Tensor], index: Tensor) -> Callable[..., Any]:
    """``run(*inputs, index)`` recorded as a CUDA graph: a call copies the index in and replays.

    The noise of a replay comes from the default generator's seed at that moment. What a call gives
    back is overwritten by the next one.
    """
    own = index.clone()
    try:
        side: Any = torch.cuda.Stream(index.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(index.device))
        with torch.cuda.stream(side), torch.no_grad():
            for _ in range(3):
                run(*inputs, own)
        torch.cuda.current_stream(index.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            output = run(*inputs, own)
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        raise StagingError(
            f"it cannot be recorded ({type(error).__name__}: {reason[0]})"
        ) from error

    def replay(*inputs_and_index: Tensor) -> Any:
        own.copy_(inputs_and_index[-1])
        graph.replay()
        return output

    return replay


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
