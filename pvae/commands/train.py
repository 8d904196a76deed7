"""``pvae train``: one run folder, begun or gone on with; a game has :mod:`pvae.commands.games`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae import __version__, catalogue, runs
from pvae.commands.preparing import (
    grouped,
    load_data,
    threads,
    warn_of_padding,
    warn_of_unscored,
)
from pvae.commands.programs import Programs, choose_likelihood
from pvae.commands.saying import say
from pvae.errors import OptionError, RunError
from pvae.launchers import leads

if TYPE_CHECKING:
    from pvae.data import Dataset
    from pvae.training import Run

__all__ = ["FIT", "refuse_changes", "restored", "resumable", "resume", "train", "train_into"]

FIT = (
    "epochs",
    "batch_size",
    "optimizer",
    "lr",
    "lr_schedule",
    "clip_norm",
    "alternate",
    "patience",
    "parts",
    "seed",
    "device",
    "engine",
    "precision",
    "checkpoint_every",
    "keep_checkpoints",
    "on_nan",
)
# What may be different when a run is resumed; another device is a warning.
_FREE = (
    "epochs", "patience", "checkpoint_every", "keep_checkpoints", "device", "track", "pictures"
)  # fmt: skip


def train(config: dict[str, Any], programs: Programs, run_dir: str | None) -> None:
    """``pvae train``: one run folder.

    Args:
        config: Every key of :data:`pvae.runs.DEFAULTS`, with the options that were given.
        programs: The model and the guide that ``config`` names.
        run_dir: The folder to write; the next free one in ``runs`` if ``None``.
    """
    name = f"{programs.model.name}-{Path(str(config['data'])).stem}".replace("_", "-")
    final = Path(run_dir) if run_dir else runs.next_folder(name)
    with grouped(config) as group, contextlib.ExitStack() as stack:
        if group is not None:
            final = Path(group.share(str(final)))
        if leads(group):
            stack.enter_context(runs.begin(final))
            stack.enter_context(resumable(final))
        dataset = load_data(config, streams=True)
        say(dataset.description())
        with threads(dataset):
            chosen = choose_likelihood(config, programs, dataset)
            if chosen is not None:
                say(f"likelihood {chosen}, for {dataset.kind} data (--model.likelihood changes it)")
            run = train_into(config, programs, dataset, final, writes=leads(group))
        if leads(group):
            _finish_train(config, run, dataset, final)


def resume(config: dict[str, Any], programs: Programs, folder: Path) -> None:
    """``pvae train --resume``: go on with a run that was interrupted, or that gets more epochs.

    Args:
        config: That of the run, with the options that were given.
        programs: The model and the guide that ``config`` names.
        folder: The run.

    Raises:
        RunError: It was started under another configuration, or another process is at work in it.
    """
    from pvae.locks import locked

    with grouped(config) as group, contextlib.ExitStack() as stack:
        if leads(group):
            stack.enter_context(locked(folder))
            stack.enter_context(resumable(folder))
        before = runs.read_config(folder)
        dataset = load_data(config, streams=True)
        refuse_changes(config, before, folder)
        say(dataset.description())
        done = len(runs.history(folder, torn=True))
        with threads(dataset):
            run = train_into(config, programs, dataset, folder, before=before, writes=leads(group))
        if leads(group):
            _finish_train(config, run, dataset, folder)
    if len(run.history) == done:
        say(f"{folder} was finished already: a larger --epochs or --patience goes on with it")


def refuse_changes(config: Mapping[str, Any], before: Mapping[str, Any], folder: Path) -> None:
    """Refuse to resume under options other than those that a run began with.

    Raises:
        RunError: It names them.
    """
    from pvae.resumption import refuse_difference

    now, then = ({key: each[key] for key in runs.DEFAULTS} for each in (config, before))
    refuse_difference(now, then, str(folder), free=_FREE)


def _finish_train(config: Mapping[str, Any], run: Run, dataset: Dataset, folder: Path) -> None:
    say(_fitted_in_words(config, run, dataset))
    warn_of_unscored(run.model, dataset)
    runs.draw_figures(run, dataset, folder, name=config["model"])
    say(f"wrote {folder}; next: pvae evaluate {folder}")


def _fitted_in_words(config: Mapping[str, Any], run: Run, dataset: Dataset) -> str:
    import torch

    best = run.history[run.best_epoch - 1]
    offset = float(dataset.valid.log_det.mean())
    bound = best["valid_bound"] + offset
    bits = float(dataset.bits_per_dim(torch.tensor(bound), dataset.valid))
    return (
        f"best epoch {run.best_epoch} of {len(run.history)}, {run.num_parameters} parameters, "
        f"{run.seconds:.1f} s\n"
        f"on the original scale: validation bound ({config['objective']}) {bound:.2f} nats per "
        f"datum, {bits:.3f} bits/dim"
    )


@contextlib.contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Say how an interrupted training goes on."""
    from pvae.checkpoints import steps

    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        found = steps(folder / "checkpoints")
        if found:
            line = f"pvae: {found[-1].name} is saved; go on by: pvae train --resume {folder}"
            print(line, file=sys.stderr, flush=True)
        raise


@contextlib.contextmanager
def restored(folder: Path) -> Iterator[None]:
    """Put the configuration of a run back, if it has one, where what is asked anew is refused."""
    from pvae.checkpoints import write_aside

    file = folder / "config.yaml"
    before = file.read_bytes() if file.is_file() else None
    try:
        yield
    except (OptionError, RunError):  # nothing has been trained
        if before is not None:
            write_aside(file, before)
        raise


def train_into(
    config: dict[str, Any],
    programs: Programs,
    dataset: Dataset,
    folder: Path,
    *,
    before: Mapping[str, Any] | None = None,
    progress: bool = True,
    writes: bool = True,
) -> Run:
    """Train into ``folder``: ``config.yaml``, pair, fit; what was chosen is added to ``config``.

    With ``before``, the configuration of a run in ``folder``, that run goes on. A process that does
    not write trains with one that does.
    """
    from pvae.checkpoints import save_tensors
    from pvae.doctor import Doctor
    from pvae.training import fit

    for component, offered in programs.offered.items():
        if offered is not None:
            key = f"{component}_options"
            config[key] = offered.defaults() | config[key]
    about = runs.facts(dataset)
    moments = runs.statistics(dataset) | runs.example_rows(dataset)
    resumed = before is not None
    model, guide = runs.pair(config, about | moments, folder=folder if resumed else None)
    warn_of_padding(model, dataset)
    trackers: list[Any] = [Doctor()] if progress else []
    if config["track"] is not None or config["pictures"] is not None:
        from pvae.watching import watchers

        trackers += watchers(config, model, dataset, folder)
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    if writes and programs.takes(*moments) and not resumed:
        save_tensors(folder / "checkpoints" / "data", moments, {})
    kept = {key: config[key] for key in runs.DEFAULTS}
    counted = {"num_parameters": (before or {}).get("num_parameters"), "data_facts": about}
    full = {"pvae": __version__, **kept, **counted}
    with restored(folder) if writes else contextlib.nullcontext():
        if writes:
            runs.write_config(folder, full, sources=not resumed)
        run = fit(
            model,
            guide,
            objective=catalogue.build_objective(config["objective"], config["objective_options"]),
            run_dir=folder,
            resume=resumed,
            **runs.training_data(config, model, dataset),
            progress=progress,
            trackers=trackers,
            **{key: config[key] for key in FIT},
        )
    if writes and run.num_parameters != full["num_parameters"]:
        runs.write_config(folder, full | {"num_parameters": run.num_parameters}, sources=False)
    return run
