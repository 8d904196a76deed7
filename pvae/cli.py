"""The command line: ``pvae train | evaluate | compare | sample | list``.

Everything heavy is imported inside the commands, so that ``pvae --help`` answers at once. A mistake
of the user's is one line on standard error and an exit code that is not zero.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from pvae import __version__, catalogue, runs
from pvae.errors import DataError, OptionError, PvaeError, RunError, did_you_mean

if TYPE_CHECKING:
    from pvae.comparison import Board
    from pvae.data import Dataset
    from pvae.training import Run

__all__ = ["main"]

_COMPONENTS = ("model", "guide", "objective")
_KEPT = ("pvae", "data_facts", "num_parameters")  # in a run's config.yaml, but no options
_LIKELIHOODS = {
    "binary": "bernoulli",
    "continuous": "gaussian",
    "integer": "discretized_logistic",
}


# --- the parser ----------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are errors like any other."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(message.removeprefix("argument "))


def _whole(text: str) -> int:
    """A whole number; ``1e3`` is one."""
    with contextlib.suppress(ValueError, OverflowError):
        number = float(text)
        if number.is_integer():
            return int(text) if text.lstrip("+-").isdigit() else int(number)
    raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")


def _real(text: str) -> float:
    with contextlib.suppress(ValueError):
        return float(text)
    raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text.lower() == "none" else kind(text)


def _build_parser() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(
        prog="pvae",
        description="Variational autoencoders as Pyro programs, judged by held-out log-likelihood.",
        epilog="More on a command: pvae COMMAND --help. Start with: pvae compare --data digits",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pvae {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)
    made = {}
    for name, (_, fill, summary) in _COMMANDS.items():
        made[name] = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            argument_default=argparse.SUPPRESS if name == "train" else None,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        fill(made[name])
    return parser, made


def _fill_train(parser: _Parser) -> None:
    default = runs.DEFAULTS
    parser.epilog = (
        "The arguments of MODEL, of the guide and of the objective are options too:\n"
        "  pvae train vae --model.z_dim 8 --model.hidden '[64, 64]' --guide.covariance full\n"
        "  pvae train vae --objective dreg --objective.num_particles 20\n"
        "  pvae train ./mine.py:Mine --data x.npy\n"
        "See them, with their meaning, by: pvae train MODEL --help"
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a name from `pvae list`, package.module:Class or ./file.py:Class",
    )

    def option(name: str, kind: Callable[[str], Any], metavar: str, text: str) -> None:
        value = default.get(name.replace("-", "_"))
        shown = "" if value is None else f" (default {value})"
        parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=text + shown)

    option("guide", str, "GUIDE", "likewise")
    option("objective", str, "O", "what is maximised: vae, beta_vae, iwae, dreg, stl")
    option("data", str, "D", "a name from `pvae list`, or a .npy, .npz or .csv file")
    option("binarize", _or_none(str), "HOW", "dynamic, fixed or threshold: grey values to bits")
    option("transform", str, "T", "none, dequantize, logit, standardize; chosen by the data")
    option("epochs", _whole, "N", "passes over the training data")
    option("batch-size", _whole, "N", "data per step")
    option("optimizer", str, "NAME", "one of torch.optim, in small letters")
    option("lr", _real, "RATE", "learning rate")
    option("lr-schedule", str, "NAME", "constant, cosine or linear")
    option("clip-norm", _or_none(_real), "NORM", "largest norm of the gradient")
    option(
        "patience", _or_none(_whole), "N", "stop after N epochs without a better validation bound"
    )
    option("seed", _whole, "N", "of parameters, order and noise; the split is fixed")
    option("device", str, "DEVICE", "auto, cpu, cuda, …")
    option("engine", str, "ENGINE", "how a step is run")
    option("run-dir", str, "FOLDER", "where to write; runs/<model>-<data>-<n> if left out")
    option("config", str, "FILE", "a YAML file with any of these options; the command line wins")


def _fill_evaluate(parser: _Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="a folder that pvae train wrote")
    parser.add_argument(
        "--num-particles", type=_whole, metavar="K", default=5000, help="draws per datum (5000)"
    )
    parser.add_argument(
        "--split", choices=("test", "valid", "train"), default="test", help="which data (test)"
    )
    parser.add_argument("--data", metavar="D", help="other data than the run was trained on")
    parser.add_argument("--seed", type=_whole, metavar="N", default=0, help="of the draws (0)")


def _fill_compare(parser: _Parser) -> None:
    parser.epilog = (
        "Without RUN, a default roster is fitted to the data: classical densities and VAEs.\n"
        "With RUNs, they are set side by side on the data they share."
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders that pvae train wrote")
    parser.add_argument("--data", metavar="D", help="a name from `pvae list`, or a file (digits)")
    parser.add_argument("--binarize", metavar="HOW", help="dynamic, fixed or threshold")
    parser.add_argument("--transform", metavar="T", help="none, dequantize, logit, standardize")
    parser.add_argument("--run-dir", metavar="FOLDER", help="where to write (runs/compare-…)")
    parser.add_argument(
        "--num-particles", type=_whole, metavar="K", default=1000, help="draws per datum (1000)"
    )
    parser.add_argument(
        "--epochs", type=_whole, metavar="N", default=100, help="of each VAE it fits (100)"
    )
    parser.add_argument("--seed", type=_whole, metavar="N", default=0, help="of fits and draws (0)")


def _fill_sample(parser: _Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="a folder that pvae train wrote")
    parser.add_argument("--size", type=_whole, metavar="N", default=64, help="how many (64)")
    parser.add_argument("--out", metavar="FILE", help=".npy or .png (RUN/samples.npy)")
    parser.add_argument("--seed", type=_whole, metavar="N", default=0, help="of the draws (0)")


def _fill_list(parser: _Parser) -> None:
    """No options."""


def _parse(parser: _Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse, with a hint for an option that does not exist."""
    known = parser._option_string_actions
    for token in argv:
        name = token.partition("=")[0]
        if name.startswith("--") and name not in known:
            hint = did_you_mean(name, [each for each in known if each.startswith("--")])
            raise OptionError(f"no option is called {name}: {hint}")
    return parser.parse_args(argv)


def _split_components(argv: Sequence[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """``--model.z_dim 8`` and its kind apart from the rest of a command line."""
    given: dict[str, dict[str, str]] = {name: {} for name in _COMPONENTS}
    rest: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        option, equals, value = token.partition("=")
        component, dot, name = option.removeprefix("--").partition(".")
        if not (token.startswith("--") and dot and "/" not in component):
            rest.append(token)
            continue
        if component not in given:
            near = did_you_mean(f"--{component}.{name}", [f"--{each}.{name}" for each in given])
            raise OptionError(f"no option is called {option}: {near}")
        if not equals:
            value = next(tokens, "--")
        if value.startswith("--"):
            raise OptionError(f"{option} needs a value")
        given[component][name.replace("-", "_")] = value
    return given, rest


# --- train ---------------------------------------------------------------------------------------


def _train(argv: Sequence[str], parser: _Parser) -> None:
    given, rest = _split_components(argv)
    if {"-h", "--help"} & set(rest):
        _help_train(parser, [token for token in rest if token not in ("-h", "--help")])
        return
    arguments = vars(_parse(parser, rest))
    run_dir = arguments.pop("run_dir", None)
    config, given_here = _resolve(parser, arguments, given)
    run_dir = run_dir or config.pop("run_dir", None)
    config.pop("run_dir", None)
    name = f"{given_here.model.name}-{Path(str(config['data'])).stem}".replace("_", "-")
    final = Path(run_dir) if run_dir else runs.next_folder(name)
    with runs.create(final) as aside:
        dataset = _load_data(config)
        _say(dataset.description())
        with _threads(dataset):
            run = _fit(config, given_here, dataset, aside)
        _say(_fitted_in_words(config, run, dataset))
        runs.draw_figures(run, dataset, aside, name=config["model"])
    _say(f"wrote {final}; next: pvae evaluate {final}")


class _Given:
    """The programs of a command line, and the options that were given for each."""

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


def _resolve(
    parser: _Parser, arguments: dict[str, Any], given: Mapping[str, Mapping[str, str]]
) -> tuple[dict[str, Any], _Given]:
    """Defaults, then the config file, then the command line."""
    file = arguments.pop("config", None)
    found = _read_config_file(parser, Path(file)) if file is not None else {}
    config = {**runs.DEFAULTS, **found, **arguments}
    if not config["model"]:
        known = ", ".join(catalogue.listing("model"))
        raise OptionError(f"train needs a MODEL: one of {known}, or ./file.py:Class")
    programs = _Given(config)
    for component in _COMPONENTS:
        key = f"{component}_options"
        origin = f"{Path(file).name}: {key}: " if file is not None else ""
        options = programs.read(component, found.get(key, {}), origin=origin)
        config[key] = options | programs.read(component, given[component])
        offered = programs.offered[component]
        if offered is not None:
            offered.missing(config[key])
    catalogue.build_objective(config["objective"], config["objective_options"])
    config |= {"model": programs.model.reference, "guide": programs.guide.reference}
    return config, programs


def _read_config_file(parser: _Parser, path: Path) -> dict[str, Any]:
    content = runs.read_yaml(path)
    known = [*runs.DEFAULTS, "run_dir"]
    actions = {action.dest: action for action in parser._actions}
    found = {}
    for key, value in content.items():
        if key in _KEPT:
            continue
        if key not in known:
            raise OptionError(f"{path.name}: no option {key!r}: {did_you_mean(str(key), known)}")
        found[key] = _typed(path.name, key, value, actions.get(key))
    return found


def _typed(file: str, key: str, value: Any, action: argparse.Action | None) -> Any:
    """A value of a config file, checked as the command line's."""
    if action is None:
        if value is None or isinstance(value, dict):
            return value or {}
        raise OptionError(f"{file}: {key!r} must hold 'name: value' lines, got {value!r}")
    if value is None:
        return runs.DEFAULTS.get(key)
    if isinstance(value, (list, dict, bool)):
        raise OptionError(f"{file}: {key!r} takes one value, got {value!r}")
    try:
        return action.type(str(value)) if callable(action.type) else str(value)
    except argparse.ArgumentTypeError as error:
        raise OptionError(f"{file}: {key!r}: {error}") from None


def _help_train(parser: _Parser, argv: Sequence[str]) -> None:
    """The help page, with the options of the model, guide and objective if a MODEL is named."""
    arguments = vars(_parse(parser, argv))
    if "model" in arguments:
        programs = _Given({**runs.DEFAULTS, **arguments})
        for component, offered in programs.offered.items():
            rows = offered.describe() if offered is not None else []
            if not rows or offered is None:
                continue
            group = parser.add_argument_group(f"{component} options ({offered.owner})")
            for option, text in rows:
                group.add_argument(option, metavar="…", help=text.replace("%", "%%"))
    parser.print_help()


def _fit(
    config: dict[str, Any],
    given: _Given,
    dataset: Dataset,
    folder: Path,
    *,
    progress: bool = True,
) -> Run:
    """Train into ``folder``: pair, fit, ``config.yaml``; what was chosen is added to ``config``."""
    from pvae.checkpoints import save_tensors
    from pvae.training import fit

    _choose_likelihood(config, given, dataset)
    for component, offered in given.offered.items():
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
    if given.takes("x_mean", "x_scale"):
        save_tensors(folder / "checkpoints" / "data", moments, {})
    kept = {key: config[key] for key in runs.DEFAULTS}
    counted = {"num_parameters": run.num_parameters, "data_facts": about}
    runs.write_config(folder, {"pvae": __version__, **kept, **counted})
    return run


_FIT = (
    "epochs",
    "batch_size",
    "optimizer",
    "lr",
    "lr_schedule",
    "clip_norm",
    "patience",
    "seed",
    "device",
    "engine",
)


def _load_data(config: dict[str, Any]) -> Dataset:
    """The data set of a configuration, whose path becomes absolute."""
    from pvae.data import sources

    dataset = runs.data_of(config)
    if config["data"] not in sources():
        config["data"] = str(Path(config["data"]).expanduser().absolute())
    return dataset


def _choose_likelihood(config: dict[str, Any], given: _Given, dataset: Dataset) -> None:
    """The likelihood that fits the data, where the model lets it be chosen and the user did not."""
    offered = given.offered["model"]
    action = offered.actions.get("likelihood") if offered is not None else None
    if action is None or "likelihood" in config["model_options"]:
        return
    if action.default not in (*_LIKELIHOODS.values(), None):
        return
    likelihood = _LIKELIHOODS[dataset.kind]
    config["model_options"]["likelihood"] = likelihood
    _say(f"likelihood {likelihood}, for {dataset.kind} data (--model.likelihood changes it)")


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


_SMALL = 1_000_000  # numbers of training data


# --- evaluate and sample -------------------------------------------------------------------------


def _evaluate(argv: Sequence[str], parser: _Parser) -> None:
    arguments = _parse(parser, argv)
    folder = Path(arguments.run)
    config, run = runs.read_config(folder), runs.load(folder)
    dataset = _data_for(config, arguments.data)
    split = getattr(dataset, arguments.split)
    started = time.perf_counter()
    import torch

    from pvae.evidence import importance

    with _progress(f"importance sampling, K = {arguments.num_particles}") as progress:
        evidence = importance(
            run.model,
            run.guide,
            split.x,
            arguments.num_particles,
            seed=arguments.seed,
            progress=progress,
        ).shifted(split.log_det)
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
    _write_evidence(run, dataset, split, evidence, about, folder)
    _say(_evidence_in_words(about))
    _say(f"wrote {folder}: evidence.json, evidence.nc, figures/evidence.png")


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
    lines = [
        f"{about['data']}; {about['split']} split, {about['num_data']} data",
        f"log evidence   {about['log_evidence']:.3f} ± {about['stderr']:.3f} nats per datum "
        f"({about['kind']}, K = {about['num_particles']})",
        f"               {about['bits_per_dim']:.4f} bits/dim on the original scale",
        f"ELBO           {about['elbo']:.3f} nats per datum",
        f"k-hat > 0.7    {100 * about['pareto_k_above_0.7']:.1f} % of the data"
        + (": raise --num-particles" if about["pareto_k_above_0.7"] > 0.1 else ""),
        f"{about['seconds']:.1f} s",
    ]
    if "exact_log_evidence" in about:
        exact = about["exact_log_evidence"]
        lines.insert(3, f"exact          {exact:.3f} nats per datum (model.log_evidence)")
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


def _sample(argv: Sequence[str], parser: _Parser) -> None:
    arguments = _parse(parser, argv)
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


def _compare(argv: Sequence[str], parser: _Parser) -> None:
    arguments = _parse(parser, argv)
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
                entries = _fit_roster(dataset, config, arguments, aside)
            board = _score(entries, dataset, arguments)
            _write_board(board, entries, dataset, aside, arguments.seed)
    _show(board)
    _say(f"wrote {final}: board.csv, board.json, evidence.nc, figures")


Entry = tuple[Any, float]  # a run or a fitted baseline, and the seconds that its fit took


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


def _fit_roster(
    dataset: Dataset, config: Mapping[str, Any], arguments: argparse.Namespace, folder: Path
) -> dict[str, Entry]:
    """Fit every entry of the default roster; one that does not suit the data is left out."""
    roster = _roster(dataset, config, arguments, folder)
    entries: dict[str, Entry] = {}
    for number, (name, make) in enumerate(roster.items(), 1):
        started = time.perf_counter()
        _note(f"[{number}/{len(roster)}] {name}")
        try:
            entry = make()
        except PvaeError as error:
            warnings.warn(f"{name} was left out: {error}", UserWarning, stacklevel=2)
            continue
        seconds = time.perf_counter() - started
        entries[name] = (entry, seconds)
        _note(f"[{number}/{len(roster)}] {name}: {_entry_in_words(entry)}{seconds:.1f} s")
    if not entries:
        raise DataError(f"nothing in the roster could be fitted to {dataset.name}")
    return entries


def _is_run(entry: Any) -> bool:
    from pvae.training import Run

    return isinstance(entry, Run)


def _entry_in_words(entry: Any) -> str:
    if _is_run(entry):
        return f"best epoch {entry.best_epoch} of {len(entry.history)}, "
    option, chosen = getattr(entry, "option", None), getattr(entry, "chosen", None)
    if option is None:
        return ""
    value = f"{chosen:.3g}" if isinstance(chosen, float) else str(chosen)
    return f"{option} {value} (best of {max(1, len(entry.selection))}), "


def _roster(
    dataset: Dataset, config: Mapping[str, Any], arguments: argparse.Namespace, folder: Path
) -> dict[str, Callable[[], Any]]:
    """Name -> a function that fits it: classical densities first, then VAEs."""
    from pvae import baselines

    rows, width = dataset.train.x.shape

    def sizes(*candidates: int, below: int) -> list[int]:
        return [size for size in candidates if size < below] or [1]

    def mixture(covariance: str, *candidates: int) -> Callable[[], Any]:
        """The best number of components and floor of the variances, by the validation split."""
        tried = [
            baselines.GaussianMixture(
                sizes(*candidates, below=rows // 2),
                covariance_type=covariance,
                reg_covar=floor,
                seed=arguments.seed,
            )
            for floor in (1e-6, 1e-4, 1e-3)
        ]
        return lambda: max(
            (classical(density)() for density in tried),
            key=lambda fitted: max(fitted.selection.values(), default=0.0),
        )

    def classical(density: Any) -> Callable[[], Any]:
        return lambda: density.fit(dataset.train.x, dataset.valid.x)

    def vae(name: str, objective: str, **options: Any) -> Callable[[], Any]:
        return lambda: _fit_vae(
            dataset, config, arguments, folder / name, objective=objective, options=options
        )

    seed = arguments.seed
    networks = {
        "VAE, ELBO": vae("vae-elbo", "vae"),
        "VAE, IWAE-5 DReG": vae("vae-dreg", "dreg", num_particles=5),
    }
    if dataset.kind == "binary":
        bernoulli = baselines.BernoulliMixture(sizes(10, 20, 50, 100, below=rows), seed=seed)
        return {
            "Bernoulli mixture": classical(bernoulli),
            "VAE, ELBO": networks["VAE, ELBO"],
            "VAE, IWAE-5": vae("vae-iwae", "iwae", num_particles=5),
            "VAE, IWAE-5 DReG": networks["VAE, IWAE-5 DReG"],
        }
    factors = sizes(2, 5, 10, 20, 30, 40, below=width)
    found = {
        "Gaussian mixture, diagonal": mixture("diag", 1, 5, 10, 20, 40, 80, 120),
        "Gaussian mixture, full": mixture("full", 1, 2, 5, 10, 20),
        "factor analysis": classical(baselines.FactorAnalysis(factors, seed=seed)),
        "PPCA": classical(baselines.PPCA(factors)),
        "kernel density": classical(baselines.KernelDensity()),
    }
    if rows * width > _LARGE:
        for name in ("Gaussian mixture, full", "kernel density"):
            found.pop(name)
            _say(f"{name} is left out: too slow for {rows} x {width} numbers")
    return found | networks


_LARGE = 4_000_000  # numbers of training data


def _fit_vae(
    dataset: Dataset,
    config: Mapping[str, Any],
    arguments: argparse.Namespace,
    folder: Path,
    *,
    objective: str,
    options: Mapping[str, Any],
) -> Run:
    """A VAE with the defaults of ``pvae train``, as a run folder of its own."""
    chosen = {"model": "vae", "objective": objective, "objective_options": dict(options)}
    network = {"activation": "silu"}
    likelihood = {"likelihood": _LIKELIHOODS[dataset.kind]}
    full = {**runs.DEFAULTS, **config, **chosen, "epochs": arguments.epochs, "seed": arguments.seed}
    full |= {"model_options": network | likelihood, "guide_options": network}
    return _fit(full, _Given(full), dataset, folder, progress=sys.stderr.isatty())


def _score(entries: Mapping[str, Entry], dataset: Dataset, arguments: argparse.Namespace) -> Board:
    from pvae.comparison import compare

    with _progress(f"scoring {len(dataset.test)} test data") as progress:
        return compare(
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

    board.save(folder)
    fitted = {row.name: entries[row.name][0] for row in board.rows}
    networks = {name: entry for name, entry in fitted.items() if _is_run(entry)}
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


# --- list ----------------------------------------------------------------------------------------


def _list(argv: Sequence[str], parser: _Parser) -> None:
    _parse(parser, argv)
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


# --- words and errors ----------------------------------------------------------------------------


def _say(text: str) -> None:
    print(text, flush=True)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A line redrawn on a terminal; elsewhere the title alone."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        _note(title)
        yield lambda done, total: None
        return
    with console.status(title) as status:
        yield lambda done, total: status.update(f"{title}: {done}/{total}")


_COMMANDS: dict[str, tuple[Callable[..., None], Callable[[_Parser], None], str]] = {
    "train": (_train, _fill_train, "train a model and a guide on data"),
    "evaluate": (_evaluate, _fill_evaluate, "estimate the held-out log evidence of a run"),
    "compare": (_compare, _fill_compare, "set VAEs and classical densities side by side"),
    "sample": (_sample, _fill_sample, "draw data from a trained model"),
    "list": (_list, _fill_list, "name the models, guides, objectives, data sets and baselines"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: Its words, without the program's name; those of the process if ``None``.

    Returns:
        The exit code: 0, or that of the error (2 usage and programs, 65 data, 66 run folders, 70
        numbers, 74 files, 130 interrupted).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    with warnings.catch_warnings(), _terminable():
        _one_line_warnings()
        try:
            _dispatch(words)
            sys.stdout.flush()
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 0
        except KeyboardInterrupt:
            return _fail("interrupted", 130)
        except BrokenPipeError:
            # What is still buffered must not be written at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except Exception as error:
            if debug:
                traceback.print_exc()
            return _fail(*_explain(error))
    return 0


def _dispatch(words: Sequence[str]) -> None:
    parser, commands = _build_parser()
    if not words or words[0].startswith("-"):
        _parse(parser, words or ["--help"])
        raise OptionError(f"a COMMAND is missing: one of {', '.join(commands)}")
    name = words[0]
    if name not in commands:
        raise OptionError(f"no command is called {name!r}: {did_you_mean(name, commands)}")
    _COMMANDS[name][0](words[1:], commands[name])


def _explain(error: Exception) -> tuple[str, int]:
    """One line about an error, and the exit code."""
    hint = "--debug shows the traceback"
    blamed = catalogue.blame(error)
    if blamed is not None:
        place, _, reason = blamed.partition(": ")
        known = isinstance(error, PvaeError)
        if known and place in str(error):
            return f"{error} ({hint})", 2
        if known and reason in str(error):
            return f"{error} ({place}; {hint})", 2
        return (f"{error} ({blamed}; {hint})" if known else f"{blamed} ({hint})"), 2
    if isinstance(error, PvaeError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        about = f"{error.filename}: " if error.filename else ""
        return f"{about}{error.strerror or error}", 74
    return f"{type(error).__name__}: {error} ({hint})", 70


def _fail(message: str, code: int) -> int:
    _note(f"pvae: error: {' '.join(message.split())}" if code != 130 else f"pvae: {message}")
    return code


def _one_line_warnings() -> None:
    warnings.simplefilter("ignore")
    warnings.simplefilter("default", UserWarning)

    def show(message: Any, *_: Any, **__: Any) -> None:
        _note(f"pvae: warning: {' '.join(str(message).split())}")

    warnings.showwarning = show


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the command as an interrupt does: what was half-written is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
