"""Training: ``fit`` maximises an objective over a pair of programs."""

from __future__ import annotations

import functools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pvae.alternation import Alternate, Turns, as_alternate, split
from pvae.checkpoints import save_tensors
from pvae.data import as_batch, num_rows, take
from pvae.engine import (
    ENGINES,
    METRICS,
    Problem,
    Step,
    build_optimizer,
    metrics,
    mix,
    seed_noise,
    stage,
)
from pvae.errors import NonFiniteError, OptionError, ProgramError, did_you_mean
from pvae.evidence.importance import evaluation
from pvae.objectives import Objective, PyroObjective, as_objective, vae
from pvae.particles import Layout, arguments, check_support, module_of, named_tensors, parameters
from pvae.precision import precision_context
from pvae.progress import Reporter
from pvae.schedules import Schedule

__all__ = ["Run", "fit", "lr_schedule"]

_EVALUATION_BATCH = 1024


@dataclass
class Run:
    """What :func:`fit` leaves: the trained pair and how it got there.

    Attributes:
        model: The generative program; its parameters are the best of the run.
        guide: The inference program, likewise.
        objective: What was maximised.
        history: One dict per epoch: bound, elbo, reconstruction, kl (train and valid_*) in nats per
            datum, beta, lr, seconds (without tracing and compiling), steps_per_second; with
            ``alternate`` also e_steps, m_steps and joint_steps.
        best_epoch: The epoch whose parameters were kept.
        num_parameters: Number of trained numbers.
        seconds: Time of the training.
        device: Where it ran.
        engine: What took the steps, with the reason.
        staging_seconds: Time it took to trace and compile the step, part of ``seconds``.
        run_dir: Its folder, if it has one.
        stopped: Why it ended: ``"epochs"`` or ``"patience"``.
    """

    model: Any
    guide: Any
    objective: Objective | PyroObjective
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    num_parameters: int = 0
    seconds: float = 0.0
    device: str = "cpu"
    engine: str = "eager"
    staging_seconds: float = 0.0
    run_dir: Path | None = None
    stopped: str = "epochs"


def fit(
    model: Any,
    guide: Any,
    train: Any,
    *,
    objective: Any = None,
    valid: Any = None,
    epochs: int = 50,
    batch_size: int = 128,
    optimizer: Any = "adam",
    lr: float = 1e-3,
    optimizer_options: Mapping[str, Any] | None = None,
    lr_schedule: str | Schedule = "constant",
    clip_norm: float | None = None,
    alternate: Alternate | int | str | None = None,
    patience: int | None = None,
    preprocess: Callable[[Any], Any] | None = None,
    engine: str = "auto",
    precision: str = "full",
    device: str = "auto",
    seed: int = 0,
    run_dir: str | Path | None = None,
    progress: bool = True,
) -> Run:
    """Train a model and a guide together on data.

    Data lie on the device and batches are gathered by index; their order and all noise come from
    ``(seed, step)`` alone, and the caller's random streams are left untouched. Every reported bound
    is a mean over data, in nats per datum.

    Args:
        model: The generative program.
        guide: The inference program.
        train: Tensor or array ``(N, ...)``, a tuple or dict of them, or a split of a data set.
        objective: An :class:`pvae.Objective`, or one of ``pyro.infer``'s ELBOs; ``pvae.vae()``.
        valid: Held-out data. Its bound is taken after each epoch and the best parameters are kept.
        epochs: Passes over the data.
        batch_size: Data per step; the last batch of an epoch may be smaller.
        optimizer: Name in ``torch.optim`` (adam, sgd, rmsprop, …), class, or instance.
        lr: Learning rate.
        optimizer_options: Further arguments of the optimiser.
        lr_schedule: ``"constant"``, ``"cosine"``, ``"linear"`` or a callable ``step -> factor``.
        clip_norm: Largest norm of the gradient.
        alternate: Variational EM: a number of steps that move the guide alone, or
            ``"until-flat"``, before each step that moves the model alone; more in
            :class:`pvae.Alternate`. Each half has an optimiser of its own; what both programs
            share is the model's. ``None`` moves both at every step.
        patience: Stop after this many epochs without a better validation bound.
        preprocess: Applied to each training batch, on the device, with the step's noise.
        engine: How a step is taken, see :mod:`pvae.engine`: ``"auto"`` chooses what pays,
            ``"eager"``, ``"staged"``, ``"compiled"`` or ``"cudagraph"``.
        precision: ``"full"``, or ``"bfloat16"`` for the products inside linear and convolution
            layers; densities and bounds stay in the precision of the data.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ….
        seed: Seed of order and noise.
        run_dir: Folder for ``metrics.jsonl`` and ``checkpoints/``.
        progress: Show progress: a bar on a terminal, plain lines elsewhere.

    Returns:
        The run, its parameters those of the best validation bound (the last ones without valid).

    Raises:
        PvaeError: An option, the data or the pair is unfit; nothing has been written then.
        NonFiniteError: A loss or gradient was not finite; parameters are those of the best epoch.
    """
    started = time.perf_counter()
    goal = as_objective(vae() if objective is None else objective)
    _check_options(epochs, batch_size, patience, engine, valid)
    plan = as_alternate(alternate)
    _check_alternate(plan, optimizer, valid)
    precision_context(precision)  # refuses a name that it does not know
    where = _device(device)
    data = as_batch(train, device=where, model=model)
    held_out = None if valid is None else as_batch(valid, device=where, model=model)
    total = num_rows(data)
    for program in (model, guide):
        module = module_of(program)
        if module is not None:
            module.to(where)
    devices = [where] if where.type == "cuda" else []
    with torch.random.fork_rng(devices):
        seed_noise(where, seed, -1)
        example = take(data, torch.arange(min(batch_size, total), device=where))
        example = example if preprocess is None else preprocess(example)
        layout = goal.prepare(model, guide, example)
        if layout is not None and preprocess is None:
            _check_all_supports(layout, data)
        weights = parameters(model, guide, example)
        if not weights:
            raise ProgramError(
                "there is nothing to train: neither model nor guide has parameters (nn.Parameter, "
                "pyro.param or pyro.module)"
            )
        steps_per_epoch = math.ceil(total / batch_size)
        factor = _lr_factor(lr_schedule, steps_per_epoch * epochs)
        build = functools.partial(build_optimizer, optimizer, lr=lr, options=optimizer_options)
        optim = build(list(weights.values()))
        problem = Problem(
            model, guide, goal, optim, weights, layout, data, where, seed, total, preprocess,
            clip_norm, precision,
        )  # fmt: skip
        rows = torch.arange(min(batch_size, total), device=where)
        problems = {"joint": problem} | ({} if plan is None else split(problem, rows, build))
        groups = [group for each in problems.values() for group in each.optimizer.param_groups]
        rates = [(group, group["lr"]) for group in groups]
        run = Run(model, guide, goal, device=str(where))
        run.num_parameters = sum(p.numel() for p in weights.values())
        run.run_dir = None if run_dir is None else Path(run_dir)
        loop = _Loop(
            run, problems, plan, engine, held_out, batch_size, epochs, patience, rates, factor,
            progress,
        )  # fmt: skip
        with pyro.validation_enabled(False):
            loop.run_all(started)
    _warn_of_beta(goal, steps_per_epoch * epochs)
    return run


@dataclass
class _Loop:
    """The epochs of one call of :func:`fit`."""

    run: Run
    problems: Mapping[str, Problem]
    plan: Alternate | None
    engine: str
    valid: Any
    batch_size: int
    epochs: int
    patience: int | None
    rates: list[tuple[dict[str, Any], float]]
    factor: Schedule
    progress: bool
    step: int = 0
    best: float = -math.inf
    best_state: dict[str, Tensor] | None = None

    @property
    def problem(self) -> Problem:
        """The whole, whichever half moves."""
        return self.problems["joint"]

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.problem.num_data / self.batch_size)

    def run_all(self, started: float) -> None:
        log = _open_metrics(self.run.run_dir)
        try:
            with Reporter(self.epochs, self.steps_per_epoch, enabled=self.progress) as reporter:
                self._epochs(reporter, log, started)
        finally:
            if log is not None:
                log.close()
            self._restore()
            self.run.seconds = time.perf_counter() - started
        if self.run.run_dir is not None:
            about = {"epoch": self.run.best_epoch, "step": self.step}
            save_tensors(self.run.run_dir / "checkpoints" / "best", self._state(), about)

    def _epochs(self, reporter: Reporter, log: Any, started: float) -> None:
        take_step = self._step(reporter)
        for epoch in range(1, self.epochs + 1):
            row = self._epoch(epoch, take_step, reporter)
            self.run.history.append(row)
            self.run.seconds = time.perf_counter() - started
            if log is not None:
                log.write(json.dumps(row) + "\n")
                log.flush()
            self._keep_best(epoch, row)
            reporter.epoch(row)
            if self.patience is not None and epoch - self.run.best_epoch >= self.patience:
                self.run.stopped = "patience"
                break
        take_step.finish()
        self.run.engine = f"{take_step.name} ({take_step.reason})"
        self.run.staging_seconds = take_step.seconds

    def _step(self, reporter: Reporter) -> Step:
        example = torch.arange(
            min(self.batch_size, self.problem.num_data), device=self.problem.device
        )
        total = self.epochs * self.steps_per_epoch
        if self.plan is None:
            return stage(self.engine, self.problem, example, total, reporter.say)

        def make(problem: Problem, steps: int, phase: str) -> Step:
            return stage(
                self.engine, problem, example, steps, lambda text: reporter.say(f"{phase}: {text}")
            )

        return Turns(self.plan, self.problems, make, total)

    def _epoch(self, epoch: int, take_step: Step, reporter: Reporter) -> dict[str, float]:
        started, staging = time.perf_counter(), take_step.seconds
        sums = torch.zeros(len(METRICS), dtype=torch.float64, device=self.problem.device)
        beta = 1.0
        for index in self._batches(epoch):
            beta = float(self.problem.objective.schedule(self.step))
            self._set_lr()
            try:
                found = take_step(index, self.step, beta)
            except NonFiniteError as error:
                raise NonFiniteError(f"epoch {epoch}, {error}") from None
            sums += found
            self.step += 1
            reporter.step(found, len(index))
        seconds = time.perf_counter() - started - (take_step.seconds - staging)
        row: dict[str, float] = {"epoch": epoch, "step": self.step}
        row |= _known(zip(METRICS, (sums / self.problem.num_data).tolist(), strict=True))
        row |= {"beta": beta, "lr": float(self.problem.optimizer.param_groups[0]["lr"])}
        row |= {"seconds": seconds, "steps_per_second": self.steps_per_epoch / max(seconds, 1e-9)}
        self._check_finite(row, epoch)
        if self.valid is not None:
            row |= {f"valid_{name}": value for name, value in self._validate().items()}
        if isinstance(take_step, Turns):
            row |= take_step.end_epoch(row)
        return row

    def _batches(self, epoch: int) -> Iterator[Tensor]:
        """Row indices of each batch, in an order that depends on (seed, epoch) alone."""
        generator = torch.Generator().manual_seed(mix(self.problem.seed, -2, epoch))
        order = torch.randperm(self.problem.num_data, generator=generator)
        yield from torch.split(order.to(self.problem.device), self.batch_size)

    def _set_lr(self) -> None:
        factor = self.factor(self.step)
        for group, rate in self.rates:
            group["lr"] = rate * factor

    def _check_finite(self, row: Mapping[str, float], epoch: int) -> None:
        """The guard of devices whose steps are not waited for: once an epoch."""
        if not math.isfinite(row["bound"]):
            raise NonFiniteError(
                f"epoch {epoch}: the bound is not finite; the parameters are those of epoch "
                f"{self.run.best_epoch}: lower lr or clip the gradient (clip_norm)"
            )

    def _validate(self) -> dict[str, float]:
        """The bound of the held-out data at KL weight one, with the same noise each epoch."""
        problem = self.problem
        sums, total = torch.zeros(len(METRICS), dtype=torch.float64), num_rows(self.valid)
        seed = mix(problem.seed, -3)
        with evaluation(problem.model, problem.guide, seed=seed, device=problem.device):
            rows = torch.arange(total, device=problem.device)
            for index in torch.split(rows, _EVALUATION_BATCH):
                loss = problem.objective.evaluate(
                    problem.model,
                    problem.guide,
                    take(self.valid, index),
                    layout=problem.layout,  # type: ignore[arg-type]
                    num_data=problem.num_data,
                )
                sums += metrics(loss).double().cpu()
        return _known(zip(METRICS, (sums / total).tolist(), strict=True))

    def _keep_best(self, epoch: int, row: Mapping[str, float]) -> None:
        if self.valid is None:
            self.run.best_epoch = epoch
        elif row["valid_bound"] > self.best:
            self.best, self.run.best_epoch = row["valid_bound"], epoch
            self.best_state = {name: t.detach().clone() for name, t in self._state().items()}

    def _state(self) -> dict[str, Tensor]:
        """Every parameter and buffer of the pair, by name, each tensor once."""
        state = named_tensors(self.run.model, self.run.guide)
        seen = {id(tensor) for tensor in state.values()}
        stored = self.problem.parameters.items()
        return state | {name: tensor for name, tensor in stored if id(tensor) not in seen}

    def _restore(self) -> None:
        if self.best_state is not None:
            with torch.no_grad():
                for name, tensor in self._state().items():
                    tensor.copy_(self.best_state[name])


def _known(pairs: Any) -> dict[str, float]:
    """Without the entries that Pyro's own ELBOs do not tell apart."""
    return {
        name: value for name, value in pairs if name in ("bound", "elbo") or not math.isnan(value)
    }


def _check_options(
    epochs: int, batch_size: int, patience: int | None, engine: str, valid: Any
) -> None:
    if epochs < 1 or batch_size < 1:
        raise OptionError(
            f"epochs and batch_size must be at least 1, got epochs={epochs}, "
            f"batch_size={batch_size}"
        )
    if engine not in ENGINES:
        raise OptionError(f"no engine is called {engine!r}: {did_you_mean(engine, ENGINES)}")
    if patience is not None and valid is None:
        raise OptionError("patience needs held-out data to judge by: pass valid=")
    if patience is not None and patience < 1:
        raise OptionError(f"patience must be at least 1 epoch, got {patience}")


def _check_alternate(plan: Alternate | None, optimizer: Any, valid: Any) -> None:
    if plan is None:
        return
    if isinstance(optimizer, torch.optim.Optimizer):
        raise OptionError(
            "alternate gives each half an optimiser of its own: pass optimizer= by name or class, "
            "not an instance"
        )
    if valid is None and str(plan.while_rising).startswith("valid_"):
        raise OptionError(
            f"while_rising={plan.while_rising!r} needs held-out data to judge by: pass valid="
        )


def _device(name: str) -> torch.device:
    """``auto`` is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"device {name!r} cannot be used ({reason}): try 'cpu'") from None
    return device


def _check_all_supports(layout: Layout, data: Any) -> None:
    args, kwargs = arguments(data)
    entries: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    for name, (key, support) in layout.supports.items():
        if key in entries:
            check_support(name, support, entries[key])


def lr_schedule(name: str, steps: int) -> Schedule:
    """A named learning-rate schedule over ``steps`` steps: constant, cosine or linear.

    Raises:
        OptionError: there is none of that name.
    """
    known: dict[str, Schedule] = {
        "constant": lambda step: 1.0,
        "cosine": lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0))),
        "linear": lambda step: 1 - min(step / steps, 1.0),
    }
    if name not in known:
        raise OptionError(f"no lr_schedule is called {name!r}: {did_you_mean(name, known)}")
    return known[name]


def _lr_factor(schedule: str | Schedule, steps: int) -> Schedule:
    return schedule if callable(schedule) else lr_schedule(schedule, steps)


def _open_metrics(run_dir: Path | None) -> Any:
    if run_dir is None:
        return None
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        return (run_dir / "metrics.jsonl").open("w")
    except OSError as error:
        raise OptionError(
            f"run_dir {run_dir} cannot be written ({error.strerror}): choose another folder"
        ) from None


def _warn_of_beta(objective: Objective | PyroObjective, steps: int) -> None:
    final = objective.schedule(steps - 1)
    if abs(final - 1) > 1e-6:
        warnings.warn(
            f"the KL weight ends at {final:g}, not 1: 'bound' is then no bound on log p(x); 'elbo' "
            "in the history is",
            UserWarning,
            stacklevel=3,
        )
