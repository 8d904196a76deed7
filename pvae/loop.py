"""The epochs of a training: steps, validation, the best parameters, checkpoints, interruptions."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pvae.alternation import Alternate, Turns
from pvae.checkpoints import Saved, newest, save_tensors, set_aside_after, write_aside
from pvae.data import num_rows, take
from pvae.distributed import Group, agree
from pvae.engine import METRICS, Eager, Problem, Step, metrics, mix, seed_noise, stage
from pvae.errors import NonFiniteError, RunError
from pvae.evidence.importance import evaluation
from pvae.interrupts import Interrupts
from pvae.launchers import leads
from pvae.objectives import Objective, PyroObjective
from pvae.particles import named_tensors
from pvae.parts import cut, own
from pvae.progress import Reporter
from pvae.resumption import Place, Saver, heed, pack, refuse_difference, unpack, unwritable
from pvae.rollback import MOST, GoodStates, rate_factor
from pvae.schedules import Schedule
from pvae.trackers import Tracker

__all__ = ["Loop", "Run", "compare_environments", "open_metrics"]

EVALUATION_BATCH = 1024


@dataclass
class Run:
    """What :func:`fit` leaves: the trained pair and how it got there.

    Attributes:
        model: The generative program; its parameters are the best of the run.
        guide: The inference program, likewise.
        objective: What was maximised.
        history: One dict per epoch: bound, elbo, reconstruction, kl (train and valid_*) in nats per
            datum (NaN where all rows of an epoch were left out), beta, lr, seconds (without tracing
            and compiling), steps_per_second; with ``alternate`` also e_steps, m_steps and
            joint_steps.
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


@dataclass
class Loop:
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
    trackers: Sequence[Tracker] = ()
    place: Place = field(default_factory=Place)
    best_state: dict[str, Tensor] | None = None
    sums: Tensor | None = None
    engine_state: Mapping[str, Any] = field(default_factory=dict)
    saver: Saver | None = None
    interrupts: Interrupts = field(default_factory=Interrupts)
    on_nan: str = "stop"
    has_warned: bool = False
    good: GoodStates | None = None  # where it may be rolled back to
    bucket_by: Tensor | None = None
    valid_every: int = 1
    step: Step = field(init=False)
    reporter: Reporter = field(init=False)
    begun: float = 0.0  # when the training would have begun, had it never stopped
    staged_before: float = 0.0  # seconds of tracing and compiling in earlier processes
    epoch_started: float = 0.0
    epoch_staging: float = 0.0

    def __post_init__(self) -> None:
        if self.on_nan == "rollback":
            self.good = GoodStates(self._state(), self.problems)

    @property
    def problem(self) -> Problem:
        """The whole, whichever half moves."""
        return self.problems["joint"]

    @property
    def group(self) -> Group | None:
        """The processes that share the work; the first of them writes."""
        return self.problem.group

    @property
    def steps_per_epoch(self) -> int:
        """Batches of the training data."""
        return math.ceil(self.problem.num_data / self.batch_size)

    def resume(self, root: Path, facts: Mapping[str, Any]) -> None:
        """Go on from the newest good checkpoint, if there is one.

        Raises:
            RunError: It is of another configuration or pair, or all of them are damaged.
        """
        found = newest(root)
        agree(self.group, f"{found and found[0].name} in {root}")
        if found is None:
            return
        folder, saved = found
        try:
            self._put_back(folder, saved, facts)
        except (KeyError, TypeError, AttributeError, IndexError):
            raise RunError(f"{folder} is no checkpoint of a training") from None
        if self.epochs < self.place.epoch - 1:
            raise RunError(
                f"{self.run.run_dir} has done {self.place.epoch - 1} epochs already: epochs must "
                f"be at least that, got {self.epochs}"
            )
        if leads(self.group):
            set_aside_after(folder)

    def _put_back(self, folder: Path, saved: Saved, facts: Mapping[str, Any]) -> None:
        about = saved[1]
        refuse_difference(facts["configuration"], about["configuration"], str(self.run.run_dir))
        compare_environments(facts["environment"], about["environment"])
        self.best_state, self.sums = unpack(saved, self._state(), self.problems, folder)
        self.place, self.engine_state = Place.of(about["place"]), about["engine"]
        self.run.history = list(about["history"])
        self.run.best_epoch = self.place.best_epoch
        if self.good is not None:
            self.good.unpack(saved)

    def run_all(self, started: float) -> None:
        """Train to the end, from where the loop stands; the pair is left with the best parameters.

        Args:
            started: When this process began, by ``time.perf_counter``.
        """
        self.begun = started - self.place.seconds
        folder = self.run.run_dir if leads(self.group) else None
        log = open_metrics(folder, self.run.history)
        try:
            with Reporter(
                self.epochs, self.steps_per_epoch, enabled=self.progress, done=self.place.step
            ) as reporter:
                self._epochs(reporter, log)
        finally:
            if log is not None:
                log.close()
            self._restore()
            for group, rate in self.rates:  # an optimizer made before may be used again
                group["lr"] = rate
            self.run.seconds, self.run.engine = self.place.seconds, self.place.engine
            self.run.staging_seconds = self.place.staging_seconds
        if folder is not None:
            about = {
                "epoch": self.run.best_epoch,
                "step": self.place.step,
                "stopped": self.run.stopped,
            }
            save_tensors(folder / "checkpoints" / "best", self._state(), about)
        for tracker in self.trackers:
            tracker.finish(self.run)

    def _epochs(self, reporter: Reporter, log: Any) -> None:
        if self._ending() is None:
            self.reporter = reporter
            self.step = self._step(reporter)
            self.staged_before = self.place.staging_seconds
            if self.engine_state:
                self.step.restore(self.engine_state)
            if self.place.step:
                self._set_lr(self.place.step - 1)
        for tracker in self.trackers:
            tracker.start(self.run)
        while self._ending() is None:
            row = self._epoch(reporter)
            self.run.history.append(row)
            if log is not None:
                log.write(json.dumps(row) + "\n")
                log.flush()
            self._keep_best(row)
            reporter.epoch(row)
            for tracker in self.trackers:
                tracker.epoch(self.run, row)
            place = self.place
            place.epoch, place.batch = place.epoch + 1, 0
            place.epoch_seconds, place.left_out, place.rolled_back = 0.0, 0, 0
            self.sums = None
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
        # All ranks stop after the same step.
        number = self.interrupts.number if self.group is None else self.group.heard
        heed(number, self.saver, self.place, self._save)

    def _save(self) -> None:
        if self.saver is None:
            return
        self.step.finish()
        self._note_time()
        seconds = self._epoch_seconds() if self.place.batch else 0.0
        place = dataclasses.replace(self.place, epoch_seconds=seconds)
        sums = self._no_sums() if self.sums is None else self.sums
        saved = pack(self._state(), self.best_state, self.problems, sums)
        if self.good is not None:
            tensors, about = self.good.pack()
            saved = saved[0] | tensors, saved[1] | about
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
            self._guard()
            found = self._take(index)
            self.sums += found
            place.step, place.batch = place.step + 1, place.batch + 1
            reporter.step(found, len(index))
            if place.batch < self.steps_per_epoch:
                self._heed()
        self._guard(at_end=True)
        seconds = place.epoch_seconds = self._epoch_seconds()
        self.epoch_started, self.epoch_staging = time.perf_counter(), self.step.seconds
        row: dict[str, float] = {"epoch": place.epoch, "step": place.step}
        means = (self.sums / (total - place.left_out)).tolist()  # of no step: not a number
        row |= _known(zip(METRICS, means, strict=True))
        row["beta"] = float(self.problem.objective.schedule(place.step - 1))
        row["lr"] = float(self.problem.optimizer.param_groups[0]["lr"])
        row |= {"seconds": seconds, "steps_per_second": self.steps_per_epoch / max(seconds, 1e-9)}
        row |= {k: n for k in ("left_out", "rolled_back") if (n := getattr(place, k))}
        self._check_finite(row)
        if self.valid is not None and self._is_judged(place.epoch):
            row |= {f"valid_{name}": value for name, value in self._validate().items()}
        if isinstance(self.step, Turns):
            row |= self.step.end_epoch(row)
        return row

    def _is_judged(self, epoch: int) -> bool:
        return epoch % self.valid_every == 0 or epoch == self.epochs

    def _take(self, index: Tensor) -> Tensor:
        """One step, or nothing where it is not finite and may be left out."""
        place = self.place
        self._set_lr(place.step)
        if self.group is not None:
            self.group.asked = self.interrupts.number
        skips = self.on_nan == "skip"
        before = [buffer.clone() for buffer in self.problem.buffers()] if skips else []
        try:
            beta = float(self.problem.objective.schedule(place.step))
            return self.step(index, place.step, beta)
        except NonFiniteError as error:
            if self.on_nan == "stop":
                raise NonFiniteError(f"epoch {place.epoch}, {error}") from None
            if self.good is not None:
                self._roll_back(error)
            elif not self.has_warned:
                warnings.warn(f"left out: epoch {place.epoch}, {error}", UserWarning, stacklevel=2)
            self.has_warned = True
            for buffer, kept in zip(self.problem.buffers() if skips else [], before, strict=True):
                buffer.copy_(kept)  # what the step had made of statistics is left out too
            place.left_out += len(index)
            return torch.zeros(len(METRICS), device=self.problem.device)

    # --- back to a good state ---

    def _guard(self, *, at_end: bool = False) -> None:
        """Between two steps: keep the state if it is time, and look whether all was finite.

        Steps that are waited for say so themselves; of others this is the one look in an interval.
        """
        assert self.sums is not None
        if self.good is None:
            return
        waits, place = self.problem.waits, self.place
        if self.good.is_due(place.step):
            self.step.finish()
            if self.good.keep(place, self.sums) or waits:
                return
        elif not at_end or waits or bool(torch.isfinite(self.sums[0])):
            return
        if not self.good.kept:
            return
        sums, batch, left_out = self.good.clean(place)
        self._roll_back(self._found_again())
        self.sums.copy_(sums)
        rows = min(place.batch * self.batch_size, self.problem.num_data) - batch * self.batch_size
        place.left_out = left_out + rows
        self.good.stand(place, self.sums)

    def _roll_back(self, error: NonFiniteError) -> None:
        """Put back the last good state; the steps that follow have other noise and other rows.

        Raises:
            NonFiniteError: It has been done too often.
        """
        good, place = self.good, self.place
        if good is None or not good.kept:
            raise NonFiniteError(f"epoch {place.epoch}, {error}") from None
        self.step.finish()
        step = good.put_back()
        if place.rollbacks >= MOST:
            raise NonFiniteError(
                f"epoch {place.epoch}, {error}; {MOST} rollbacks, the last at "
                f"{rate_factor(MOST):.2g} of the learning rate, did not help"
            ) from None
        place.rollbacks, place.rolled_back = place.rollbacks + 1, place.rolled_back + 1
        rate = rate_factor(place.rollbacks)
        slower = "" if rate == 1 else f", from here on with {rate:.2g} of the learning rate"
        warnings.warn(
            f"rolled back to step {step} ({place.rollbacks} of at most {MOST} times{slower}): "
            f"epoch {place.epoch}, {error}",
            UserWarning,
            stacklevel=2,
        )
        assert self.sums is not None
        good.stand(place, self.sums)
        # The optimiser's state may lie in a graph: a new step takes it up as a resumed run does.
        known = self.step.state()
        self.staged_before += self.step.seconds
        self.epoch_staging -= self.step.seconds
        self.step = self._step(self.reporter)
        self.step.restore(known)

    def _found_again(self) -> NonFiniteError:
        """What was not finite: the steps since the last good state once more, each waited for."""
        assert self.good is not None
        good = self.good.kept[-1]
        if self.plan is None and self.problem.parts == 1:
            self.step.finish()
            unpack(good.saved, self._state(), self.problems, Path("in memory"))
            careful = Eager(self.problem, waits=True)
            try:
                self._repeat(careful, good.since, good.epoch, good.batch)
            except NonFiniteError as error:
                return error
        return NonFiniteError(
            f"steps {good.since} to {self.place.step - 1}: the bound or the parameters were not "
            "finite: lower lr or clip the gradient (clip_norm)"
        )

    def _repeat(self, take_step: Step, step: int, epoch: int, batch: int) -> None:
        while step < self.place.step:
            for index in itertools.islice(self._batches(epoch), batch, None):
                if step == self.place.step:
                    return
                self._set_lr(step)
                take_step(index, step, float(self.problem.objective.schedule(step)))
                step += 1
            epoch, batch = epoch + 1, 0

    def _epoch_seconds(self) -> float:
        """Time of the epoch at hand, without tracing and compiling."""
        staging = self.step.seconds - self.epoch_staging
        return self.place.epoch_seconds + time.perf_counter() - self.epoch_started - staging

    def _batches(self, epoch: int) -> Iterator[Tensor]:
        """Row indices of each batch, in an order that depends on (seed, epoch) alone."""
        generator = torch.Generator().manual_seed(mix(self.problem.seed, -2, epoch))
        order = torch.randperm(self.problem.num_data, generator=generator)
        if self.bucket_by is not None:
            order = _buckets(order, self.bucket_by, self.batch_size, generator)
        # At once: a copy to a GPU waits for all that was asked of it.
        yield from torch.split(order.to(self.problem.device), self.batch_size)

    def _set_lr(self, step: int) -> None:
        factor = self.factor(step) * rate_factor(self.place.rollbacks)
        for group, rate in self.rates:
            group["lr"] = rate * factor

    def _check_finite(self, row: Mapping[str, float]) -> None:
        """The guard of devices whose steps are not waited for: once an epoch."""
        if not math.isfinite(row["bound"]) and self.place.left_out < self.problem.num_data:
            raise NonFiniteError(
                f"epoch {row['epoch']}: the bound is not finite; the parameters are those of epoch "
                f"{self.run.best_epoch}: lower lr or clip the gradient (clip_norm)"
            )

    def _validate(self) -> dict[str, float]:
        """The bound of the held-out data at KL weight one, with the same noise each epoch.

        In parts, each has its own noise, and the ranks share them.
        """
        problem = self.problem
        sums, total = torch.zeros(len(METRICS), dtype=torch.float64), num_rows(self.valid)
        seed = mix(problem.seed, -3)
        with evaluation(problem.model, problem.guide, seed=seed, device=problem.device):
            rows = torch.arange(total, device=problem.device)
            blocks = self._blocks(rows)
            for number, index in own(self.group, blocks):
                if problem.parts > 1:
                    seed_noise(problem.device, seed, number)
                if self.interrupts.number is not None and self.group is None:
                    self._heed()
                loss = problem.objective.evaluate(
                    problem.model,
                    problem.guide,
                    take(self.valid, index),
                    layout=problem.layout,  # type: ignore[arg-type]
                    num_data=problem.num_data,
                    penalise=False,
                )
                sums += metrics(loss).double().cpu()
        if self.group is not None:
            (sums,) = self.group.sum([sums])
        return _known(zip(METRICS, (sums / total).tolist(), strict=True))

    def _blocks(self, rows: Tensor) -> Sequence[Tensor]:
        most = torch.split(rows, EVALUATION_BATCH)
        shares = cut(rows, self.problem.parts)
        return most if len(most) >= len(shares) else shares

    def _keep_best(self, row: Mapping[str, float]) -> None:
        place = self.place
        if self.valid is None:
            place.best_epoch = place.epoch
        elif row.get("valid_bound", -math.inf) > (-math.inf if place.best is None else place.best):
            place.best, place.best_epoch = row["valid_bound"], place.epoch
            self.best_state = {name: t.detach().clone() for name, t in self._state().items()}
        self.run.best_epoch = place.best_epoch

    def _state(self) -> dict[str, Tensor]:
        """Every parameter and buffer of the pair, by name, each tensor once."""
        state = named_tensors(self.run.model, self.run.guide)
        seen = {id(tensor) for tensor in state.values()}
        stored = {**self.problem.parameters, **self.problem.frozen}
        return state | {name: tensor for name, tensor in stored.items() if id(tensor) not in seen}

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


def open_metrics(run_dir: Path | None, history: list[dict[str, float]]) -> Any:
    """``metrics.jsonl``, with the epochs that were done and no half line."""
    if run_dir is None:
        return None
    path = run_dir / "metrics.jsonl"
    if history:
        write_aside(path, "".join(json.dumps(row) + "\n" for row in history).encode())
        return path.open("a", encoding="utf-8")
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise unwritable(run_dir, error) from None


def compare_environments(now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Warn of what a run goes on with that its last digits may depend on."""
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


def _buckets(order: Tensor, size: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    """Rows so that each batch has similar sizes, in random order; those left over are the last.

    A row's rank in size is blurred by half a batch, so that no two epochs have the same batches.
    """
    whole = len(order) // batch_size * batch_size
    rows, rest = order[:whole], order[whole:]
    rank = size[rows].argsort().argsort()
    blurred = rank + 0.5 * batch_size * torch.randn(whole, generator=generator)
    batches = rows[blurred.argsort()].reshape(-1, batch_size)
    batches = batches[torch.randperm(len(batches), generator=generator)]
    return torch.cat([batches.flatten(), rest])
