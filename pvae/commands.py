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
from pvae.launchers import launched, leads

if TYPE_CHECKING:
    from pvae.board import Cell
    from pvae.comparison import Board
    from pvae.data import Dataset
    from pvae.distributed import Group
    from pvae.roster import Entry
    from pvae.training import Run

__all__ = [
    "FIT",
    "FREE",
    "Programs",
    "board",
    "choose_likelihood",
    "compare",
    "data_for",
    "diagnose",
    "evaluate",
    "has_encoder",
    "list_names",
    "load_data",
    "need_encoder",
    "resumable",
    "resume",
    "sample",
    "say",
    "threads",
    "train",
    "watched",
]

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
FREE = (
    "epochs", "patience", "checkpoint_every", "keep_checkpoints", "device", "track", "pictures"
)  # fmt: skip
_LIKELIHOODS = {
    "binary": "bernoulli",
    "continuous": "gaussian",
    "integer": "discretized_logistic",
}
_SMALL = 1_000_000  # numbers of training data


class Programs:
    """The model and the guide of a configuration, and the options that were given for each.

    Args:
        config: It names them.
        folder: A run folder, whose copy stands in for a user's file that is gone or changed.
    """

    def __init__(self, config: Mapping[str, Any], folder: Path | None = None) -> None:
        self.model = runs.find("model", config["model"], folder)
        self.guide = runs.find("guide", config["guide"], folder)
        self.offered: dict[str, catalogue.Options | None] = {
            "model": _offered("model", self.model),
            "guide": _offered("guide", self.guide),
            "objective": catalogue.objective_options(config["objective"]),
            "game": None,
        }
        self.game: catalogue.Program | None = None
        if config.get("game") is not None:
            self.game = runs.find("game", config["game"], folder)
            hidden = ("model", "guide", "discriminator", *catalogue.filled_names)
            self.offered["game"] = catalogue.Options(self.game.factory, "game", hidden=hidden)

    def read(self, component: str, values: Mapping[str, Any], *, origin: str = "") -> Any:
        """The options given for a component, with their types."""
        offered = self.offered[component]
        if offered is not None:
            return offered.read(values, origin=origin)
        if values and component == "game":
            raise OptionError(
                f"--game.{next(iter(values))} is an option of a game, and none is played: name one "
                f"by --game, such as {', '.join(catalogue.games())}"
            )
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
    with _grouped(config) as group, contextlib.ExitStack() as stack:
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
            run = _fit(config, programs, dataset, final, writes=leads(group))
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
    from pvae.resumption import refuse_difference

    with _grouped(config) as group, contextlib.ExitStack() as stack:
        if leads(group):
            stack.enter_context(locked(folder))
            stack.enter_context(resumable(folder))
        before = runs.read_config(folder)
        dataset = load_data(config, streams=True)
        refuse_difference(
            {key: config[key] for key in runs.DEFAULTS},
            {key: before[key] for key in runs.DEFAULTS},
            str(folder),
            free=FREE,
        )
        say(dataset.description())
        done = len(runs.history(folder, torn=True))
        with threads(dataset):
            run = _fit(config, programs, dataset, folder, before=before, writes=leads(group))
        if leads(group):
            _finish_train(config, run, dataset, folder)
    if len(run.history) == done:
        say(f"{folder} was finished already: a larger --epochs or --patience goes on with it")


@contextlib.contextmanager
def _grouped(config: Mapping[str, Any]) -> Iterator[Group | None]:
    """The processes that a launcher started for this command; ``None`` without one."""
    from pvae.distributed import join
    from pvae.training import device_of

    group = join(device_of(config["device"]))
    with contextlib.nullcontext() if group is None else group.working():
        yield group


def _finish_train(config: Mapping[str, Any], run: Run, dataset: Dataset, folder: Path) -> None:
    say(_fitted_in_words(config, run, dataset))
    runs.draw_figures(run, dataset, folder, name=config["model"])
    say(f"wrote {folder}; next: pvae evaluate {folder}")


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


def _fit(
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
    if writes:
        runs.write_config(folder, full, sources=not resumed)
    try:
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
    except RunError:  # nothing has been trained
        if before is not None and writes:
            runs.write_config(folder, before, sources=False)
        raise
    if writes and run.num_parameters != full["num_parameters"]:
        runs.write_config(folder, full | {"num_parameters": run.num_parameters}, sources=False)
    return run


def load_data(config: dict[str, Any], *, streams: bool = False) -> Dataset:
    """The data set of a configuration, whose path becomes absolute."""
    from pvae.data import sources

    dataset = runs.data_of(config, streams=streams)
    if config["data"] not in sources():
        config["data"] = str(Path(config["data"]).expanduser().absolute())
    _warn_of_constants(dataset)
    return dataset


def _warn_of_constants(dataset: Dataset) -> None:
    """A density of a feature that never varies is as high as its method's floor allows."""
    from pvae.data.mapped import MappedRows

    if dataset.kind != "continuous":
        return
    x: Any = dataset.train.x
    if isinstance(x, MappedRows):
        same = x.moments.low == x.moments.high
    else:
        same = (x == x[0]).all(0)
    constant = same.nonzero().flatten().tolist()
    if constant:
        warnings.warn(
            f"{len(constant)} of {dataset.x_dim} features never vary in the training data (the "
            f"first is number {constant[0]}): densities there tell of each method's floor alone, "
            "so leave them out before comparing",
            UserWarning,
            stacklevel=2,
        )


def choose_likelihood(config: dict[str, Any], programs: Programs, dataset: Dataset) -> str | None:
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
def threads(dataset: Dataset) -> Iterator[None]:
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
    config = runs.read_config(folder)
    if arguments.method != "annealed":
        need_encoder(config, folder, "say --method annealed, which then starts from the prior")
    run = runs.load(folder)
    if not has_encoder(config, folder):
        run.guide = None
    dataset = data_for(config, arguments.data)
    split = getattr(dataset, arguments.split)
    started = time.perf_counter()
    import torch

    from pvae.evidence.sweep import tensors_of

    device = next((t.device for t in tensors_of(run.model, run.guide)), "cpu")
    with _grouped({"device": str(device)}) as group:
        evidence, curve = _estimate(arguments, run, split, group)
    if not leads(group):
        return
    seconds = time.perf_counter() - started
    about = _evidence_facts(evidence, dataset) | {
        "split": arguments.split,
        "data": dataset.description(),
        "seed": arguments.seed,
        "seconds": seconds,
    }
    if callable(getattr(run.model, "log_evidence", None)):
        with torch.no_grad():
            exact = torch.cat([run.model.log_evidence(rows).double() for rows in _pieces(split.x)])
            exact = exact + split.log_det
        about["exact_log_evidence"] = float(exact.mean())
    if curve is not None:
        shift = float(split.log_det[:200].mean())
        bounds = [bound + shift for bound in curve.bounds]
        about["curve"] = {"k": list(curve.sizes), "bound": bounds, "stderr": list(curve.stderr)}
    _write_evidence(run, dataset, split, evidence, about, folder)
    say(_evidence_in_words(about))
    if evidence.methods is not None:
        from pvae.evidence import escalation_report

        say(escalation_report(evidence))
    say(f"wrote {folder}: evidence.json, evidence.nc, figures/evidence.png")


def has_encoder(config: Mapping[str, Any], folder: Path) -> bool:
    """Whether the guide of a run was trained, which a game may leave as it was made."""
    if config["game"] is None:
        return True
    game = runs.find("game", config["game"], folder)
    return "guide" in catalogue.option_names(game.factory)


def need_encoder(config: Mapping[str, Any], folder: Path, instead: str) -> None:
    """Refuse a run whose guide was not trained.

    Raises:
        RunError: It says what to do instead.
    """
    if not has_encoder(config, folder):
        game = str(config["game"]).rpartition(":")[2]
        raise RunError(f"{folder} was trained by the game {game}, which has no encoder: {instead}")


def _pieces(x: Any) -> Iterator[Any]:
    """All rows, those in a file some at a time."""
    from pvae.data.mapped import MappedRows

    yield from x.blocks() if isinstance(x, MappedRows) else (x,)


def _estimate(
    arguments: argparse.Namespace, run: Run, split: Any, group: Group | None
) -> tuple[Any, Any]:
    """Evidence by the method asked for, on the original scale, and L_k where weights allow it."""
    import torch

    from pvae import evidence
    from pvae.data import take

    batch = runs.batch_for(run.model, split.x, split.labels)
    method, pair, seed = arguments.method, (run.model, run.guide, batch), arguments.seed
    if arguments.tolerance is not None and method != "auto":
        raise OptionError(f"--tolerance is for --method auto, got --method {method}: leave one out")
    if arguments.budget is not None and method != "auto":
        raise OptionError(f"--budget is for --method auto, got --method {method}: leave one out")

    def shared(estimator: Any) -> Any:
        return functools.partial(evidence.in_parts, estimator=estimator) if group else estimator

    if arguments.num_temperatures is not None and method not in ("annealed", "smc"):
        raise OptionError(
            f"--num-temperatures is for --method annealed or smc, got --method {method}"
        )
    if method in ("annealed", "smc"):
        estimator = shared(getattr(evidence, method))
        temperatures = arguments.num_temperatures or 1000
        with watched(f"{method}, {temperatures} temperatures") as progress:
            start = {"start": "prior"} if run.guide is None else {}
            found = estimator(
                *pair, num_temperatures=temperatures, seed=seed, progress=progress, **start
            )
        return found.shifted(split.log_det), None
    if method == "auto":
        tolerance = 0.1 if arguments.tolerance is None else arguments.tolerance
        budget = 20_000 if arguments.budget is None else arguments.budget
        with watched("escalating where the error is too large") as progress:
            found = shared(evidence.auto)(
                *pair, tolerance=tolerance, budget=budget, seed=seed,
                num_particles=min(arguments.num_particles, 1000),
                progress=lambda rung, done, total: progress(done, total),
            )  # fmt: skip
    else:
        with watched(f"importance sampling, K = {arguments.num_particles}") as progress:
            found = shared(evidence.importance)(
                *pair, arguments.num_particles, seed=seed, progress=progress
            )
    if not leads(group):
        return found.shifted(split.log_det), None
    first = take(batch, torch.arange(min(200, len(split))))
    curve = evidence.measured_curve(run.model, run.guide, first, seed=seed)
    return found.shifted(split.log_det), curve


def data_for(config: dict[str, Any], other: str | None) -> Dataset:
    """The data of a run, or other data prepared alike."""
    known = config["data_facts"]
    other_or_own = config["data"] if other is None else other
    dataset = load_data({**config, "data": other_or_own}, streams=True)
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
    if other is None or dataset.kind != "continuous":
        return dataset
    return _moved(dataset, data_for(config, None).transform)


def _moved(dataset: Dataset, transform: Any) -> Dataset:
    """Data moved to the model's scale as the training data were.

    Standardised by their own moments, data from elsewhere would look like those from here.
    """
    import dataclasses

    import torch

    from pvae.data import Split
    from pvae.data.mapped import MappedRows

    def moved(split: Any) -> Any:
        if isinstance(split.x, MappedRows):
            x: Any = split.x.then(lambda rows: transform(dataset.transform.inverse(rows)))
            offsets = [
                transform.log_abs_det_jacobian(dataset.transform.inverse(rows).double())
                for rows in split.x.blocks()
            ]
            return Split(x, torch.cat(offsets), split.labels)
        x = dataset.transform.inverse(split.x)
        return Split(transform(x), transform.log_abs_det_jacobian(x.double()), split.labels)

    parts = {name: moved(getattr(dataset, name)) for name in ("train", "valid", "test")}
    return dataclasses.replace(dataset, **parts, transform=transform)


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
    from pvae.data.mapped import MappedRows

    is_streamed = isinstance(split.x, MappedRows)  # what stays in its file is not written again
    first = 1000 if is_streamed else len(split)
    labels = split.labels if split.labels is None else split.labels[:first]
    with runs.publish(folder) as aside:
        runs.write_json(aside / "evidence.json", about)
        arviz.to_netcdf(
            aside / "evidence.nc",
            posterior=None
            if run.guide is None
            else arviz.posterior_draws(
                run.model,
                run.guide,
                runs.batch_for(run.model, split.x[:first], labels),
                seed=about["seed"],
            ),
            evidence=evidence,
            observed=None if is_streamed else dataset.transform.inverse(split.x),
            labels=split.labels,
            attrs={key: about[key] for key in ("data", "split", "seed")},
        )
        runs.save_figure(
            lambda: plots.weights_diagnostics(evidence), aside / "figures" / "evidence.png"
        )


def diagnose(arguments: argparse.Namespace) -> None:
    """``pvae diagnose``: gap ledger, latents, calibration and predictive checks of a run."""
    from pvae.data import num_rows

    for option in ("num_data", "num_particles", "num_runs"):
        if getattr(arguments, option) < 2:
            raise OptionError(
                f"--{option.replace('_', '-')} must be at least 2, got {getattr(arguments, option)}"
            )
    folder = Path(arguments.run)
    config = runs.read_config(folder)
    need_encoder(config, folder, "diagnose a run of a game that has one, such as vae_gan")
    run = runs.load(folder)
    dataset = data_for(config, None)
    rows = runs.test_batch(run.model, dataset, arguments.num_data)
    say(f"{dataset.description()}; the first {num_rows(rows)} of the test split")
    found, skipped = {}, {}
    with threads(dataset):
        for title, work in _diagnoses(run, rows, dataset, arguments).items():
            with watched(title) as progress:
                try:
                    found[title] = work(progress)
                except ProgramError as error:
                    skipped[title] = str(error)
            say(f"\n{title}")
            say(skipped[title] if title in skipped else found[title].report())
    if not found:
        raise ProgramError(next(iter(skipped.values())))
    _write_diagnosis(found, skipped, folder, dataset, arguments)
    say(f"\nwrote {folder}: diagnosis.json, tables as csv, figures")


def _diagnoses(
    run: Run, rows: Any, dataset: Dataset, arguments: argparse.Namespace
) -> dict[str, Callable[[Callable[[int, int], None]], Any]]:
    from pvae import evidence

    model, guide, seed = run.model, run.guide, arguments.seed

    def back(batch: Any) -> Any:
        return dataset.transform.inverse(batch[0] if isinstance(batch, tuple) else batch)

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
    if out is not None and Path(out).suffix not in (".npy", ".png", ".txt"):
        raise OptionError(f"--out must end in .npy or .png, or in .txt for text, got {out!r}")
    if arguments.size < 1:
        raise OptionError(f"--size must be at least 1, got {arguments.size}")
    config, run = runs.read_config(folder), runs.load(folder)
    dataset = data_for(config, None)
    is_text = dataset.vocabulary is not None
    target = folder / ("samples.txt" if is_text else "samples.npy") if out is None else Path(out)
    if target.suffix == ".txt" and not is_text:
        raise OptionError(f"{dataset.name} is no text: let --out end in .npy or .png")
    import torch

    x, labels = torch.zeros(arguments.size, dataset.x_dim), dataset.test.labels
    if labels is not None:
        labels = labels[torch.arange(len(x)) % len(labels)]
    example = runs.batch_for(run.model, x, labels)
    draws, means, _ = runs.generate(run.model, example, seed=arguments.seed)
    if config["game"] is not None and means is not None:
        draws = means  # what the game was about; p(x | z) besides its mean may be untrained
    drawn = dataset.transform.inverse(draws)
    for path in _write_samples(drawn, dataset, target):
        say(f"wrote {path}")


def _write_samples(drawn: Any, dataset: Dataset, target: Path) -> list[Path]:
    """The array, the picture, or both."""
    import io

    import numpy as np

    from pvae import plots
    from pvae.checkpoints import write_aside

    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".txt":
        from pvae.data.text import words_of

        lines = words_of(drawn, dataset.vocabulary or ())
        write_aside(target, ("\n".join(lines) + "\n").encode())
        return [target]
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
    with _grouped({"device": "cpu"}) as group, contextlib.ExitStack() as stack:
        if group is not None and not arguments.runs:
            raise OptionError(
                f"the roster is fitted by one process, and these are {group.size}: name the runs "
                "to compare (pvae compare RUN RUN), or leave torchrun out"
            )
        if leads(group):
            aside = stack.enter_context(runs.create(final))
        dataset = load_data(config)
        say(dataset.description())
        with threads(dataset):
            if not arguments.runs:
                config |= {"epochs": arguments.epochs, "seed": arguments.seed}
                entries = _fit_roster(dataset, config, aside)
            board = _score(entries, dataset, arguments)
            if not leads(group):
                return
            _write_board(board, entries, dataset, aside, arguments.seed)
    _show(board)
    say(f"wrote {final}: board.csv, board.json, evidence.nc, figures")


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
    for folder, config in zip(folders, configs, strict=True):
        need_encoder(config, folder, "leave it out")
        name = folder.name if folder.name not in entries else str(folder)
        run = runs.load(folder)
        entries[name] = (run, run.seconds)
    return dict(first), entries


def _fit_roster(dataset: Dataset, config: dict[str, Any], folder: Path) -> dict[str, Entry]:
    def train_vae(config: dict[str, Any], folder: Path) -> Run:
        programs = Programs(config)
        choose_likelihood(config, programs, dataset)
        config["checkpoint_every"] = None  # the folder is built aside, and gone if it fails
        return _fit(config, programs, dataset, folder, progress=sys.stderr.isatty())

    return roster.fit(dataset, config, folder, train_vae)


def _score(entries: Mapping[str, Entry], dataset: Dataset, arguments: argparse.Namespace) -> Board:
    from pvae import comparison

    with watched(f"scoring {len(dataset.test)} test data") as progress:
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
        say(str(board))
        return
    from rich.console import Console

    Console().print(board.table())


# --- board ---------------------------------------------------------------------------------------


def board(arguments: argparse.Namespace) -> None:
    """``pvae board``: compute what is missing of a board, and write its tables."""
    from pvae import board as boards
    from pvae import locks, workers

    if arguments.run_cell is not None:
        from pvae import cells

        cells.compute(workers.read_configuration(), Path(arguments.run_cell))
        return
    if arguments.board is None:
        say(boards.describe())
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
    failed = _fill_cells(chosen, out / "cells", jobs)
    with locks.locked(out, waits=True):
        _write_standings(chosen, failed, out)
    if failed:
        raise RunError(
            f"{len(failed)} of {len(chosen)} cells failed, the first: "
            f"{next(iter(failed.values()))} (run the command again to try them again)"
        )


def _fill_cells(chosen: list[Cell], folder: Path, jobs: int) -> dict[str, str]:
    """Compute the cells that are missing, long ones first; digest -> reason of those that fail.

    Commands that share the folder each take cells that no other has claimed.
    """
    from pvae import locks, workers
    from pvae.progress import CellReporter

    def claim(k: int) -> Any:
        place = folder / missing[k].digest
        file = locks.claim(folder.parent / ".claims" / place.name)
        if file is None:
            return "taken"
        if place.exists():
            file.close()
            return "done"
        for left in folder.glob(f".{place.name}.*"):  # of a command that was killed
            shutil.rmtree(left, ignore_errors=True)
        return file

    missing = [cell for cell in chosen if not (folder / cell.digest).exists()]
    missing.sort(key=lambda cell: -cell.task.size)
    work = [(folder / cell.digest, cell.config) for cell in missing]
    failed = {}
    with CellReporter(len(chosen), len(chosen) - len(missing)) as reporter:
        outcomes = workers.run_all(
            work, jobs=jobs, started=lambda k: reporter.start(missing[k]), claim=claim
        )
        for outcome in outcomes:
            cell = missing[outcome.index]
            if outcome.seconds is None:
                reporter.elsewhere(cell)
                continue
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
        say(standings.as_text(table))
    say(f"wrote {out}: board.csv, board.md, board.png, cells")


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
        "games": catalogue.listing("game"),
        "data sets": sources(),
        "baselines": baselines.available(),
        "optimizers": catalogue.optimizers(),
    }
    width = max(len(name) for section in sections.values() for name in section)
    for title, section in sections.items():
        say(f"{title}:")
        for name, line in section.items():
            say(f"  {name:<{width}}  {line.replace('``', '')}".rstrip())


# --- words ---------------------------------------------------------------------------------------


def say(text: str) -> None:
    """One line on standard output, at once."""
    print(text, flush=True)


@contextlib.contextmanager
def watched(title: str) -> Iterator[Callable[[int, int], None]]:
    """A line redrawn on a terminal; elsewhere the title alone."""
    from rich.console import Console

    console = Console(stderr=True)
    place = launched()
    if place is not None and place.rank:
        yield lambda done, total: None
        return
    if not console.is_terminal:
        print(title, file=sys.stderr, flush=True)
        yield lambda done, total: None
        return
    with console.status(title) as status:
        yield lambda done, total: status.update(f"{title}: {done}/{total}")
