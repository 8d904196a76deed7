"""Training: ``fit`` maximises an objective over a pair of programs."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch

from pvae.allocation import keep_large_blocks
from pvae.alternation import Alternate, as_alternate, split
from pvae.checkpoints import fingerprint
from pvae.data import as_batch, num_rows, take
from pvae.data.mapped import MappedRows
from pvae.distributed import Group, agree, join, local_device
from pvae.engine import (
    ENGINES,
    Problem,
    build_optimizer,
    seed_noise,
)
from pvae.errors import DataError, OptionError, ProgramError, did_you_mean
from pvae.evidence.importance import evaluation
from pvae.interrupts import Interrupts
from pvae.launchers import leads
from pvae.loop import EVALUATION_BATCH, Loop, Run
from pvae.objectives import Objective, PyroObjective, as_objective
from pvae.particles import (
    Layout,
    arguments,
    check_follows,
    check_support,
    module_of,
    named_tensors,
    parameters,
    reason,
)
from pvae.precision import precision_context
from pvae.recipes import vae
from pvae.resumption import Saver, as_every, check_folder, environment, taken
from pvae.schedules import Schedule
from pvae.trackers import Tracker

__all__ = ["Run", "device_of", "fit", "lr_schedule"]


def fit(
    model: Any,
    guide: Any,
    train: Any,
    *,
    objective: Any = None,
    valid: Any = None,
    valid_every: int = 1,
    epochs: int = 50,
    batch_size: int = 128,
    optimizer: Any = "adam",
    lr: float = 1e-3,
    optimizer_options: Mapping[str, Any] | None = None,
    lr_schedule: str | Schedule = "constant",
    clip_norm: float | None = None,
    alternate: Alternate | int | str | None = None,
    patience: int | None = None,
    parts: int | None = None,
    preprocess: Callable[[Any], Any] | None = None,
    bucket_by: Any = None,
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
    trackers: Sequence[Tracker] = (),
) -> Run:
    """Train a model and a guide together on data.

    Data lie on the device and batches are gathered by index; arrays that are mapped from a file
    (``numpy.memmap``) stay there, and each process reads the rows of its own parts. The order of
    the data and all noise come from ``(seed, step)`` alone, and the caller's random streams are
    left untouched. Every reported bound is a mean over data, in nats per datum.

    In a process of several (started by ``torchrun``, ``srun`` or Ray Train, see
    :func:`pvae.distributed.join`) each takes its parts of every batch, and all of them together the
    step that one would have taken. Rank 0 alone writes, prints and has trackers; every rank ends
    with the same parameters and history.

    Args:
        model: The generative program.
        guide: The inference program.
        train: Tensor or array ``(N, ...)``, a tuple or dict of them, or a split of a data set.
        objective: An :class:`pvae.Objective`, or one of ``pyro.infer``'s ELBOs; ``pvae.vae()``.
        valid: Held-out data. Its bound is taken after each epoch and the best parameters are kept.
        valid_every: Epochs from one such look at it to the next; the last epoch always has one.
        epochs: Passes over the data.
        batch_size: Data per step; the last batch of an epoch may be smaller.
        optimizer: Name in ``torch.optim`` (adam, sgd, rmsprop, …), class, or instance; what an
            instance does not hold stays as it is.
        lr: Learning rate.
        optimizer_options: Further arguments of the optimiser.
        lr_schedule: ``"constant"``, ``"cosine"``, ``"linear"`` or a callable ``step -> factor``.
        clip_norm: Largest norm of the gradient.
        alternate: Variational EM: a number of steps that move the guide alone, or
            ``"until-flat"``, before each step that moves the model alone; more in
            :class:`pvae.Alternate`. Each half has an optimiser of its own; what both programs
            share is the model's. ``None`` moves both at every step.
        patience: Stop after this many epochs without a better validation bound.
        parts: Into how many parts each batch is cut, see :mod:`pvae.parts`; the number of processes
            if left out. The same number of parts gives the same numbers (but for the order of
            sums) on any number of processes; more parts than processes need less memory. What is
            no mean over data cannot be cut: penalties, batch normalisation, Pyro's own ELBOs.
        preprocess: Applied to each training batch, on the device, with the step's noise.
        bucket_by: A number for each training row ``(N,)``, its length say: the rows of a batch are
            then similar in it, so that little of a batch that is cut to its longest is padding.
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
            number is ``left_out`` in the history. ``"rollback"`` also puts back the last good state
            (see :mod:`pvae.rollback`), and from the second time on halves the learning rate; how
            often is ``rolled_back`` in the history, and after 10 times the training stops.
        progress: Show progress: a bar on a terminal, plain lines elsewhere.
        trackers: Told of each epoch, see :mod:`pvae.trackers`.

    Returns:
        The run, its parameters those of the best validation bound (the last ones without valid).

    Raises:
        PvaeError: An option, the data or the pair is unfit; nothing has been written then.
        RunError: ``run_dir`` is at work in another process, holds a run that ``resume`` was not
            asked for, or one that was started under another configuration.
        OSError: A checkpoint could not be written; those before it are there still.
        NonFiniteError: A loss or gradient was not finite; parameters are those of the best epoch.
        LostRankError: Another process was killed or cut off.
    """
    started = time.perf_counter()
    goal = as_objective(vae() if objective is None else objective)
    _check_options(epochs, batch_size, patience, engine, valid, valid_every, clip_norm)
    plan = as_alternate(alternate)
    _check_alternate(plan, optimizer, valid)
    precision_context(precision)  # refuses a name that it does not know
    folder, every = None if run_dir is None else Path(run_dir), as_every(checkpoint_every)
    check_folder(folder, resume=resume, keep=keep_checkpoints)
    where = device_of(device)
    _check_on_nan(on_nan, where)
    group = join(where)
    keep_large_blocks()
    pieces = _check_parts(parts, batch_size, goal, engine, group)
    with contextlib.ExitStack() as stack:
        if group is not None:
            stack.enter_context(group.working())
        data = as_batch(train, device=where, model=model, streams=True)
        held_out = valid
        if valid is not None:
            held_out = as_batch(valid, device=where, model=model, streams=True)
        total = num_rows(data)
        for program in (model, guide):
            module = module_of(program)
            if module is not None:
                module.to(where)
        stack.enter_context(torch.random.fork_rng([where] if where.type == "cuda" else []))
        seed_noise(where, seed, -1)
        example = take(data, torch.arange(min(batch_size, total), device=where))
        example = example if preprocess is None else preprocess(example)
        layout = goal.prepare(model, guide, example)
        if layout is not None and preprocess is None:
            _check_all_supports(layout, data)
        if layout is not None and valid is not None:  # no preprocess makes bits of these
            try:
                _check_all_supports(layout, held_out)
            except DataError as error:
                raise DataError(f"valid: {error}") from None
        weights = parameters(model, guide, example)
        with evaluation(model, guide, seed=seed, device=where):
            if layout is not None:
                turned = torch.arange(num_rows(example), device=where).roll(1)
                check_follows(model, example, take(example, turned), layout)
            _check_rows(model, guide, data, total % batch_size, where, preprocess)
            if held_out is not None:
                _check_rows(model, guide, held_out, num_rows(held_out) % EVALUATION_BATCH, where)
        if not weights:
            raise ProgramError(
                "there is nothing to train: neither model nor guide has parameters (nn.Parameter, "
                "pyro.param or pyro.module)"
            )
        steps_per_epoch = math.ceil(total / batch_size)
        factor = _lr_factor(lr_schedule, steps_per_epoch * epochs)
        build = functools.partial(build_optimizer, optimizer, lr=lr, options=optimizer_options)
        weights |= goal.parameters()
        _check_learned(goal, optimizer)
        optim = build(list(weights.values()))
        weights, frozen = _held(optim, weights)
        problem = Problem(
            model, guide, goal, optim, weights, layout, data, where, seed, total, preprocess,
            clip_norm, precision, frozen, parts=pieces, group=group,
        )  # fmt: skip
        rows = torch.arange(min(batch_size, total), device=where)
        if pieces > 1:
            _check_buffers(problem, rows)
        if group is not None:
            _start_alike(group, problem, batch_size, epochs, held_out)
        problems = {"joint": problem} | ({} if plan is None else split(problem, rows, build))
        movers = [each.optimizer for each in problems.values()]
        rates = [(some, some["lr"]) for mover in movers for some in mover.param_groups]
        run = Run(model, guide, goal, device=str(where), run_dir=folder)
        run.num_parameters = sum(p.numel() for p in weights.values())
        loop = Loop(
            run, problems, plan, engine, held_out, batch_size, epochs, patience, rates, factor,
            progress and leads(group), trackers if leads(group) else (), on_nan=on_nan,
            bucket_by=_checked_sizes(bucket_by, total), valid_every=valid_every,
        )  # fmt: skip
        if folder is not None:
            if leads(group):
                stack.enter_context(taken(folder))
            record = {
                "epochs": epochs, "patience": patience, "batch_size": batch_size,
                "lr_schedule": lr_schedule, "clip_norm": clip_norm, "alternate": plan,
                "optimizer": [type(each.optimizer) for each in problems.values()],
                "lr": [rate for _, rate in rates], "optimizer_options": optimizer_options,
                "objective": goal, "engine": engine, "precision": precision, "seed": seed,
                "on_nan": on_nan,
                "parameters": {name: list(each.shape) for name, each in weights.items()},
            } | ({"parts": pieces} if pieces > 1 else {})  # fmt: skip
            if loop.bucket_by is not None:
                record["bucket_by"] = loop.bucket_by.tolist()
            if valid_every != 1:
                record["valid_every"] = valid_every
            facts = _facts(record, data, held_out, where) if every is not None or resume else {}
            if resume:
                loop.resume(folder / "checkpoints", facts)
            if every is not None:
                root = folder / "checkpoints"
                if leads(group):
                    loop.saver = Saver(root, every, keep_checkpoints, facts, step=loop.place.step)
                loop.interrupts = stack.enter_context(Interrupts())
        with pyro.validation_enabled(False):
            loop.run_all(started)
        if group is not None:
            group.meet()  # what rank 0 wrote is there
    _warn_of_beta(goal, steps_per_epoch * epochs)
    return run


def _check_options(
    epochs: int,
    batch_size: int,
    patience: int | None,
    engine: str,
    valid: Any,
    valid_every: int,
    clip_norm: float | None,
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
    if valid_every < 1:
        raise OptionError(f"valid_every must be at least 1 epoch, got {valid_every}")
    if patience is not None and patience < 1:
        raise OptionError(f"patience must be at least 1 epoch, got {patience}")
    if clip_norm is not None and not clip_norm > 0:
        raise OptionError(f"clip_norm must be positive, or None for no clipping, got {clip_norm}")


def _check_rows(
    model: Any,
    guide: Any,
    data: Any,
    rows: int,
    device: torch.device,
    preprocess: Callable[[Any], Any] | None = None,
) -> None:
    """Refuse programs of one batch size alone: the last batch is shorter, those held out too."""
    if not rows:
        return
    batch = take(data, torch.arange(rows, device=device))
    try:
        parameters(model, guide, batch if preprocess is None else preprocess(batch))
    except Exception as error:
        raise ProgramError(
            f"the programs fail on a batch of {rows} rows, such as the last one ({reason(error)}): "
            "write them for any number of rows, or choose another batch_size"
        ) from error


def _checked_sizes(sizes: Any, total: int) -> torch.Tensor | None:
    if sizes is None:
        return None
    numbers: torch.Tensor = torch.as_tensor(sizes).cpu()
    if numbers.shape != (total,):
        raise OptionError(
            f"bucket_by has a number for each of {total} training rows, got shape "
            f"{tuple(numbers.shape)}"
        )
    return numbers


def _check_parts(
    parts: int | None, batch_size: int, goal: Any, engine: str, group: Group | None
) -> int:
    """The number of parts of each batch, one if it is whole."""
    size = 1 if group is None else group.size
    parts = size if parts is None else parts
    if not size <= parts <= batch_size:
        raise OptionError(
            f"parts must be between the number of processes ({size}) and batch_size "
            f"({batch_size}), got {parts}"
        )
    if parts == 1:
        return 1
    if engine == "cudagraph":
        raise OptionError(
            f"cudagraph records whole steps, and the gradients of {parts} parts are added between: "
            "use engine='compiled'"
        )
    if isinstance(goal, PyroObjective):
        raise OptionError(
            f"{type(goal.elbo).__name__} has one number for a whole batch, which cannot be had "
            f"from {parts} parts: use pvae.vae() or pvae.iwae()"
        )
    if goal.penalty is not None:
        raise OptionError(
            f"{goal.penalty!r} compares the data of a batch, which cannot be had from {parts} "
            "parts: train in one process and one part"
        )
    return parts


def _check_buffers(problem: Problem, rows: torch.Tensor) -> None:
    """Refuse programs whose buffers follow the batch, of which a part is another one."""
    buffers = problem.buffers()
    before = [buffer.clone() for buffer in buffers]
    with torch.no_grad():
        problem.loss(rows, 1.0)
        changed = [b for b, old in zip(buffers, before, strict=True) if not torch.equal(b, old)]
        for buffer, old in zip(buffers, before, strict=True):
            buffer.copy_(old)
    if changed:
        raise ProgramError(
            f"the programs keep statistics of their batches (a buffer of shape "
            f"{tuple(changed[0].shape)} changes), which differ from those of {problem.parts} "
            "parts: use layer or group normalisation, or train in one process and one part"
        )


def _start_alike(group: Group, problem: Problem, batch_size: int, epochs: int, valid: Any) -> None:
    """Parameters and buffers of rank 0 on all ranks, which must have the same work."""
    shapes = [tuple(tensor.shape) for tensor in problem.parameters.values()]
    held_out = 0 if valid is None else num_rows(valid)
    agree(
        group,
        f"{problem.num_data} training and {held_out} validation rows, batch_size={batch_size}, "
        f"epochs={epochs}, parts={problem.parts}, seed={problem.seed}, "
        f"{_in_words(problem.objective)}, parameters of shapes {shapes}",
    )
    tensors = [
        *problem.parameters.values(),
        *problem.frozen.values(),
        *problem.buffers(),
        *named_tensors(problem.model, problem.guide).values(),  # those that are frozen too
    ]
    group.lead(list({id(tensor): tensor for tensor in tensors}.values()))


def _check_learned(goal: Any, optimizer: Any) -> None:
    """Refuse an optimiser made before what the objective learns was."""
    if goal.parameters() and isinstance(optimizer, torch.optim.Optimizer):
        raise OptionError(
            f"{next(iter(goal.parameters()))} is learned beside the pair, and an optimizer that is "
            "made already does not hold it: pass optimizer= by name or class"
        )


def _held(
    optimizer: torch.optim.Optimizer, weights: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The parameters that an optimiser moves, and those that one made before does not hold."""
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    moved = {name: weight for name, weight in weights.items() if id(weight) in held}
    if not moved:
        raise OptionError(
            "the optimizer holds no parameter of model or guide: make it over those, or pass "
            "optimizer= by name or class"
        )
    return moved, {name: weight for name, weight in weights.items() if name not in moved}


def _check_on_nan(on_nan: str, device: torch.device) -> None:
    if on_nan not in ("stop", "skip", "rollback"):
        raise OptionError(f"on_nan takes 'stop', 'skip' or 'rollback', got {on_nan!r}")
    if on_nan == "skip" and device.type != "cpu":
        raise OptionError(
            f"on_nan='skip' needs a CPU, whose steps are waited for, and this is {device}: take "
            "'rollback', or device='cpu'"
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


def device_of(name: str) -> torch.device:
    """``auto`` is a GPU where there is one, and ``cuda`` that of this process.

    Raises:
        OptionError: There is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"device {name!r} cannot be used ({reason}): try 'cpu'") from None
    return local_device(device)


def _check_all_supports(layout: Layout, data: Any) -> None:
    args, kwargs = arguments(data)
    entries: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    for name, (key, support) in layout.supports.items():
        entry = entries.get(key)
        if isinstance(entry, torch.Tensor):
            check_support(name, support, entry)
        elif isinstance(entry, MappedRows) and not _is_all_real(support):
            first = 0
            for block in entry.blocks():
                check_support(name, support, block, first=first)
                first += len(block)


def _is_all_real(support: Any) -> bool:
    """Whether every finite number is in it, so that the rows of a file need not be read for it."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support is torch.distributions.constraints.real


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


def _warn_of_beta(objective: Objective | PyroObjective, steps: int) -> None:
    if getattr(getattr(objective, "kl_term", None), "steers", False):
        return  # what is scheduled is no KL weight, and the bound is the ELBO
    final = objective.schedule(steps - 1)
    if abs(final - 1) > 1e-6:
        warnings.warn(
            f"the KL weight ends at {final:g}, not 1: 'bound' is then no bound on log p(x); 'elbo' "
            "in the history is",
            UserWarning,
            stacklevel=3,
        )
