"""What each command does once its words are parsed: train, evaluate, compare, board, sample, list.

Everything heavy is imported inside the functions, so that ``pvae --help`` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae import __version__, catalogue, roster, runs
from pvae.errors import DataError, OptionError, ProgramError, RunError

if TYPE_CHECKING:
    from pvae.board import Cell
    from pvae.comparison import Board
    from pvae.data import Dataset
    from pvae.roster import Entry
    from pvae.training import Run

__all__ = ["Programs", "board", "compare", "diagnose", "evaluate", "list_names", "sample", "train"]

_FIT = (
    "epochs",
    "batch_size",
    "optimizer",
    "lr",
    "lr_schedule",
    "clip_norm",
    "alternate",
    "patience",
    "seed",
    "device",
    "engine",
    "precision",
)
_LIKELIHOODS = {
    "binary": "bernoulli",
    "continuous": "gaussian",
    "integer": "discretized_logistic",
}
_SMALL = 1_000_000  # numbers of training data


class Programs:
    """The model and the guide of a configuration, and the options that were given for each."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.model = catalogue.find("model", config["model"])
        self.guide = catalogue.find("guide", config["guide"])
        self.offered: dict[str, catalogue.Options | None] = {
            "model": _offered("model", self.model),
            "guide": _offered("guide", self.guide),
            "objective": catalogue.objective_options(config["objective"]),
        }

    def read(self, component: str, values: Mapping[str, Any], *, origin: str = "") -> Any:
        """The options given for a component, with their types."""
        offered = self.offered[component]
        if offered is not None:
            return offered.read(values, origin=origin)
        if values:
            raise OptionError(
                f"the {component} is a function, which has no options of its own: leave out "
                f"{', '.join(values)}"
            )
        return {}

    def takes(self, *names: str) -> bool:
        """Whether the model's or the guide's constructor has one of these parameters."""
        wanted = [
            name
            for program in (self.model, self.guide)
            if program.is_class
            for name in catalogue.option_names(program.factory)
        ]
        return not set(names).isdisjoint(wanted)


def _offered(role: str, program: catalogue.Program) -> catalogue.Options | None:
    if not program.is_class:
        return None
    return catalogue.Options(program.factory, role, hidden=catalogue.filled_names)


# --- train ---------------------------------------------------------------------------------------


def train(config: dict[str, Any], programs: Programs, run_dir: str | None) -> None:
    """``pvae train``: one run folder.

    Args:
        config: Every key of :data:`pvae.runs.DEFAULTS`, with the options that were given.
        programs: The model and the guide that ``config`` names.
        run_dir: The folder to write; the next free one in ``runs`` if ``None``.
    """
    name = f"{programs.model.name}-{Path(str(config['data'])).stem}".replace("_", "-")
    final = Path(run_dir) if run_dir else runs.next_folder(name)
    with runs.create(final) as aside:
        dataset = _load_data(config)
        _say(dataset.description())
        with _threads(dataset):
            chosen = _choose_likelihood(config, programs, dataset)
            if chosen is not None:
                _say(
                    f"likelihood {chosen}, for {dataset.kind} data (--model.likelihood changes it)"
                )
            run = _fit(config, programs, dataset, aside)
        _say(_fitted_in_words(config, run, dataset))
        runs.draw_figures(run, dataset, aside, name=config["model"])
    _say(f"wrote {final}; next: pvae evaluate {final}")


def _fit(
    config: dict[str, Any],
    programs: Programs,
    dataset: Dataset,
    folder: Path,
    *,
    progress: bool = True,
) -> Run:
    """Train into ``folder``: pair, fit, ``config.yaml``; what was chosen is added to ``config``."""
    from pvae.checkpoints import save_tensors
    from pvae.training import fit

    for component, offered in programs.offered.items():
        if offered is not None:
            key = f"{component}_options"
            config[key] = offered.defaults() | config[key]
    about = runs.facts(dataset)
    moments = runs.statistics(dataset)
    model, guide = runs.pair(config, about | moments)
    run = fit(
        model,
        guide,
        dataset.train_raw,
        objective=catalogue.build_objective(config["objective"], config["objective_options"]),
        valid=dataset.valid.x,
        preprocess=dataset.preprocess,
        run_dir=folder,
        progress=progress,
        **{key: config[key] for key in _FIT},
    )
    if programs.takes("x_mean", "x_scale", "example"):
        kept_moments = {name: v for name, v in moments.items() if programs.takes(name)}
        save_tensors(folder / "checkpoints" / "data", kept_moments, {})
    kept = {key: config[key] for key in runs.DEFAULTS}
    counted = {"num_parameters": run.num_parameters, "data_facts": about}
    runs.write_config(folder, {"pvae": __version__, **kept, **counted})
    return run


def _load_data(config: dict[str, Any]) -> Dataset:
    """The data set of a configuration, whose path becomes absolute."""
    from pvae.data import sources

    dataset = runs.data_of(config)
    if config["data"] not in sources():
        config["data"] = str(Path(config["data"]).expanduser().absolute())
    _warn_of_constants(dataset)
    return dataset


def _warn_of_constants(dataset: Dataset) -> None:
    """A density of a feature that never varies is as high as its method's floor allows."""
    if dataset.kind != "continuous":
        return
    constant = (dataset.train.x == dataset.train.x[0]).all(0).nonzero().flatten().tolist()
    if constant:
        warnings.warn(
            f"{len(constant)} of {dataset.x_dim} features never vary in the training data (the "
            f"first is number {constant[0]}): densities there tell of each method's floor alone, "
            "so leave them out before comparing",
            UserWarning,
            stacklevel=2,
        )


def _choose_likelihood(config: dict[str, Any], programs: Programs, dataset: Dataset) -> str | None:
    """The likelihood that fits the data, where the model lets it be chosen and the user did not."""
    offered = programs.offered["model"]
    action = offered.actions.get("likelihood") if offered is not None else None
    if action is None or "likelihood" in config["model_options"]:
        return None
    if action.default not in (*_LIKELIHOODS.values(), None):
        return None
    likelihood = _LIKELIHOODS[dataset.kind]
    config["model_options"] = config["model_options"] | {"likelihood": likelihood}
    return likelihood


def _fitted_in_words(config: Mapping[str, Any], run: Run, dataset: Dataset) -> str:
    import torch

    best = run.history[run.best_epoch - 1]
    offset = float(dataset.valid.log_det.mean())
    bound = best["valid_bound"] + offset
    bits = float(dataset.bits_per_dim(torch.tensor(bound)))
    return (
        f"best epoch {run.best_epoch} of {len(run.history)}, {run.num_parameters} parameters, "
        f"{run.seconds:.1f} s\n"
        f"validation bound ({config['objective']}) {bound:.2f} nats per datum, "
        f"{bits:.3f} bits/dim on the original scale"
    )


@contextlib.contextmanager
def _threads(dataset: Dataset) -> Iterator[None]:
    """One thread for small data, where several only wait for each other; OMP_NUM_THREADS wins."""
    if dataset.train.x.numel() > _SMALL or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    import sklearn.utils  # its OpenMP must be loaded to be limited  # noqa: F401
    import torch
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


# --- evaluate and sample -------------------------------------------------------------------------


def evaluate(arguments: argparse.Namespace) -> None:
    """``pvae evaluate``: the log evidence of held-out data, written into the run folder."""
    folder = Path(arguments.run)
    config, run = runs.read_config(folder), runs.load(folder)
    dataset = _data_for(config, arguments.data)
    split = getattr(dataset, arguments.split)
    started = time.perf_counter()
    import torch

    evidence, curve = _estimate(arguments, run, split)
    seconds = time.perf_counter() - started
    about = _evidence_facts(evidence, dataset) | {
        "split": arguments.split,
        "data": dataset.description(),
        "seed": arguments.seed,
        "seconds": seconds,
    }
    if callable(getattr(run.model, "log_evidence", None)):
        with torch.no_grad():
            exact = run.model.log_evidence(split.x).double() + split.log_det
        about["exact_log_evidence"] = float(exact.mean())
    if curve is not None:
        shift = float(split.log_det[:200].mean())
        bounds = [bound + shift for bound in curve.bounds]
        about["curve"] = {"k": list(curve.sizes), "bound": bounds, "stderr": list(curve.stderr)}
    _write_evidence(run, dataset, split, evidence, about, folder)
    _say(_evidence_in_words(about))
    if evidence.methods is not None:
        from pvae.evidence import escalation_report

        _say(escalation_report(evidence))
    _say(f"wrote {folder}: evidence.json, evidence.nc, figures/evidence.png")


def _estimate(arguments: argparse.Namespace, run: Run, split: Any) -> tuple[Any, Any]:
    """Evidence by the method asked for, on the original scale, and L_k where weights allow it."""
    from pvae import evidence

    method, pair, seed = arguments.method, (run.model, run.guide, split.x), arguments.seed
    if arguments.tolerance is not None and method != "auto":
        raise OptionError(f"--tolerance is for --method auto, got --method {method}: leave one out")
    if arguments.budget is not None and method != "auto":
        raise OptionError(f"--budget is for --method auto, got --method {method}: leave one out")
    if arguments.num_temperatures is not None and method not in ("annealed", "smc"):
        raise OptionError(
            f"--num-temperatures is for --method annealed or smc, got --method {method}"
        )
    if method in ("annealed", "smc"):
        estimator = getattr(evidence, method)
        temperatures = arguments.num_temperatures or 1000
        with _progress(f"{method}, {temperatures} temperatures") as progress:
            found = estimator(*pair, num_temperatures=temperatures, seed=seed, progress=progress)
        return found.shifted(split.log_det), None
    if method == "auto":
        tolerance = 0.1 if arguments.tolerance is None else arguments.tolerance
        budget = 20_000 if arguments.budget is None else arguments.budget
        with _progress("escalating where the error is too large") as progress:
            found = evidence.auto(
                *pair, tolerance=tolerance, budget=budget, seed=seed,
                num_particles=min(arguments.num_particles, 1000),
                progress=lambda rung, done, total: progress(done, total),
            )  # fmt: skip
    else:
        with _progress(f"importance sampling, K = {arguments.num_particles}") as progress:
            found = evidence.importance(
                *pair, arguments.num_particles, seed=seed, progress=progress
            )
    curve = evidence.measured_curve(run.model, run.guide, split.x[:200], seed=seed)
    return found.shifted(split.log_det), curve


def _data_for(config: dict[str, Any], other: str | None) -> Dataset:
    """The data of a run, or other data prepared alike."""
    known = config["data_facts"]
    dataset = _load_data({**config, "data": config["data"] if other is None else other})
    if dataset.x_dim != known["x_dim"]:
        raise DataError(
            f"the run was trained on {known['x_dim']} features, {dataset.name} has "
            f"{dataset.x_dim}: give data of the same width"
        )
    if dataset.kind != known["kind"]:
        raise DataError(
            f"the run was trained on {known['kind']} data, {dataset.name} is {dataset.kind}: give "
            "data of the same kind"
        )
    if other is None and runs.facts(dataset)["fingerprint"] != known["fingerprint"]:
        warnings.warn(
            f"{dataset.name} has changed since the training: test data may have been trained on",
            UserWarning,
            stacklevel=2,
        )
    return dataset


def _evidence_facts(evidence: Any, dataset: Dataset) -> dict[str, Any]:
    log_p = evidence.log_evidence.mean()
    return {
        "log_evidence": evidence.mean,
        "stderr": evidence.mean_stderr,
        "bits_per_dim": float(dataset.bits_per_dim(log_p)),
        "elbo": float(evidence.elbo.mean()),
        "pareto_k_above_0.7": evidence.unreliable,
        "median_ess": float(evidence.ess.median()),
        "num_data": len(evidence),
        "num_particles": evidence.num_particles,
        "kind": evidence.kind,
        "method": evidence.method,
        "units": "nats per datum, on the original scale",
    }


def _evidence_in_words(about: Mapping[str, Any]) -> str:
    method = about["method"]
    more = {"importance": "--num-particles", "auto": "--budget"}.get(method, "--num-temperatures")
    mean = "ELBO" if method == "importance" else "mean log w"
    lines = [
        f"{about['data']}; {about['split']} split, {about['num_data']} data",
        f"log evidence   {about['log_evidence']:.3f} ± {about['stderr']:.3f} nats per datum "
        f"({about['kind']}, K = {about['num_particles']})",
        f"               {about['bits_per_dim']:.4f} bits/dim on the original scale",
        f"{mean:<14} {about['elbo']:.3f} nats per datum",
        f"k-hat > 0.7    {100 * about['pareto_k_above_0.7']:.1f} % of the data"
        + (f": raise {more}" if about["pareto_k_above_0.7"] > 0.1 else ""),
        f"{about['seconds']:.1f} s",
    ]
    if "exact_log_evidence" in about:
        exact = about["exact_log_evidence"]
        lines.insert(3, f"exact          {exact:.3f} nats per datum (model.log_evidence)")
    if "curve" in about:
        steps = zip(about["curve"]["k"], about["curve"]["bound"], strict=True)
        bounds = ", ".join(f"L_{k} {bound:.2f}" for k, bound in steps)
        lines.insert(-1, f"as K grows     {bounds} (the first 200 data)")
    return "\n".join(lines)


def _write_evidence(
    run: Run, dataset: Dataset, split: Any, evidence: Any, about: Mapping[str, Any], folder: Path
) -> None:
    from pvae import arviz, plots

    with runs.publish(folder) as aside:
        runs.write_json(aside / "evidence.json", about)
        arviz.to_netcdf(
            aside / "evidence.nc",
            posterior=arviz.posterior_draws(run.model, run.guide, split.x, seed=about["seed"]),
            evidence=evidence,
            observed=dataset.transform.inverse(split.x),
            labels=split.labels,
            attrs={key: about[key] for key in ("data", "split", "seed")},
        )
        runs.save_figure(
            lambda: plots.weights_diagnostics(evidence), aside / "figures" / "evidence.png"
        )


def diagnose(arguments: argparse.Namespace) -> None:
    """``pvae diagnose``: gap ledger, latents, calibration and predictive checks of a run."""
    for option in ("num_data", "num_particles", "num_runs"):
        if getattr(arguments, option) < 2:
            raise OptionError(
                f"--{option.replace('_', '-')} must be at least 2, got {getattr(arguments, option)}"
            )
    folder = Path(arguments.run)
    config, run = runs.read_config(folder), runs.load(folder)
    dataset = _data_for(config, None)
    rows = dataset.test.x[: arguments.num_data]
    _say(f"{dataset.description()}; the first {len(rows)} of the test split")
    found, skipped = {}, {}
    with _threads(dataset):
        for title, work in _diagnoses(run, rows, dataset, arguments).items():
            with _progress(title) as progress:
                try:
                    found[title] = work(progress)
                except ProgramError as error:
                    skipped[title] = str(error)
            _say(f"\n{title}")
            _say(skipped[title] if title in skipped else found[title].report())
    if not found:
        raise ProgramError(next(iter(skipped.values())))
    _write_diagnosis(found, skipped, folder, dataset, arguments)
    _say(f"\nwrote {folder}: diagnosis.json, tables as csv, figures")


def _diagnoses(
    run: Run, rows: Any, dataset: Dataset, arguments: argparse.Namespace
) -> dict[str, Callable[[Callable[[int, int], None]], Any]]:
    from pvae import evidence

    model, guide, seed = run.model, run.guide, arguments.seed
    back = dataset.transform.inverse
    statistics = {
        "mean": lambda x: back(x).double().mean(),
        "standard deviation": lambda x: back(x).double().std(),
        "spread of row means": lambda x: back(x).double().flatten(1).mean(1).std(),
        "spread within rows": lambda x: back(x).double().flatten(1).std(1).mean(),
    }
    return {
        "gaps": lambda progress: evidence.gaps(
            model, guide, rows, num_particles=arguments.num_particles, seed=seed, progress=progress
        ),
        "latents": lambda _: evidence.information(model, guide, rows, seed=seed),
        "calibration": lambda progress: evidence.calibration(
            model, guide, rows, num_runs=arguments.num_runs, seed=seed, progress=progress
        ),
        "predictive": lambda progress: evidence.predictive_checks(
            model, rows, statistics, guide=guide, seed=seed, progress=progress
        ),
    }


def _write_diagnosis(
    found: Mapping[str, Any],
    skipped: Mapping[str, str],
    folder: Path,
    dataset: Dataset,
    arguments: argparse.Namespace,
) -> None:
    from pvae import plots

    pictures: dict[str, dict[str, Callable[[Any], Any]]] = {
        "gaps": {"gaps": plots.gap_ledger},
        "latents": {"latent_information": plots.latent_information},
        "calibration": {
            "rank_histograms": plots.rank_histograms,
            "coverage": plots.coverage_curves,
        },
        "predictive": {"predictive_checks": plots.predictive_histograms},
    }
    content: dict[str, Any] = {
        "data": dataset.description(), "num_data": arguments.num_data, "seed": arguments.seed,
        "units": "nats per datum", "skipped": dict(skipped),
    }  # fmt: skip
    with runs.publish(folder) as aside:
        for title, result in found.items():
            table = result.rows()
            content[title] = {"rows": table, "report": result.report()}
            _write_csv(aside / f"{title}.csv", table)
            for name, picture in pictures[title].items():
                runs.save_figure(
                    functools.partial(picture, result), aside / "figures" / f"{name}.png"
                )
        runs.write_json(aside / "diagnosis.json", content)


def _write_csv(path: Path, table: list[dict[str, Any]]) -> None:
    import csv
    import io

    from pvae.checkpoints import write_aside

    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]) if table else [])
    writer.writeheader()
    writer.writerows(table)
    write_aside(path, text.getvalue().encode())


def sample(arguments: argparse.Namespace) -> None:
    """``pvae sample``: draws from a run, on the original scale."""
    folder, out = Path(arguments.run), arguments.out
    target = folder / "samples.npy" if out is None else Path(out)
    if target.suffix not in (".npy", ".png"):
        raise OptionError(f"--out must end in .npy or .png, got {str(target)!r}")
    if arguments.size < 1:
        raise OptionError(f"--size must be at least 1, got {arguments.size}")
    config, run = runs.read_config(folder), runs.load(folder)
    dataset = _data_for(config, None)
    import torch

    example = torch.zeros(arguments.size, dataset.x_dim)
    draws, _, _ = runs.generate(run.model, example, seed=arguments.seed)
    drawn = dataset.transform.inverse(draws)
    for path in _write_samples(drawn, dataset, target):
        _say(f"wrote {path}")


def _write_samples(drawn: Any, dataset: Dataset, target: Path) -> list[Path]:
    """The array, the picture, or both."""
    import io

    import numpy as np

    from pvae import plots
    from pvae.checkpoints import write_aside

    target.parent.mkdir(parents=True, exist_ok=True)
    written = []
    if target.suffix == ".npy":
        content = io.BytesIO()
        np.save(content, drawn.numpy())
        write_aside(target, content.getvalue())
        written.append(target)
    if dataset.image_shape is not None or target.suffix == ".png":
        data = dataset.transform.inverse(dataset.test.x[: len(drawn)])
        figure = plots.samples_beside_data({"samples": drawn}, data, dataset.image_shape)
        written.append(plots.save(figure, target.with_suffix(".png")))
    return written


# --- compare -------------------------------------------------------------------------------------


def compare(arguments: argparse.Namespace) -> None:
    """``pvae compare``: the board of given runs, or of the default roster."""
    if arguments.num_particles < 1:
        raise OptionError(f"--num-particles must be at least 1, got {arguments.num_particles}")
    if arguments.epochs < 1:
        raise OptionError(f"--epochs must be at least 1, got {arguments.epochs}")
    if arguments.runs:
        config, entries = _given_runs(arguments)
    else:
        chosen = {key: getattr(arguments, key) for key in ("binarize", "transform")}
        config = {"data": arguments.data or "digits", **chosen}
    name = f"compare-{Path(str(config['data'])).stem}"
    given = arguments.run_dir
    final = Path(given) if given else runs.next_folder(name)
    with runs.create(final) as aside:
        dataset = _load_data(config)
        _say(dataset.description())
        with _threads(dataset):
            if not arguments.runs:
                config |= {"epochs": arguments.epochs, "seed": arguments.seed}
                entries = _fit_roster(dataset, config, aside)
            board = _score(entries, dataset, arguments)
            _write_board(board, entries, dataset, aside, arguments.seed)
    _show(board)
    _say(f"wrote {final}: board.csv, board.json, evidence.nc, figures")


def _given_runs(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Runs by name, and the data they share."""
    folders = [Path(text) for text in arguments.runs]
    configs = [runs.read_config(folder) for folder in folders]
    first = configs[0]
    for folder, config in zip(folders, configs, strict=True):
        for key in ("data", "binarize", "transform", "data_facts"):
            if config[key] != first[key]:
                what = "the test split" if key == "data_facts" else key
                raise RunError(
                    f"{folder} and {folders[0]} were not trained on the same data ({what} "
                    "differs): compare runs of one data set, prepared alike"
                )
    data = str(arguments.data or first["data"])
    if data != first["data"] and str(Path(data).absolute()) != first["data"]:
        raise RunError(f"these runs were trained on {first['data']}: leave out --data {data}")
    entries = {}
    for folder in folders:
        name = folder.name if folder.name not in entries else str(folder)
        run = runs.load(folder)
        entries[name] = (run, run.seconds)
    return dict(first), entries


def _fit_roster(dataset: Dataset, config: dict[str, Any], folder: Path) -> dict[str, Entry]:
    def train_vae(config: dict[str, Any], folder: Path) -> Run:
        programs = Programs(config)
        _choose_likelihood(config, programs, dataset)
        return _fit(config, programs, dataset, folder, progress=sys.stderr.isatty())

    return roster.fit(dataset, config, folder, train_vae)


def _score(entries: Mapping[str, Entry], dataset: Dataset, arguments: argparse.Namespace) -> Board:
    from pvae import comparison

    with _progress(f"scoring {len(dataset.test)} test data") as progress:
        return comparison.compare(
            {name: entry for name, (entry, _) in entries.items()},
            dataset.test,
            num_particles=arguments.num_particles,
            seed=arguments.seed,
            fit_seconds={name: seconds for name, (_, seconds) in entries.items()},
            progress=lambda name, done, total: progress(done, total),
        )


def _write_board(
    board: Board, entries: Mapping[str, Entry], dataset: Dataset, folder: Path, seed: int
) -> None:
    from pvae import arviz, plots
    from pvae.training import Run

    board.save(folder)
    fitted = {row.name: entries[row.name][0] for row in board.rows}
    networks = {name: entry for name, entry in fitted.items() if isinstance(entry, Run)}
    classical = {name: entry for name, entry in fitted.items() if name not in networks}
    best = next(iter(networks), None)
    posterior = None
    if best is not None:
        run = networks[best]
        posterior = arviz.posterior_draws(run.model, run.guide, dataset.test.x, seed=seed)
    arviz.to_netcdf(
        folder / "evidence.nc",
        posterior=posterior,
        evidence=board.evidence,
        observed=dataset.transform.inverse(dataset.test.x),
        labels=dataset.test.labels,
        attrs={"data": dataset.description(), "posterior_of": best or "", "seed": seed},
    )
    runs.save_figure(lambda: plots.board(board), folder / "figures" / "board.png")
    if best is None:
        return
    runs.draw_board_figures(networks, classical, dataset, folder)
    rival = next((name for name in board.evidence if name in classical), None)
    rival = rival or next((name for name in networks if name != best), None)
    if rival is not None:
        pair = (board.evidence[best], board.evidence[rival])
        runs.save_figure(
            lambda: plots.evidence_against(*pair, names=(best, rival)),
            folder / "figures" / "evidence.png",
        )


def _show(board: Board) -> None:
    """The board as a table on a terminal, as plain text elsewhere."""
    if not sys.stdout.isatty():
        _say(str(board))
        return
    from rich.console import Console

    Console().print(board.table())


# --- board ---------------------------------------------------------------------------------------


def board(arguments: argparse.Namespace) -> None:
    """``pvae board``: compute what is missing of a board, and write its tables."""
    from pvae import board as boards
    from pvae import workers

    if arguments.run_cell is not None:
        from pvae import cells

        cells.compute(workers.read_configuration(), Path(arguments.run_cell))
        return
    if arguments.board is None:
        _say(boards.describe())
        return
    jobs = workers.num_cores() if arguments.jobs is None else arguments.jobs
    if jobs < 1:
        raise OptionError(f"--jobs must be at least 1, got {jobs}")
    chosen = boards.cells(
        arguments.board,
        schedule=arguments.schedule,
        data=arguments.data,
        entries=arguments.cells,
        seeds=arguments.seeds,
    )
    out = Path(arguments.out or f"boards/{arguments.board}-{arguments.schedule}")
    (out / "cells").mkdir(parents=True, exist_ok=True)
    with workers.locked(out):
        failed = _fill_cells(chosen, out / "cells", jobs)
        _write_standings(chosen, failed, out)
    if failed:
        raise RunError(
            f"{len(failed)} of {len(chosen)} cells failed, the first: "
            f"{next(iter(failed.values()))} (run the command again to try them again)"
        )


def _fill_cells(chosen: list[Cell], folder: Path, jobs: int) -> dict[str, str]:
    """Compute the cells that are missing, long ones first; digest -> reason of those that fail."""
    from pvae import workers
    from pvae.progress import CellReporter

    for left in folder.glob(".*"):  # of a command that was killed
        shutil.rmtree(left, ignore_errors=True)
    missing = [cell for cell in chosen if not (folder / cell.digest).exists()]
    missing.sort(key=lambda cell: -cell.task.size)
    work = [(folder / cell.digest, cell.config) for cell in missing]
    failed = {}
    with CellReporter(len(chosen), len(chosen) - len(missing)) as reporter:
        outcomes = workers.run_all(work, jobs=jobs, started=lambda k: reporter.start(missing[k]))
        for outcome in outcomes:
            cell = missing[outcome.index]
            if outcome.reason is not None:
                failed[cell.digest] = outcome.reason
            reporter.end(cell, outcome.seconds, outcome.reason)
    return failed


def _write_standings(chosen: list[Cell], failed: Mapping[str, str], out: Path) -> None:
    from pvae import cells, plots, standings
    from pvae.checkpoints import write_aside

    found: list[Any] = []
    for cell in chosen:
        try:
            result = cells.read(out / "cells" / cell.digest) if cell.digest not in failed else None
            found.append(failed[cell.digest] if result is None else result)
        except RunError as error:
            found.append(str(error))
    tables = standings.standings(chosen, found)
    write_aside(out / "board.csv", standings.to_csv(tables).encode())
    write_aside(out / "board.md", standings.markdown(tables).encode())
    if any(table.num_data for table in tables):
        runs.save_figure(lambda: plots.standings(tables), out / "board.png")
    for table in tables:
        _say(standings.as_text(table))
    _say(f"wrote {out}: board.csv, board.md, board.png, cells")


# --- list ----------------------------------------------------------------------------------------


def list_names(_: argparse.Namespace) -> None:
    """``pvae list``: what can be named on a command line, with a line on each."""
    import inspect

    from pvae import baselines
    from pvae.data import sources

    recipes = {
        name: (inspect.getdoc(recipe) or "").partition("\n")[0]
        for name, recipe in catalogue.objectives().items()
    }
    sections = {
        "models": catalogue.listing("model"),
        "guides": catalogue.listing("guide"),
        "objectives": recipes,
        "data sets": sources(),
        "baselines": baselines.available(),
        "optimizers": catalogue.optimizers(),
    }
    width = max(len(name) for section in sections.values() for name in section)
    for title, section in sections.items():
        _say(f"{title}:")
        for name, line in section.items():
            _say(f"  {name:<{width}}  {line.replace('``', '')}".rstrip())


# --- words ---------------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(text, flush=True)


@contextlib.contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A line redrawn on a terminal; elsewhere the title alone."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        print(title, file=sys.stderr, flush=True)
        yield lambda done, total: None
        return
    with console.status(title) as status:
        yield lambda done, total: status.update(f"{title}: {done}/{total}")
