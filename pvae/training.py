"""Training: ``fit`` maximises an objective over a pair of programs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import re
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
from pvae.checkpoints import (
    fingerprint,
    newest,
    save_tensors,
    set_aside,
    steps,
    write_aside,
)
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
from pvae.errors import NonFiniteError, OptionError, ProgramError, RunError, did_you_mean
from pvae.evidence.importance import evaluation
from pvae.interrupts import Interrupts, leave
from pvae.locks import locked
from pvae.objectives import Objective, PyroObjective, as_objective, vae
from pvae.particles import Layout, arguments, check_support, module_of, named_tensors, parameters
from pvae.precision import precision_context
from pvae.progress import Reporter
from pvae.resumption import (
    Place,
    Saver,
    as_every,
    environment,
    pack,
    refuse_difference,
    unpack,
)
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
        stopped: Why it ended: ``"epochs"`` or ``"patience"``; ``"interrupted"`` for a run that was
            loaded before its end.
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
    resume: bool = False,
    checkpoint_every: str | None = "5 minutes",
    keep_checkpoints: int = 2,
    on_nan: str = "stop",
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
        run_dir: Folder for ``metrics.jsonl`` and ``checkpoints/``. With it, a first SIGINT or
            SIGTERM writes a checkpoint after the step at hand and ends the training by
            ``KeyboardInterrupt`` or ``SystemExit``; a second one leaves at once.
        resume: Go on from the newest good checkpoint in ``run_dir``, from the beginning if there
            is none. On the same machine, versions and device the run ends with the bytes of one
            that was never interrupted. Model and guide have to be built as they were then. Another
            ``epochs`` or ``patience`` is taken; a schedule then spans the new number of epochs.
        checkpoint_every: ``"100 steps"``, ``"1 epoch"``, ``"5 minutes"``; ``None`` for no
            checkpoints of the training, ``checkpoints/best`` at its end alone.
        keep_checkpoints: How many of the newest ones stay, beside the best parameters.
        on_nan: ``"stop"`` at a loss or gradient that is not finite, or ``"skip"`` its step (on a
            CPU, where each step is waited for): its rows count in no mean of the epoch, and their
            number is ``left_out`` in the history.
        progress: Show progress: a bar on a terminal, plain lines elsewhere.

    Returns:
        The run, its parameters those of the best validation bound (the last ones without valid).

    Raises:
        PvaeError: An option, the data or the pair is unfit; nothing has been written then.
        RunError: ``run_dir`` is at work in another process, holds a run that ``resume`` was not
            asked for, or one that was started under another configuration.
        OSError: A checkpoint could not be written; those before it are there still.
        NonFiniteError: A loss or gradient was not finite; parameters are those of the best epoch.
    """
    started = time.perf_counter()
    goal = as_objective(vae() if objective is None else objective)
    _check_options(epochs, batch_size, patience, engine, valid)
    plan = as_alternate(alternate)
    _check_alternate(plan, optimizer, valid)
    precision_context(precision)  # refuses a name that it does not know
    folder, every = None if run_dir is None else Path(run_dir), as_every(checkpoint_every)
    _check_run(folder, resume=resume, keep=keep_checkpoints)
    where = _device(device)
    _check_on_nan(on_nan, where)
    data = as_batch(train, device=where)
    held_out = None if valid is None else as_batch(valid, device=where)
    total = num_rows(data)
    for program in (model, guide):
        module = module_of(program)
        if module is not None:
            module.to(where)
    devices = [where] if where.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
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
        run = Run(model, guide, goal, device=str(where), run_dir=folder)
        run.num_parameters = sum(p.numel() for p in weights.values())
        loop = _Loop(
            run, problems, plan, engine, held_out, batch_size, epochs, patience, rates, factor,
            progress, on_nan=on_nan,
        )  # fmt: skip
        if folder is not None:
            stack.enter_context(_taken(folder))
            record = {
                "epochs": epochs, "patience": patience, "batch_size": batch_size,
                "lr_schedule": lr_schedule, "clip_norm": clip_norm, "alternate": plan,
                "optimizer": [type(each.optimizer) for each in problems.values()],
                "lr": [rate for _, rate in rates], "optimizer_options": optimizer_options,
                "objective": goal, "engine": engine, "precision": precision, "seed": seed,
                "on_nan": on_nan,
                "parameters": {name: list(each.shape) for name, each in weights.items()},
            }  # fmt: skip
            facts = _facts(record, data, held_out, where) if every is not None or resume else {}
            if resume:
                loop.resume(folder / "checkpoints", facts)
            if every is not None:
                root = folder / "checkpoints"
                loop.saver = Saver(root, every, keep_checkpoints, facts, step=loop.place.step)
                loop.interrupts = stack.enter_context(Interrupts())
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
    place: Place = field(default_factory=Place)
    best_state: dict[str, Tensor] | None = None
    sums: Tensor | None = None
    engine_state: Mapping[str, Any] = field(default_factory=dict)
    saver: Saver | None = None
    interrupts: Interrupts = field(default_factory=Interrupts)
    on_nan: str = "stop"
    has_warned: bool = False
    step: Step = field(init=False)
    begun: float = 0.0  # when the training would have begun, had it never stopped
    staged_before: float = 0.0  # seconds of tracing and compiling in earlier processes
    epoch_started: float = 0.0
    epoch_staging: float = 0.0

    @property
    def problem(self) -> Problem:
        """The whole, whichever half moves."""
        return self.problems["joint"]

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.problem.num_data / self.batch_size)

    def resume(self, root: Path, facts: Mapping[str, Any]) -> None:
        """Go on from the newest good checkpoint, if there is one.

        Raises:
            RunError: It is of another configuration or pair, or all of them are damaged.
        """
        found = newest(root)
        if found is None:
            return
        folder, saved = found
        about = saved[1]
        refuse_difference(facts["configuration"], about["configuration"], str(self.run.run_dir))
        _compare_environments(facts["environment"], about["environment"])
        self.best_state, self.sums = unpack(saved, self._state(), self.problems, folder)
        self.place, self.engine_state = Place.of(about["place"]), about["engine"]
        self.run.history = list(about["history"])
        self.run.best_epoch = self.place.best_epoch
        if self.epochs < self.place.epoch - 1:
            raise RunError(
                f"{self.run.run_dir} has done {self.place.epoch - 1} epochs already: epochs must "
                f"be at least that, got {self.epochs}"
            )
        for later in steps(root)[::-1]:
            if later == folder:
                break
            set_aside(later)  # damaged

    def run_all(self, started: float) -> None:
        self.begun = started - self.place.seconds
        log = _open_metrics(self.run.run_dir, self.run.history)
        try:
            with Reporter(
                self.epochs, self.steps_per_epoch, enabled=self.progress, done=self.place.step
            ) as reporter:
                self._epochs(reporter, log)
        finally:
            if log is not None:
                log.close()
            self._restore()
            self.run.seconds, self.run.engine = self.place.seconds, self.place.engine
            self.run.staging_seconds = self.place.staging_seconds
        if self.run.run_dir is not None:
            about = {
                "epoch": self.run.best_epoch,
                "step": self.place.step,
                "stopped": self.run.stopped,
            }
            save_tensors(self.run.run_dir / "checkpoints" / "best", self._state(), about)

    def _epochs(self, reporter: Reporter, log: Any) -> None:
        if self._ending() is None:
            self.step = self._step(reporter)
            self.staged_before = self.place.staging_seconds
            if self.engine_state:
                self.step.restore(self.engine_state)
            if self.place.step:
                self._set_lr(self.place.step - 1)
        while self._ending() is None:
            row = self._epoch(reporter)
            self.run.history.append(row)
            if log is not None:
                log.write(json.dumps(row) + "\n")
                log.flush()
            self._keep_best(row)
            reporter.epoch(row)
            place = self.place
            place.epoch, place.batch = place.epoch + 1, 0
            place.epoch_seconds, place.left_out, self.sums = 0.0, 0, None
            self._note_time()
            if self._ending() is None:
                self._heed()
        if hasattr(self, "step"):
            self.step.finish()
            self._save()
        self.run.stopped = self._ending() or "epochs"

    def _note_time(self) -> None:
        self.place.seconds = time.perf_counter() - self.begun
        self.place.staging_seconds = self.staged_before + self.step.seconds
        self.place.engine = f"{self.step.name} ({self.step.reason})"

    def _heed(self) -> None:
        """Between two steps: a checkpoint if it is time for one, and what a signal asks for."""
        number = self.interrupts.number
        if self.saver is not None and (number is not None or self.saver.is_due(self.place)):
            self._save()
        if number is not None:
            leave(number, f"interrupted after step {self.place.step}")

    def _save(self) -> None:
        if self.saver is None:
            return
        self.step.finish()
        self._note_time()
        seconds = self._epoch_seconds() if self.place.batch else 0.0
        place = dataclasses.replace(self.place, epoch_seconds=seconds)
        sums = self._no_sums() if self.sums is None else self.sums
        saved = pack(self._state(), self.best_state, self.problems, sums)
        self.saver.save(place, saved, self.run.history, self.step.state())

    def _no_sums(self) -> Tensor:
        return torch.zeros(len(METRICS), dtype=torch.float64, device=self.problem.device)

    def _ending(self) -> str | None:
        """Why the training is over, if it is."""
        done = self.place.epoch - 1
        if self.place.batch:
            return None
        if self.patience is not None and done - self.place.best_epoch >= self.patience:
            return "patience"
        return "epochs" if done >= self.epochs else None

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

    def _epoch(self, reporter: Reporter) -> dict[str, float]:
        place, total = self.place, self.problem.num_data
        self.epoch_started, self.epoch_staging = time.perf_counter(), self.step.seconds
        self.sums = self._no_sums() if self.sums is None else self.sums
        for index in itertools.islice(self._batches(place.epoch), place.batch, None):
            found = self._take(index)
            self.sums += found
            place.step, place.batch = place.step + 1, place.batch + 1
            reporter.step(found, len(index))
            if place.batch < self.steps_per_epoch:
                self._heed()
        seconds = place.epoch_seconds = self._epoch_seconds()
        self.epoch_started, self.epoch_staging = time.perf_counter(), self.step.seconds
        row: dict[str, float] = {"epoch": place.epoch, "step": place.step}
        means = (self.sums / max(total - place.left_out, 1)).tolist()
        row |= _known(zip(METRICS, means, strict=True))
        row["beta"] = float(self.problem.objective.schedule(place.step - 1))
        row["lr"] = float(self.problem.optimizer.param_groups[0]["lr"])
        row |= {"seconds": seconds, "steps_per_second": self.steps_per_epoch / max(seconds, 1e-9)}
        if place.left_out:
            row["left_out"] = place.left_out
        self._check_finite(row)
        if self.valid is not None:
            row |= {f"valid_{name}": value for name, value in self._validate().items()}
        if isinstance(self.step, Turns):
            row |= self.step.end_epoch(row)
        return row

    def _take(self, index: Tensor) -> Tensor:
        """One step, or nothing where it is not finite and may be left out."""
        place = self.place
        self._set_lr(place.step)
        try:
            beta = float(self.problem.objective.schedule(place.step))
            return self.step(index, place.step, beta)
        except NonFiniteError as error:
            if self.on_nan == "stop":
                raise NonFiniteError(f"epoch {place.epoch}, {error}") from None
            if not self.has_warned:
                warnings.warn(f"left out: epoch {place.epoch}, {error}", UserWarning, stacklevel=2)
            self.has_warned = True
            place.left_out += len(index)
            return torch.zeros(len(METRICS), device=self.problem.device)

    def _epoch_seconds(self) -> float:
        """Time of the epoch at hand, without tracing and compiling."""
        staging = self.step.seconds - self.epoch_staging
        return self.place.epoch_seconds + time.perf_counter() - self.epoch_started - staging

    def _batches(self, epoch: int) -> Iterator[Tensor]:
        """Row indices of each batch, in an order that depends on (seed, epoch) alone."""
        generator = torch.Generator().manual_seed(mix(self.problem.seed, -2, epoch))
        order = torch.randperm(self.problem.num_data, generator=generator)
        yield from torch.split(order.to(self.problem.device), self.batch_size)

    def _set_lr(self, step: int) -> None:
        factor = self.factor(step)
        for group, rate in self.rates:
            group["lr"] = rate * factor

    def _check_finite(self, row: Mapping[str, float]) -> None:
        """The guard of devices whose steps are not waited for: once an epoch."""
        if not math.isfinite(row["bound"]):
            raise NonFiniteError(
                f"epoch {row['epoch']}: the bound is not finite; the parameters are those of epoch "
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
                if self.interrupts.number is not None:
                    self._heed()
                loss = problem.objective.evaluate(
                    problem.model,
                    problem.guide,
                    take(self.valid, index),
                    layout=problem.layout,  # type: ignore[arg-type]
                    num_data=problem.num_data,
                )
                sums += metrics(loss).double().cpu()
        return _known(zip(METRICS, (sums / total).tolist(), strict=True))

    def _keep_best(self, row: Mapping[str, float]) -> None:
        place = self.place
        if self.valid is None:
            place.best_epoch = place.epoch
        elif row["valid_bound"] > (-math.inf if place.best is None else place.best):
            place.best, place.best_epoch = row["valid_bound"], place.epoch
            self.best_state = {name: t.detach().clone() for name, t in self._state().items()}
        self.run.best_epoch = place.best_epoch

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


def _check_on_nan(on_nan: str, device: torch.device) -> None:
    if on_nan not in ("stop", "skip"):
        raise OptionError(f"on_nan takes 'stop' or 'skip', got {on_nan!r}")
    if on_nan == "skip" and device.type != "cpu":
        raise OptionError(
            f"on_nan='skip' needs a CPU, whose steps are waited for, and this is {device}: leave "
            "it out, or pass device='cpu'"
        )


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


# --- the run folder ------------------------------------------------------------------------------


def _check_run(folder: Path | None, *, resume: bool, keep: int) -> None:
    if keep < 1:
        raise OptionError(f"keep_checkpoints must be at least 1, got {keep}")
    if resume and folder is None:
        raise OptionError("resume goes on with what is in a run folder: pass run_dir=")
    if folder is not None and not resume and steps(folder / "checkpoints"):
        raise RunError(
            f"{folder} holds a run already: go on with it by resume=True, or choose another folder"
        )


@contextlib.contextmanager
def _taken(folder: Path) -> Iterator[None]:
    """The run folder, made if need be, for this process alone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None
    with locked(folder, again=True):
        yield


def _unwritable(folder: Path, error: OSError) -> OptionError:
    return OptionError(
        f"run_dir {folder} cannot be written ({error.strerror}): choose another folder"
    )


def _open_metrics(run_dir: Path | None, history: list[dict[str, float]]) -> Any:
    """``metrics.jsonl``, with the epochs that were done and no half line."""
    if run_dir is None:
        return None
    path = run_dir / "metrics.jsonl"
    if history:
        write_aside(path, "".join(json.dumps(row) + "\n" for row in history).encode())
        return path.open("a")
    try:
        return path.open("w")
    except OSError as error:
        raise _unwritable(run_dir, error) from None


def _facts(
    record: Mapping[str, Any], data: Any, valid: Any, device: torch.device
) -> dict[str, Any]:
    """What a checkpoint says of the training it belongs to."""
    words = {key: _in_words(value) for key, value in record.items()}
    words["data"] = fingerprint(data)
    words["valid"] = None if valid is None else fingerprint(valid)
    return {"configuration": words, "environment": environment(device)}


def _in_words(value: Any) -> Any:
    """JSON that is the same in every process."""
    if isinstance(value, Mapping):
        return {str(key): _in_words(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_in_words(entry) for entry in value]
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    text = value.__qualname__ if hasattr(value, "__qualname__") else repr(value)
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _compare_environments(now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    changed = [
        f"{key} was {before.get(key)} and is {now[key]}"
        for key in now
        if now[key] != before.get(key)
    ]
    if changed:
        warnings.warn(
            f"the run goes on elsewhere than it began ({'; '.join(changed)}): its last digits may "
            "differ from those of a run that was never interrupted",
            UserWarning,
            stacklevel=3,
        )


def _warn_of_beta(objective: Objective | PyroObjective, steps: int) -> None:
    final = objective.schedule(steps - 1)
    if abs(final - 1) > 1e-6:
        warnings.warn(
            f"the KL weight ends at {final:g}, not 1: 'bound' is then no bound on log p(x); 'elbo' "
            "in the history is",
            UserWarning,
            stacklevel=3,
        )
