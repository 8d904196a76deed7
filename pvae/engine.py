"""One optimisation step made fast: noise, loss, gradients, guard, update.

Ways to take it, behind one call ``step(index, step, beta) -> metrics``:

- ``eager``: Pyro's handlers run at every step. Works for every pair.
- ``staged``: model, guide, gradients and optimiser are traced once, through Pyro's handlers, into
  one graph of tensor operations, which is then run as it is.
- ``compiled``: that graph compiled by Inductor.
- ``cudagraph``: that, recorded once on a CUDA device and replayed without any Python.
- ``auto``: measures a few eager steps, then takes the one that pays over the whole run.

Whatever cannot be staged is run eagerly, with the reason said once. Randomness comes from
``(seed, step)`` alone, so that a step can be repeated, to find out what went wrong or to continue
a run.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pvae.data import is_streamed, num_rows, take
from pvae.distributed import Group
from pvae.errors import NonFiniteError, OptionError, did_you_mean
from pvae.objectives import Loss, Objective, PyroObjective
from pvae.particles import Layout, module_of
from pvae.parts import part_rows, step_in_parts
from pvae.precision import precision_context
from pvae.seeds import mix, seed_noise
from pvae.staging import (
    COMPILING_PAYS,
    ENGINES,
    STAGING_PAYS,
    StagingError,
    capture,
    lower,
)

__all__ = [
    "ENGINES",
    "METRICS",
    "Auto",
    "Eager",
    "Problem",
    "Staged",
    "Step",
    "build_optimizer",
    "metrics",
    "mix",
    "seed_noise",
    "stage",
]

METRICS = ("bound", "elbo", "reconstruction", "kl")


def build_optimizer(
    optimizer: str | type[torch.optim.Optimizer] | torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    *,
    lr: float,
    options: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """One optimiser over all parameters, fused where torch has it so.

    Args:
        optimizer: A name from ``torch.optim`` in small letters (adam, adamw, sgd, rmsprop, …), a
            class, or an instance, which is taken as it is.
        parameters: What it updates.
        lr: Learning rate.
        options: Further arguments of its constructor (``{"momentum": 0.9}``).

    Raises:
        OptionError: there is none of that name, or it does not take the options.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    if not lr > 0:
        raise OptionError(f"lr must be positive, got {lr}")
    kind: Any = optimizer if isinstance(optimizer, type) else _optimizer_class(optimizer)
    given = dict(options or {})
    try:
        if "fused" in kind.__init__.__code__.co_varnames and not {"fused", "foreach"} & set(given):
            given = {"fused": True, **given}
        built: torch.optim.Optimizer = kind(parameters, lr=lr, **given)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{kind.__name__} refused its options {given}: {error}") from error
    return built


def _optimizer_class(name: str) -> Any:
    known = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and key != "Optimizer"
    }
    unfit = {"lbfgs", "sparseadam", "muon"}  # a closure, sparse gradients, matrices only
    known = {key: value for key, value in known.items() if key not in unfit}
    if name.lower() not in known:
        raise OptionError(f"no optimizer is called {name!r}: {did_you_mean(name, known)}")
    return known[name.lower()]


@dataclass
class Problem:
    """What a step is about.

    Attributes:
        model: The generative program.
        guide: The inference program.
        objective: What is maximised.
        optimizer: Over all of ``parameters``.
        parameters: Name -> parameter that the step moves.
        layout: From ``objective.prepare``.
        data: All N data, on the device.
        device: Where everything lies.
        seed: Seed of the noise.
        num_data: N.
        preprocess: Fresh noise for each batch (dynamic binarisation, dequantisation).
        clip_norm: Largest norm of the whole gradient; ``None`` for no clipping.
        precision: ``"full"``, or ``"bfloat16"`` for linear and convolution layers.
        frozen: Name -> parameter of the programs that the step does not move but others do.
        parts: Into how many parts a batch is cut, see :mod:`pvae.parts`.
        group: The processes that share the parts.
    """

    model: Any
    guide: Any
    objective: Objective | PyroObjective
    optimizer: torch.optim.Optimizer
    parameters: Mapping[str, Tensor]
    layout: Layout | None
    data: Any
    device: torch.device
    seed: int
    num_data: int
    preprocess: Callable[[Any], Any] | None = None
    clip_norm: float | None = None
    precision: str = "full"
    frozen: Mapping[str, Tensor] = field(default_factory=dict)
    parts: int = 1
    group: Group | None = None

    def seed_noise(self, step: int, part: int | None = None) -> None:
        """The noise of a step, or of one part of its batch."""
        seed_noise(self.device, self.seed, step, *(() if part is None else (part,)))

    def loss(self, index: Tensor, beta: Any) -> Loss:
        """The objective on the rows ``index`` of the data."""
        batch = take(self.data, index)
        if self.preprocess is not None:
            batch = self.preprocess(batch)
        with precision_context(self.precision):
            return self.objective.evaluate(
                self.model,
                self.guide,
                batch,
                layout=self.layout,  # type: ignore[arg-type]
                beta=beta,
                num_data=self.num_data,
            )

    def buffers(self) -> list[Tensor]:
        """Buffers of both programs, each once (batch normalisation changes them)."""
        modules = [m for m in (module_of(self.model), module_of(self.guide)) if m is not None]
        return list({id(b): b for module in modules for b in module.buffers()}.values())

    def diagnose(
        self, index: Tensor, step: int, beta: Any, part: int | None = None
    ) -> NonFiniteError:
        """Repeat a step, or a part of it, with the same noise and name what was not finite."""
        where, remedy = f"step {step}", "the parameters are as before the step"
        self.seed_noise(step, part)
        with torch.no_grad():
            particles = self.loss(index, beta).particles
        terms = (
            [] if particles is None else [("model", particles.log_p), ("guide", particles.log_q)]
        )
        for role, sites in terms:
            for name, term in sites.items():
                bad = ~torch.isfinite(term).all(0)
                if bool(bad.any()):
                    rows = sorted(index[bad.to(index.device)].tolist())
                    return NonFiniteError(
                        f"{where}: {role} site {name!r} has a log density that is not finite in "
                        f"{len(rows)} of {len(index)} rows of the batch (data rows {_some(rows)}); "
                        f"{remedy}: look at these data, or lower lr"
                    )
        self.seed_noise(step, part)
        names = self._bad_gradients(index, beta)
        return NonFiniteError(
            f"{where}: the gradient of {_some(names) or 'the loss'} is not finite although every "
            f"log density is; {remedy}: clip the gradient (clip_norm) or lower lr"
        )

    def _bad_gradients(self, index: Tensor, beta: Any) -> list[str]:
        tensors = list(self.parameters.values())
        gradients = torch.autograd.grad(self.loss(index, beta).loss, tensors, allow_unused=True)
        return [
            name
            for name, gradient in zip(self.parameters, gradients, strict=True)
            if gradient is not None and not bool(torch.isfinite(gradient).all())
        ]


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


def metrics(loss: Loss) -> Tensor:
    """Sums over the batch of bound, ELBO, reconstruction and KL: ``(4,)`` nats."""
    columns = (loss.bound, loss.elbo, loss.reconstruction, loss.kl)
    return torch.stack([column.detach().sum() for column in columns])


class Eager:
    """The plain step: Pyro's handlers run at every call. It works for every pair."""

    name = "eager"
    seconds = 0.0

    def __init__(self, problem: Problem, reason: str = "") -> None:
        self.problem, self.reason = problem, reason

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
        # A CPU reads what is there already; a GPU would wait, and is checked once an epoch.
        if problem.device.type == "cpu" and not bool(healthy):
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
        self.update = _Update.of(problem.optimizer, self.tensors) if in_graph else None
        self.used: list[Tensor] = []
        self.taken = 0 if self.update is None else self.update.steps_taken()
        self.scalars = torch.ones(4, device=problem.device, dtype=self.tensors[0].dtype)
        data = torch.utils._pytree.tree_leaves(problem.data)
        others = [*problem.frozen.values(), *problem.buffers()]
        held = [*self.tensors, *others, *self._state(), *data, self.scalars]
        self.inputs = [tensor.detach() for tensor in held]
        before = [tensor.clone() for tensor in self.inputs[: -len(data) - 1]]
        try:
            started = time.perf_counter()
            graph = self._trace(held, index)
            self.run = lower(graph, [*self.inputs, index]) if compiled else graph
            if record:
                self.run = _record(self.run, self.inputs, index)
            self._verify(index, before)
            self.seconds = time.perf_counter() - started
        finally:
            self._restore(before)

    def _state(self) -> list[Tensor]:
        return [] if self.update is None else self.update.state()

    def _restore(self, before: list[Tensor]) -> None:
        with torch.no_grad():
            for tensor, value in zip(self.inputs, before, strict=False):
                tensor.copy_(value)

    def _trace(self, held: list[Tensor], index: Tensor) -> Any:
        return capture(lambda held, index: self._body(index), held, index, flat=True)

    def _body(self, index: Tensor) -> tuple[Tensor, ...]:
        beta = self.scalars[0]
        loss = self.problem.loss(index, beta)
        gradients = torch.autograd.grad(loss.loss, self.tensors, allow_unused=True)
        squares = [g.detach().square().sum() for g in gradients if g is not None]
        norm = torch.stack(squares).sum().sqrt()
        healthy = torch.isfinite(norm) & torch.isfinite(loss.loss.detach())
        if self.problem.clip_norm is not None and not self.in_parts:
            factor = (self.problem.clip_norm / (norm + 1e-6)).clamp(max=1)
            gradients = tuple(None if g is None else g * factor for g in gradients)
        found = torch.cat([metrics(loss), norm[None], healthy[None].to(norm.dtype)])
        if self.update is None:
            if (
                self.problem.device.type != "cpu" and not self.in_parts
            ):  # nobody waits to see whether it is healthy
                gradients = tuple(
                    None if g is None else torch.where(healthy, g, 0.0) for g in gradients
                )
            pairs = zip(self.tensors, gradients, strict=True)
            self.used = [tensor for tensor, gradient in pairs if gradient is not None]
            return (found, *[g for g in gradients if g is not None])
        with torch.no_grad():
            self.update(self.tensors, gradients, healthy, self.scalars)
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
            squares = [g.square().sum() for g in gradients if g is not None]
            expected = torch.cat([metrics(loss), torch.stack(squares).sum().sqrt()[None]])
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
        if problem.device.type == "cpu" and not bool(found[5]):
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


class _Update:
    """A torch optimiser's update as tensor operations, on that optimiser's own state."""

    def __init__(self, optimizer: torch.optim.Optimizer, tensors: list[Tensor]) -> None:
        self.optimizer, self.group = optimizer, optimizer.param_groups[0]
        self.tensors = tensors
        self.names, self.rule = _RULES[type(optimizer)]
        if isinstance(optimizer, torch.optim.SGD) and not self.group["momentum"]:
            self.names = ()
        if isinstance(optimizer, torch.optim.RMSprop) and not self.group["momentum"]:
            self.names = ("square_avg",)
        for tensor in tensors:
            state = optimizer.state[tensor]
            if not isinstance(optimizer, torch.optim.SGD):
                state.setdefault("step", torch.zeros((), device=tensor.device))
            for name in self.names:
                if state.get(name) is None:
                    state[name] = torch.zeros_like(tensor, memory_format=torch.preserve_format)

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, tensors: list[Tensor]) -> _Update | None:
        """The update in the graph, or ``None`` where the optimiser has to step by itself."""
        if type(optimizer) not in _RULES or len(optimizer.param_groups) > 1:
            return None
        group = optimizer.param_groups[0]
        unusual = ("amsgrad", "maximize", "centered", "nesterov", "dampening", "differentiable")
        if any(group.get(name) for name in unusual):
            return None
        return cls(optimizer, tensors)

    def state(self) -> list[Tensor]:
        return [self.optimizer.state[t][name] for t in self.tensors for name in self.names]

    def steps_taken(self) -> int:
        return max(int(self.optimizer.state[t].get("step", 0)) for t in self.tensors)

    def set_steps(self, count: int) -> None:
        for tensor in self.tensors:
            if "step" in self.optimizer.state[tensor]:
                self.optimizer.state[tensor]["step"].fill_(count)

    def corrections(self, step: int) -> tuple[float, float]:
        if "betas" not in self.group:
            return 1.0, 1.0
        first, second = self.group["betas"]
        return 1 - first**step, (1 - second**step) ** 0.5

    def __call__(
        self,
        tensors: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        healthy: Tensor,
        scalars: Tensor,
    ) -> None:
        for tensor, gradient in zip(tensors, gradients, strict=True):
            if gradient is None:
                continue
            state = [self.optimizer.state[tensor][name] for name in self.names]
            old = [tensor, *state]
            for target, value in zip(
                old, self.rule(self.group, gradient, *old, scalars=scalars), strict=True
            ):
                target.copy_(torch.where(healthy, value, target))


def _adam(
    group: Mapping[str, Any], g: Tensor, p: Tensor, m: Tensor, v: Tensor, *, scalars: Tensor
) -> tuple[Tensor, ...]:
    _, rate, first, second = scalars.unbind()
    decay = group["weight_decay"]
    if decay and group.get("decoupled_weight_decay"):
        p = p * (1 - rate * decay)
    elif decay:
        g = g + decay * p
    m = m.lerp(g, 1 - group["betas"][0])
    v = v * group["betas"][1] + (1 - group["betas"][1]) * g * g
    return p - (rate / first) * m / (v.sqrt() / second + group["eps"]), m, v


def _sgd(
    group: Mapping[str, Any], g: Tensor, p: Tensor, *buffer: Tensor, scalars: Tensor
) -> tuple[Tensor, ...]:
    if group["weight_decay"]:
        g = g + group["weight_decay"] * p
    if not buffer:
        return (p - scalars[1] * g,)
    moved = group["momentum"] * buffer[0] + g
    return p - scalars[1] * moved, moved


def _rmsprop(
    group: Mapping[str, Any], g: Tensor, p: Tensor, s: Tensor, *buffer: Tensor, scalars: Tensor
) -> tuple[Tensor, ...]:
    if group["weight_decay"]:
        g = g + group["weight_decay"] * p
    s = s * group["alpha"] + (1 - group["alpha"]) * g * g
    change = g / (s.sqrt() + group["eps"])
    if not buffer:
        return p - scalars[1] * change, s
    moved = group["momentum"] * buffer[0] + change
    return p - scalars[1] * moved, s, moved


_RULES: dict[type, tuple[tuple[str, ...], Callable[..., tuple[Tensor, ...]]]] = {
    torch.optim.Adam: (("exp_avg", "exp_avg_sq"), _adam),
    torch.optim.AdamW: (("exp_avg", "exp_avg_sq"), _adam),
    torch.optim.RMSprop: (("square_avg", "momentum_buffer"), _rmsprop),
    torch.optim.SGD: (("momentum_buffer",), _sgd),
}


class Auto:
    """Measures a few eager steps, then takes the engine that pays over the rest of the run.

    Args:
        problem: What the step is about.
        total_steps: Steps of the whole run.
        say: Called once with what was chosen and why.
    """

    _measured = 4
    _staging_pays, _compiling_pays = STAGING_PAYS, COMPILING_PAYS

    def __init__(self, problem: Problem, total_steps: int, say: Callable[[str], None]) -> None:
        self.problem, self.total_steps, self.say = problem, total_steps, say
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
            self._decide(index)
        return found

    def _decide(self, index: Tensor) -> None:
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
            self.chosen = stage(name, self.problem, index, self.total_steps, self.say, cost)
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


# What is tried, in this order, before the programs are run eagerly: compiled, recorded.
_CHAIN = {
    "cudagraph": ((True, True), (False, True), (True, False), (False, False)),
    "compiled": ((True, False), (False, False)),
    "staged": ((False, False),),
}


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
        return Auto(problem, total_steps, say)
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


def _some(items: Sequence[Any], most: int = 5) -> str:
    shown = ", ".join(map(str, items[:most]))
    return shown + (", …" if len(items) > most else "")
