"""Sweeps: a search over structure and training options, resumable, several workers at a time.

Optuna proposes (tree-structured Parzen estimator), the validation bound prunes, and the importance
estimate of the validation data's log evidence judges: it means the same for every objective. A
sweep is one folder::

    sweeps/vae-digits-1/
        sweep.yaml       what is searched, and over what
        journal.log      every trial, appended as it happens (or a database, --storage)
        trials.csv       one line per trial
        best.yaml        the best configuration, for pvae train --config
        confirmed.json   its test evidence over several seeds
        figures/*.png
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pvae import runs
from pvae.checkpoints import write_aside
from pvae.errors import NonFiniteError, OptionError, PvaeError, RunError
from pvae.locks import claim
from pvae.search_spaces import Dimension, configure, parse_all

__all__ = [
    "Trainer",
    "begin",
    "finished",
    "is_written",
    "open_study",
    "others_work",
    "rows",
    "summary",
    "work",
    "write_results",
]

Report = Callable[[float, int], None]
Trainer = Callable[[dict[str, Any], Report], tuple[float, dict[str, Any]]]
"""A configuration, and what takes the validation bound of each epoch -> the value, and facts."""

_JOURNAL = "journal.log"
_WORKERS = ".workers"  # a file for each that lives, which it has locked
_FILE = "sweep.yaml"


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise OptionError(
            "a sweep needs Optuna, which is not installed: pip install 'pvae-toolkit[sweep]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


# --- the study -----------------------------------------------------------------------------------


def begin(folder: Path, config: Mapping[str, Any], searches: Sequence[str]) -> None:
    """Write ``sweep.yaml``, or see that a sweep begun before is the same.

    Raises:
        RunError: The folder holds another sweep, or something else.
    """
    asked = {"config": dict(config), "search": list(searches)}
    file = folder / _FILE
    if not file.exists():
        if folder.exists() and any(not p.name.startswith(".") for p in folder.iterdir()):
            raise RunError(f"{folder} exists and holds no sweep: choose another --run-dir")
        folder.mkdir(parents=True, exist_ok=True)
        with _turn(folder):  # another may begin the same sweep at this moment
            if not file.exists():
                runs.write_yaml(file, asked)
                return
    known = runs.read_yaml(file)
    before, now = _flat(known), _flat(asked)
    for key in dict.fromkeys([*before, *now]):
        if before.get(key) != now.get(key):
            raise RunError(
                f"{folder} holds a sweep with {key} = {before.get(key)!r}, not {now.get(key)!r}: "
                "give the same options to go on with it, or another --run-dir"
            )


def _flat(content: Mapping[str, Any]) -> dict[str, Any]:
    config = content.get("config") or {}
    options = {
        f"{key}.{name}": entry
        for key, value in config.items()
        if isinstance(value, Mapping)
        for name, entry in value.items()
    }
    plain = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    return plain | options | {"search": list(content.get("search") or [])}


def _sampler(seed: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant_liar is called experimental
        return _optuna().samplers.TPESampler(seed=seed, constant_liar=True)


def open_study(folder: Path, storage: str | None, *, epochs: int = 100) -> Any:
    """The study of a sweep: its journal in the folder, or a database by its URL.

    Raises:
        OptionError: Optuna is not installed, or the database cannot be reached.
    """
    optuna = _optuna()
    warm_up = max(1, epochs // 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=warm_up)
        try:
            return optuna.create_study(
                storage=storage or _journal(folder), study_name=folder.absolute().name,
                sampler=_sampler(0), pruner=pruner, direction="maximize", load_if_exists=True,
            )  # fmt: skip
        except Exception as error:
            if storage is None:
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise OptionError(f"--storage {storage} cannot be used ({reason})") from None


def _journal(folder: Path) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(str(folder / _JOURNAL)))


def repair(folder: Path) -> int:
    """Set a torn last line of the journal aside, so that it can be appended to; bytes set aside.

    A process that is killed while it writes leaves half a line, which would swallow the next one
    (optuna#5138). Nobody else may be writing.
    """
    journal = folder / _JOURNAL
    if not journal.exists():
        return 0
    content = journal.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole == len(content):
        return 0
    write_aside(folder / f"{_JOURNAL}.torn-{time.time_ns()}", content[whole:])
    with journal.open("r+b") as file:
        file.truncate(whole)
    return len(content) - whole


def reclaim(folder: Path, study: Any) -> int:
    """Give trials whose worker is gone to the next workers; how many there were."""
    optuna = _optuna()
    running = study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
    left = [trial for trial in running if not _is_at_work(folder, trial.user_attrs.get("owner"))]
    for trial in left:
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params, user_attrs={"again": trial.number})
    return len(left)


def _is_at_work(folder: Path, owner: str | None) -> bool:
    """Whether the worker of that name lives: its claim cannot be had."""
    if owner is None or not (folder / _WORKERS / owner).exists():
        return False
    file = claim(folder / _WORKERS / owner)
    if file is not None:
        file.close()
    return file is None


def others_work(folder: Path) -> bool:
    """Whether some worker of the sweep lives."""
    return any(_is_at_work(folder, path.name) for path in (folder / _WORKERS).glob("*"))


def finished(study: Any) -> int:
    """Trials that have an outcome; those that a kill took are not among them."""
    return sum(_counts(trial, running=False) for trial in study.get_trials(deepcopy=False))


def _counts(trial: Any, *, running: bool) -> bool:
    state = trial.state.name
    failed = state == "FAIL" and "reason" in trial.user_attrs
    return state in ("COMPLETE", "PRUNED") or failed or (running and state == "RUNNING")


# --- the workers ---------------------------------------------------------------------------------


def work(
    folder: Path,
    *,
    storage: str | None,
    trials: int,
    worker: int,
    train: Trainer,
) -> None:
    """Take trials, one after the other, until the sweep has as many as were asked for.

    Args:
        folder: The sweep's.
        storage: URL of a database; the folder's journal if ``None``.
        trials: How many the sweep is to have.
        worker: Number of this worker, which seeds its proposals.
        train: Trains a configuration.
    """
    from pvae.seeds import mix

    asked = runs.read_yaml(folder / _FILE)
    config, space = asked["config"], parse_all(asked["search"])
    study = open_study(folder, storage, epochs=config["epochs"])
    # A worker of a sweep that goes on must not propose again what the first one did.
    seed = mix(config["seed"], worker, len(study.get_trials(deepcopy=False)))
    study.sampler = _sampler(seed % 2**32)
    owner = uuid.uuid4().hex
    with contextlib.ExitStack() as stack:
        while (own := claim(folder / _WORKERS / owner)) is None:
            time.sleep(0.01)  # somebody looks whether it lives
        stack.enter_context(own)
        _take_all(folder, study, trials, owner if storage is None else None, config, space, train)


def _take_all(
    folder: Path,
    study: Any,
    trials: int,
    owner: str | None,
    config: dict[str, Any],
    space: Mapping[str, Dimension],
    train: Trainer,
) -> None:
    optuna = _optuna()
    while (trial := _ticket(folder, study, trials, owner)) is not None:
        started = time.perf_counter()
        try:
            value, facts = _one(trial, config, space, train)
            if math.isnan(value):  # Optuna fails such a trial itself, and nobody would know why
                raise NonFiniteError("its log evidence is not a number")
            facts = {**facts, "seconds": time.perf_counter() - started}
            for name, fact in facts.items():
                trial.set_user_attr(name, fact)
            study.tell(trial, value)
        except optuna.TrialPruned:
            trial.set_user_attr("seconds", time.perf_counter() - started)
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        except Exception as error:  # whatever it is, it would be the same if taken again
            reason = (
                str(error) if isinstance(error, PvaeError) else f"{type(error).__name__}: {error}"
            )
            trial.set_user_attr("reason", " ".join(reason.split()))
            diverged = isinstance(error, NonFiniteError)
            state = optuna.trial.TrialState
            study.tell(trial, state=state.PRUNED if diverged else state.FAIL)


def _one(
    trial: Any, config: dict[str, Any], space: Mapping[str, Dimension], train: Trainer
) -> tuple[float, dict[str, Any]]:
    optuna = _optuna()

    def report(value: float, epoch: int) -> None:
        trial.report(value, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned

    values = {name: dimension.suggest(trial, name) for name, dimension in space.items()}
    return train(configure(config, values), report)


def _ticket(folder: Path, study: Any, trials: int, owner: str | None) -> Any:
    """The next trial, or ``None``; all workers of a folder ask in turn, so that none is doubled."""
    with _turn(folder):
        if owner is not None:
            reclaim(folder, study)
        given = sum(_counts(trial, running=True) for trial in study.get_trials(deepcopy=False))
        if given >= trials:
            return None
        trial = study.ask()
        if owner is not None:
            trial.set_user_attr("owner", owner)
        return trial


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Wait until no other worker of the folder asks."""
    try:
        import fcntl
    except ImportError:  # not POSIX: two workers may then overshoot by one trial
        yield
        return
    with (folder / ".ticket").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- results -------------------------------------------------------------------------------------


def rows(study: Any) -> list[dict[str, Any]]:
    """One row per trial that has an outcome: number, state, value, seconds, parameters, reason."""
    names = sorted({name for trial in study.trials for name in trial.params})
    return [
        {
            "trial": trial.number,
            "state": trial.state.name.lower(),
            "log_evidence": trial.value if trial.state.name == "COMPLETE" else None,
            "seconds": trial.user_attrs.get("seconds"),
            "num_parameters": trial.user_attrs.get("num_parameters"),
            **{name: trial.params.get(name) for name in names},
            "reason": trial.user_attrs.get("reason"),
        }
        for trial in study.trials
        if _counts(trial, running=False)
    ]


def best_config(folder: Path, study: Any) -> dict[str, Any]:
    """The configuration of the best trial.

    Raises:
        RunError: No trial was completed.
    """
    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    if not complete:
        reasons = [t.user_attrs["reason"] for t in study.trials if "reason" in t.user_attrs]
        raise RunError(f"no trial was completed: {reasons[0] if reasons else 'all were pruned'}")
    asked = runs.read_yaml(folder / _FILE)
    space = parse_all(asked["search"])
    fixed = _optuna().trial.FixedTrial(study.best_trial.params)
    values = {name: dimension.suggest(fixed, name) for name, dimension in space.items()}
    return configure(asked["config"], values)


def importances(study: Any) -> dict[str, float]:
    """Share of the variance of the value that each parameter explains (PED-ANOVA); may be empty."""
    optuna = _optuna()
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
        except (ValueError, RuntimeError, optuna.exceptions.OptunaError):
            return {}  # too few trials, or none that differ
    return {str(name): float(value) for name, value in found.items()}


def is_written(folder: Path, study: Any, *, confirmed: bool) -> bool:
    """Whether the results of all trials that have an outcome are there, and confirmed since."""
    table, last = folder / "trials.csv", folder / ("confirmed.json" if confirmed else "best.yaml")
    if not (table.exists() and last.exists() and last.stat().st_mtime >= table.stat().st_mtime):
        return False
    with table.open(newline="") as file:
        return len(list(csv.DictReader(file))) == finished(study)


def write_results(folder: Path, study: Any) -> None:
    """``trials.csv``, ``best.yaml`` and the pictures, each whole or not at all."""
    table = rows(study)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]) if table else ["trial"])
    writer.writeheader()
    writer.writerows(table)
    write_aside(folder / "trials.csv", text.getvalue().encode())
    runs.write_yaml(folder / "best.yaml", best_config(folder, study))
    for name, draw in _pictures(study).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runs.save_figure(draw, folder / "figures" / f"{name}.png")


def _pictures(study: Any) -> dict[str, Callable[[], Any]]:
    """Name -> what draws it; those that need more trials than there are are left out."""
    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    shares = importances(study)
    ranked = list(shares)
    varied = [n for n in ranked if len({trial.params.get(n) for trial in complete}) > 1]
    pictures: dict[str, Callable[[], Any]] = {
        "history": lambda: _drawn("optimization_history", study)
    }
    if len(varied) > 1:
        pictures["parallel_coordinates"] = lambda: _drawn(
            "parallel_coordinate", study, params=varied[:6]
        )
        pictures["contours"] = lambda: _drawn("contour", study, params=varied[:3])
    if ranked:
        pictures["importances"] = lambda: _importance_bars(shares)
    return pictures


def _drawn(name: str, study: Any, **options: Any) -> Any:
    import numpy as np
    from optuna.visualization import matplotlib as drawing

    axes = getattr(drawing, f"plot_{name}")(study, **options)
    figure = np.ravel(axes)[0].figure
    for each in figure.axes:
        if each.get_ylabel() == "Objective Value":
            each.set_ylabel("validation log evidence, nats")
    figure.set_size_inches(12, 9 if name == "contour" else 6)
    if name == "parallel_coordinate":
        figure.subplots_adjust(bottom=0.25)
        figure.axes[0].set_title("")
        names = sorted(options["params"])  # the order in which Optuna draws them
        figure.axes[0].set_xticklabels(["log evidence", *names], rotation=20)
    return figure


def _importance_bars(found: Mapping[str, float]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.6 + 0.4 * len(found)), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(found)[::-1], list(found.values())[::-1])
    axes.set_xlabel("importance (PED-ANOVA), share")
    return figure


def summary(folder: Path, study: Any, *, best: int = 5) -> str:
    """The best trials as a table, what mattered, and what was left by the way."""
    table = rows(study)
    complete = sorted(
        (row for row in table if row["log_evidence"] is not None),
        key=lambda row: -row["log_evidence"],
    )
    names = [n for n in (complete[0] if complete else {}) if "." in n or n in runs.DEFAULTS]
    lines = [" ".join(f"{text:>12}" for text in ("log evidence", *names))]
    for row in complete[:best]:
        cells = [f"{row['log_evidence']:.3f}", *(_short(row[name]) for name in names)]
        lines.append(
            " ".join(
                f"{cell:>{max(12, len(title))}}"
                for cell, title in zip(cells, ("log evidence", *names), strict=True)
            )
        )
    count = {s: sum(row["state"] == s for row in table) for s in ("complete", "pruned", "fail")}
    lines.append(
        f"{count['complete']} trials completed, {count['pruned']} pruned, {count['fail']} failed"
    )
    mattered = [f"{name} {share:.2f}" for name, share in importances(study).items()]
    if mattered:
        lines.append(f"what mattered: {', '.join(mattered)}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
