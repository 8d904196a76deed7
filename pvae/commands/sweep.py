"""``pvae sweep``: what it does once its words are parsed."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae import catalogue, locks, runs, sweeps, workers
from pvae.commands.preparing import load_data, threads
from pvae.commands.programs import Programs, choose_likelihood
from pvae.commands.saying import say
from pvae.commands.train import FIT
from pvae.errors import OptionError, PvaeError, RunError
from pvae.search_spaces import configure, corners, parse_all

if TYPE_CHECKING:
    from pvae.data import Dataset
    from pvae.training import Run

__all__ = ["run_worker", "sweep"]

_JUDGE = 100  # particles of the estimate that judges a trial
_CONFIRM = 1000  # particles of the estimate on the test data


def sweep(config: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Search, say what was found, and confirm the best on the test data.

    Args:
        config: As for ``pvae train``.
        arguments: search, trials, jobs, storage, confirm, run_dir.

    Raises:
        OptionError: An option or a space that does not exist; nothing has been written then.
        RunError: Another sweep is in the folder or at work there, or nothing was completed.
    """
    _check(config, arguments)
    folder = _folder(config, arguments)
    dataset = load_data(config)
    say(dataset.description())
    sweeps.begin(folder, config, arguments.search)
    try:
        with locks.locked(folder):
            _lead(folder, config, arguments, dataset)
    except locks.Taken:
        study = sweeps.open_study(folder, arguments.storage, epochs=config["epochs"])
        say(f"another command leads the sweep in {folder}: this one helps with its trials")
        _search(folder, study, arguments)
        with locks.locked(folder, waits=True):  # until it has written the results, or is gone
            if not sweeps.is_written(folder, study, confirmed=bool(arguments.confirm)):
                _lead(folder, config, arguments, dataset)
    say(
        f"wrote {folder}: trials.csv, best.yaml, figures; next: "
        f"pvae train --config {folder / 'best.yaml'}"
    )


def _lead(
    folder: Path, config: dict[str, Any], arguments: argparse.Namespace, dataset: Dataset
) -> None:
    """Take trials until there are enough, then write what was found and confirm the best."""
    if not sweeps.others_work(folder) and sweeps.repair(folder):
        say("the journal's torn last line was set aside")
    study = sweeps.open_study(folder, arguments.storage, epochs=config["epochs"])
    again = sweeps.reclaim(folder, study) if arguments.storage is None else 0
    done = sweeps.finished(study)
    if done:
        say(f"going on: {done} trials are done, {again} are taken again")
    _search(folder, study, arguments)
    while sweeps.finished(study) < arguments.trials and sweeps.others_work(folder):
        time.sleep(1)  # for the last trials of commands that help
    if sweeps.finished(study) < arguments.trials:  # one of them is gone
        _search(folder, study, arguments)
    sweeps.write_results(folder, study)
    say(sweeps.summary(folder, study))
    if arguments.confirm:
        _confirm(folder, study, dataset, arguments.confirm)


def _check(config: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Every end of every space as the options of a run, before anything is trained."""
    for name in ("trials", "jobs"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise OptionError(f"--{name} must be at least 1, got {value}")
    if arguments.confirm < 0:
        raise OptionError(f"--confirm takes a number of seeds, 0 for none, got {arguments.confirm}")
    space = parse_all(arguments.search)
    for values in corners(space):
        chosen, _ = _resolved(configure(config, values))
        for name in ("game", "track", "pictures"):
            if chosen[name] is not None:
                raise OptionError(
                    f"--{name} is for one training, and a sweep is many, judged by their evidence: "
                    "leave it out, and give it to pvae train with the best.yaml that is found"
                )


def _resolved(config: dict[str, Any]) -> tuple[dict[str, Any], Programs]:
    """A configuration whose options have their types, and its programs."""
    programs = Programs(config)
    for component in programs.offered:
        key = f"{component}_options"
        config[key] = programs.read(component, config[key])
    catalogue.build_objective(config["objective"], config["objective_options"])
    return config, programs


def _folder(config: Mapping[str, Any], arguments: argparse.Namespace) -> Path:
    if arguments.run_dir is not None:
        return Path(arguments.run_dir)
    model = catalogue.find("model", config["model"]).name
    name = f"{model}-{Path(str(config['data'])).stem}".replace("_", "-")
    return runs.next_folder(name, "sweeps")


# --- the search ----------------------------------------------------------------------------------


def _search(folder: Path, study: Any, arguments: argparse.Namespace) -> None:
    """Let workers take trials until there are enough; a line for each that ends."""
    jobs = workers.num_cores() if arguments.jobs is None else arguments.jobs
    missing = arguments.trials - sweeps.finished(study)
    jobs = max(0, min(jobs, missing))
    config = {"storage": arguments.storage, "trials": arguments.trials}
    watch = _Watch(study, arguments.trials)
    work = [(folder, {**config, "worker": number}) for number in range(jobs)]
    reasons = []
    for outcome in workers.run_all(
        work, jobs=max(jobs, 1), command=("sweep", "--run-worker"), waited=watch
    ):
        if outcome.reason is not None:
            reasons.append(outcome.reason)
    watch(now=True)
    if reasons and sweeps.finished(study) < arguments.trials:
        raise RunError(f"a worker ended ({reasons[0]}): run the command again to go on")


class _Watch:
    """Says a line for each trial that ends, looked at once a second."""

    def __init__(self, study: Any, trials: int) -> None:
        self.study, self.trials = study, trials
        self.seen = {row["trial"] for row in sweeps.rows(study)}
        self.looked = 0.0

    def __call__(self, *, now: bool = False) -> None:
        if not now and time.monotonic() - self.looked < 1:
            return
        self.looked = time.monotonic()
        for row in sweeps.rows(self.study):
            if row["trial"] in self.seen:
                continue
            self.seen.add(row["trial"])
            value = row["log_evidence"]
            outcome = row["reason"] or (row["state"] if value is None else f"{value:.3f}")
            seconds = "" if row["seconds"] is None else f", {row['seconds']:.1f} s"
            line = f"[{len(self.seen)}/{self.trials}] trial {row['trial']}: {outcome}{seconds}"
            print(line, file=sys.stderr, flush=True)


def run_worker(folder: Path) -> None:
    """One worker process of a sweep; what it is told comes on standard input."""
    told = workers.read_configuration()
    config = runs.read_yaml(folder / "sweep.yaml")["config"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = load_data(config)
        with threads(dataset):
            sweeps.work(folder, train=_trainer(dataset), **told)


def _trainer(dataset: Dataset) -> sweeps.Trainer:
    """Trains a configuration and judges it by the log evidence of the validation data."""

    def train(config: dict[str, Any], report: sweeps.Report) -> tuple[float, dict[str, Any]]:
        run = _fit(config, dataset, report)
        value, _ = _evidence(run, dataset.valid, _JUDGE)
        return value, {"num_parameters": run.num_parameters, "best_epoch": run.best_epoch}

    return train


def _fit(config: dict[str, Any], dataset: Dataset, report: sweeps.Report | None) -> Run:
    from pvae.training import fit

    config, programs = _resolved(config)
    choose_likelihood(config, programs, dataset)
    known = runs.facts(dataset) | runs.statistics(dataset) | runs.example_rows(dataset)
    model, guide = runs.pair(config, known)
    return fit(
        model,
        guide,
        objective=catalogue.build_objective(config["objective"], config["objective_options"]),
        progress=False,
        trackers=[] if report is None else [_Pruning(report)],
        **runs.training_data(config, model, dataset),
        **{key: config[key] for key in FIT},
    )


class _Pruning:
    """Reports the validation ELBO of each epoch, which may end the trial."""

    def __init__(self, report: Callable[[float, int], None]) -> None:
        self.report = report

    def start(self, run: Run) -> None:
        pass

    def epoch(self, run: Run, row: Mapping[str, float]) -> None:
        self.report(row["valid_elbo"], int(row["epoch"]))

    def finish(self, run: Run) -> None:
        pass


def _evidence(run: Run, split: Any, num_particles: int) -> tuple[float, float]:
    """Mean log evidence of a split on the original scale, and its standard error over data."""
    from pvae.evidence import importance

    rows = runs.batch_for(run.model, split.x, split.labels)
    found = importance(run.model, run.guide, rows, num_particles, seed=0)
    values = found.shifted(split.log_det).log_evidence.double()
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


# --- the choice confirmed ------------------------------------------------------------------------


def _confirm(folder: Path, study: Any, dataset: Dataset, seeds: int) -> None:
    """Train the best configuration from new seeds and take its test evidence."""
    import statistics

    results = []
    with threads(dataset):
        for seed in range(1, seeds + 1):
            config = {**sweeps.best_config(folder, study), "seed": seed}
            try:
                value, error = _evidence(_fit(config, dataset, None), dataset.test, _CONFIRM)
            except PvaeError as failure:
                raise RunError(
                    f"the best configuration fails from seed {seed}: {failure}"
                ) from None
            results.append({"seed": seed, "log_evidence": value, "stderr": error})
            print(f"seed {seed}: test {value:.3f} ± {error:.3f}", file=sys.stderr, flush=True)
    values = [result["log_evidence"] for result in results]
    spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    about = {
        "log_evidence": statistics.fmean(values),
        "stderr_over_seeds": spread,
        "stderr_over_data": statistics.fmean(result["stderr"] for result in results),
        "num_particles": _CONFIRM,
        "units": "nats per datum, original scale, test split",
        "seeds": results,
    }
    runs.write_json(folder / "confirmed.json", about)
    over_seeds = "" if spread is None else f" ± {spread:.3f} over {len(values)} seeds"
    say(
        f"best configuration, test log evidence {about['log_evidence']:.3f}{over_seeds}, "
        f"± {about['stderr_over_data']:.3f} over data"
    )
