"""The command line: ``pvae train | evaluate | compare | …``, one function a command.

It reads words, options and configuration files; :mod:`pvae.commands` does the work. A mistake of
the user's is one line on standard error and an exit code that is not zero.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from pvae import __version__, catalogue, runs
from pvae.allocation import keep_large_blocks
from pvae.commands import (
    board,
    compare,
    diagnose,
    doctor,
    evaluate,
    games,
    latents,
    listing,
    sample,
    sweep,
    train,
)
from pvae.commands.programs import Programs
from pvae.errors import OptionError, PvaeError, did_you_mean, first_line
from pvae.launchers import launched

__all__ = ["main"]

_COMPONENTS = ("model", "guide", "objective", "game")
_KEPT = ("pvae", "data_facts", "num_parameters")  # in a run's config.yaml, but no options


# --- the parser ----------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are errors like any other."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(_in_own_words(self.prog, message.removeprefix("argument ")))


def _in_own_words(command: str, message: str) -> str:
    """What argparse found wrong, with the way out."""
    missing = re.fullmatch(r"the following arguments are required: (.*)", message)
    if missing:
        return f"{command} needs {missing[1]}: see {command} --help"
    unknown = re.fullmatch(r"unrecognized arguments: (.*)", message)
    if unknown:
        return f"{command} cannot take {unknown[1]!r} beside the rest: see {command} --help"
    empty = re.fullmatch(r"(.*): expected one argument", message)
    if empty:
        return f"{empty[1]} needs a value: see {command} --help"
    choice = re.fullmatch(r"(.*): invalid choice: '(.*)' \(choose from (.*)\)", message)
    if choice:
        known = re.findall(r"[\w-]+", choice[3])
        return f"{choice[1]} cannot be {choice[2]!r}: {did_you_mean(choice[2], known)}"
    return message


def _whole(text: str) -> int:
    """A whole number; ``1e3`` is one."""
    with contextlib.suppress(ValueError, OverflowError):
        number = float(text)
        if number.is_integer():
            whole = int(text) if text.lstrip("+-").isdigit() else int(number)
            if abs(whole) < 2**63:
                return whole
            raise argparse.ArgumentTypeError(f"expected a number below 2^63, got {text!r}")
    raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")


def _seed(text: str) -> int:
    """What every generator takes, scikit-learn's too."""
    seed = _whole(text)
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 2^32 - 1, got {text!r}")
    return seed


def _real(text: str) -> float:
    with contextlib.suppress(ValueError):
        return float(text)
    raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")


def _turns(text: str) -> int | str:
    if text == "until-flat":
        return text
    with contextlib.suppress(argparse.ArgumentTypeError):
        return _whole(text)
    raise argparse.ArgumentTypeError(f"expected a whole number or until-flat, got {text!r}")


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
    subparsers = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)
    made = {}
    for name, (_, fill, summary) in _COMMANDS.items():
        made[name] = subparsers.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            argument_default=argparse.SUPPRESS if name in ("train", "sweep") else None,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        fill(made[name])
    return parser, made


def _fill_train(parser: _Parser) -> None:
    default = runs.DEFAULTS
    parser.epilog = (
        "The arguments of MODEL, of the guide, the objective and the game are options too:\n"
        "  pvae train vae --model.z_dim 8 --model.hidden '[64, 64]' --guide.covariance full\n"
        "  pvae train vae --objective dreg --objective.num_particles 20\n"
        "  pvae train conv --data mnist --game vae_gan --game.margin 0.3 --epochs 6\n"
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
    option("objective", str, "O", "what is maximised: vae, beta_vae, iwae, dreg, stl, rws, …")
    option(
        "game",
        _or_none(str),
        "GAME",
        "play adversaries instead: gan, vae_gan, adversarial_autoencoder, avb, ./file.py:function",
    )
    option("labels", _or_none(_whole), "N", "how many labels of training data are known; all")
    option(
        "data",
        str,
        "D",
        "a name from `pvae list`, a .npy, .npz, .csv or .txt file, or a folder of images",
    )
    option("binarize", _or_none(str), "HOW", "dynamic, fixed or threshold: grey values to bits")
    option("transform", str, "T", "none, dequantize, logit, standardize; chosen by the data")
    for name, text in (
        ("size", "pixels, or HEIGHTxWIDTH, to which a folder's images are resized"),
        ("unreadable", "stop at a file that is no image, or skip it (default stop)"),
    ):
        names = (f"--data-{name}", f"--data.{name}")
        parser.add_argument(*names, dest=f"data_{name}", type=str, metavar="S", help=text)
    option("epochs", _whole, "N", "passes over the training data")
    option("batch-size", _whole, "N", "data per step")
    option("bucket-by", _or_none(str), "HOW", "length: a batch's sentences are about as long")
    option("optimizer", str, "NAME", "one of torch.optim, in small letters")
    option("lr", _real, "RATE", "learning rate")
    option("lr-schedule", str, "NAME", "constant, cosine or linear")
    option("clip-norm", _or_none(_real), "NORM", "largest norm of the gradient")
    option(
        "alternate",
        _or_none(_turns),
        "N",
        "N steps of the guide alone, or until-flat, before each of the model alone",
    )
    option(
        "patience", _or_none(_whole), "N", "stop after N epochs without a better validation bound"
    )
    option("parts", _or_none(_whole), "P", "parts of a batch; one for each process if left out")
    option("seed", _seed, "N", "of parameters, order and noise; the split is fixed")
    option("device", str, "DEVICE", "auto, cpu, cuda, …")
    option("engine", str, "ENGINE", "auto, eager, staged, compiled or cudagraph: how a step is run")
    option("precision", str, "P", "full, or bfloat16 for linear and convolution layers")
    option("on-nan", str, "HOW", "stop, skip or rollback, where a loss is not finite")
    option("checkpoint-every", _or_none(str), "TIME", "'100 steps', '1 epoch', '5 minutes' or none")
    option("keep-checkpoints", _whole, "N", "the newest ones that stay, beside the best")
    option("track", _or_none(str), "WHERE", "tensorboard: curves, and pictures, while it trains")
    option("pictures", _or_none(_whole), "N", "samples and reconstructions every N epochs")
    option("resume", str, "RUN", "go on with a run, as if it had never stopped")
    option("run-dir", str, "FOLDER", "where to write; runs/<model>-<data>-<n> if left out")
    option("config", str, "FILE", "a YAML file with any of these options; the command line wins")


def _fill_sweep(parser: _Parser) -> None:
    _fill_train(parser)
    parser._option_string_actions["--resume"].help = argparse.SUPPRESS  # refused with a hint
    parser.epilog = (
        "What may vary, each as --search NAME=SPACE; every other option of train stays fixed:\n"
        "  --search lr=log:1e-4..1e-2 --search 'optimizer=adam|adamax'\n"
        "  --search model.z_dim=2..32 --search both.hidden=layers:1..3x32..256\n"
        "  --search 'both.activation=silu|tanh|relu' --search 'guide=gaussian|flow'\n"
        "The same command on the same --run-dir goes on with a sweep that was stopped."
    )

    def option(
        name: str, kind: Callable[[str], Any], metavar: str, default: Any, text: str
    ) -> None:
        parser.add_argument(f"--{name}", type=kind, metavar=metavar, default=default, help=text)

    parser.add_argument(
        "--search", action="append", metavar="NAME=SPACE", default=[], help="what may vary"
    )
    option("trials", _whole, "N", 30, "configurations to try (30)")
    option("jobs", _whole, "N", None, "trials at a time (one for each core)")
    option("confirm", _whole, "N", 3, "seeds from which the best is trained again (3)")
    option("storage", str, "URL", None, "a database for workers on many machines")
    option("run-worker", str, "FOLDER", None, argparse.SUPPRESS)


def _fill_evaluate(parser: _Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="a folder that pvae train wrote")
    parser.add_argument(
        "--num-particles",
        type=_whole,
        metavar="K",
        help="draws per datum (5000, of which auto takes 1000; 2 where the guide is the exact "
        "posterior)",
    )
    parser.add_argument(
        "--split", choices=("test", "valid", "train"), default="test", help="which data (test)"
    )
    parser.add_argument("--data", metavar="D", help="other data, split as those of the run were")
    parser.add_argument("--seed", type=_seed, metavar="N", default=0, help="of the draws (0)")

    parser.add_argument(
        "--method",
        choices=("importance", "annealed", "smc", "auto"),
        default="importance",
        help="the estimator; auto takes a stronger one where a datum needs it (importance)",
    )
    parser.add_argument(
        "--tolerance", type=_real, metavar="NATS", help="auto: largest error of a datum (0.1)"
    )
    parser.add_argument(
        "--budget",
        type=_real,
        metavar="N",
        help="auto: evaluations of the log joint per datum, on average (20000)",
    )
    parser.add_argument(
        "--num-temperatures", type=_whole, metavar="T", help="annealed and smc (1000)"
    )


def _fill_diagnose(parser: _Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="a folder that pvae train wrote")
    parser.add_argument(
        "--num-data", type=_whole, metavar="N", default=1000, help="test data, the first N (1000)"
    )
    parser.add_argument(
        "--num-particles", type=_whole, metavar="K", default=1000, help="draws per datum (1000)"
    )
    parser.add_argument(
        "--num-runs", type=_whole, metavar="N", default=2000, help="simulated data (2000)"
    )
    parser.add_argument("--seed", type=_seed, metavar="N", default=0, help="of the draws (0)")


def _fill_doctor(parser: _Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="a folder that pvae train wrote")
    parser.add_argument("--seed", type=_seed, metavar="N", default=0, help="of the draws (0)")


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
        "--epochs", type=_whole, metavar="N", default=None, help="of each VAE it fits (100)"
    )
    parser.add_argument("--seed", type=_seed, metavar="N", default=0, help="of fits and draws (0)")


def _fill_board(parser: _Parser) -> None:
    parser.epilog = (
        "Without BOARD, says what the boards hold. Every cell (data set x entry x seed) is kept\n"
        "by its configuration: the same command again computes only what is missing, and a\n"
        "killed one loses only the cells in flight."
    )
    parser.add_argument("board", nargs="?", metavar="BOARD", help="binary or continuous")
    parser.add_argument("--data", type=_names, metavar="D,…", help="only these data sets")
    parser.add_argument("--cells", type=_names, metavar="C,…", help="only these entries")
    parser.add_argument(
        "--schedule", metavar="S", default="quick", help="smoke, quick or reduced (quick)"
    )
    parser.add_argument("--seeds", type=_whole, metavar="N", default=1, help="of each entry (1)")
    parser.add_argument(
        "--precision", metavar="P", default="full", help="VAEs train in: full or bfloat16 (full)"
    )
    parser.add_argument(
        "--jobs", type=_whole, metavar="N", help="cells at a time (one for each core)"
    )
    parser.add_argument("--out", metavar="FOLDER", help="where to write (boards/BOARD-SCHEDULE)")
    parser.add_argument("--run-cell", metavar="FOLDER", help=argparse.SUPPRESS)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"expected names with commas between them, got {text!r}")
    return names


def _fill_sample(parser: _Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="a folder that pvae train wrote")
    parser.add_argument("--size", type=_whole, metavar="N", default=64, help="how many (64)")
    parser.add_argument(
        "--out", metavar="FILE", help=".npy or .png, or .txt of text (RUN/samples.npy)"
    )
    parser.add_argument("--seed", type=_seed, metavar="N", default=0, help="of the draws (0)")


def _fill_use(parser: _Parser, out: str) -> None:
    """What every command that uses a trained run takes."""
    parser.add_argument("run", metavar="RUN", help="a folder that pvae train wrote")
    parser.add_argument("--data", metavar="D", help="other data, split as those of the run were")
    parser.add_argument("--out", metavar="FILE", help=out)
    parser.add_argument("--seed", type=_seed, metavar="N", default=0, help="of the draws (0)")


def _fill_encode(parser: _Parser) -> None:
    _fill_use(parser, ".npz (RUN/latents-SPLIT.npz)")
    parser.add_argument(
        "--split", choices=("test", "valid", "train"), default="test", help="which data (test)"
    )
    parser.add_argument(
        "--num-draws", type=_whole, metavar="S", default=0, help="draws per datum to keep too (0)"
    )


def _fill_reconstruct(parser: _Parser) -> None:
    _fill_use(parser, ".png or .npy (RUN/figures/reconstructions_of_test.png)")
    parser.add_argument("--size", type=_whole, metavar="N", default=48, help="test data (48)")
    parser.add_argument(
        "--num-draws",
        type=_whole,
        metavar="S",
        help="average over so many draws of the guide instead of decoding its mean",
    )


def _fill_interpolate(parser: _Parser) -> None:
    _fill_use(parser, ".png or .npy (RUN/figures/interpolations.png)")
    parser.add_argument("--size", type=_whole, metavar="N", default=8, help="paths (8)")
    parser.add_argument("--steps", type=_whole, metavar="T", default=9, help="of a path (9)")
    parser.add_argument("--path", metavar="P", default="linear", help="linear or spherical")


def _fill_traverse(parser: _Parser) -> None:
    _fill_use(parser, ".png or .npy (RUN/figures/traversals.png)")
    parser.add_argument(
        "--datum", type=_whole, metavar="N", default=0, help="number of the test datum (0)"
    )
    parser.add_argument("--steps", type=_whole, metavar="T", default=9, help="quantiles (9)")
    parser.add_argument(
        "--extent", type=_real, metavar="P", default=0.95, help="share of the prior covered (0.95)"
    )
    parser.add_argument("--site", metavar="SITE", help="only this latent site")


def _fill_ood(parser: _Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="a folder that pvae train wrote")
    parser.add_argument(
        "--data", metavar="A", help="data from inside; those of the run (test split)"
    )
    parser.add_argument(
        "--against", metavar="B", required=True, help="data from elsewhere, likewise"
    )
    parser.add_argument(
        "--scores",
        type=_names,
        metavar="S,…",
        default=["evidence", "typicality"],
        help="evidence, typicality and regret (the first two)",
    )
    parser.add_argument(
        "--num-data", type=_whole, metavar="N", default=1000, help="of each, the first N (1000)"
    )
    parser.add_argument(
        "--num-particles", type=_whole, metavar="K", default=100, help="draws per datum (100)"
    )
    parser.add_argument("--seed", type=_seed, metavar="N", default=0, help="of the draws (0)")


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
        if component == "data" or not (token.startswith("--") and dot and "/" not in component):
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


# --- the configuration of train ------------------------------------------------------------------


def _train(argv: Sequence[str], parser: _Parser) -> None:
    given, rest = _split_components(argv)
    if {"-h", "--help"} & set(rest):
        _help_train(parser, [token for token in rest if token not in ("-h", "--help")])
        return
    arguments = vars(_parse(parser, rest))
    run_dir = arguments.pop("run_dir", None)
    if "resume" in arguments:
        if run_dir is not None:
            raise OptionError("--resume names the run folder: leave --run-dir out")
        folder = Path(arguments.pop("resume"))
        config, programs = _resolve(parser, arguments, given, folder)
        config.pop("run_dir", None)
        work = train.resume if programs.game is None else games.resume
        work(config, programs, folder)
        return
    config, programs = _resolve(parser, arguments, given)
    in_file = config.pop("run_dir", None)
    begin = train.train if programs.game is None else games.train
    begin(config, programs, run_dir or in_file)


def _sweep(argv: Sequence[str], parser: _Parser) -> None:
    given, rest = _split_components(argv)
    if {"-h", "--help"} & set(rest):
        _help_train(parser, [token for token in rest if token not in ("-h", "--help")])
        return
    arguments = vars(_parse(parser, rest))
    own = ("search", "trials", "jobs", "confirm", "storage", "run_worker")
    asked = argparse.Namespace(**{name: arguments.pop(name) for name in own})
    if asked.run_worker is not None:
        sweep.run_worker(Path(asked.run_worker))
        return
    if "resume" in arguments:
        raise OptionError(
            "a sweep goes on by the same command with the same --run-dir: leave --resume out"
        )
    asked.run_dir = arguments.pop("run_dir", None)
    config, _ = _resolve(parser, arguments, given)
    config.pop("run_dir", None)
    sweep.sweep(config, asked)


def _resolve(
    parser: _Parser,
    arguments: dict[str, Any],
    given: Mapping[str, Mapping[str, str]],
    folder: Path | None = None,
) -> tuple[dict[str, Any], Programs]:
    """Defaults, then the run that is resumed, then the config file, then the command line."""
    file = arguments.pop("config", None)
    found = _read_config_file(parser, Path(file)) if file is not None else {}
    base = dict(runs.DEFAULTS) if folder is None else runs.read_config(folder)
    model = {**base, **found, **arguments}["model"]
    if not model:
        known = ", ".join(catalogue.listing("model"))
        raise OptionError(f"train needs a MODEL: one of {known}, or ./file.py:Class")
    if folder is None:
        found = {**_suited(model, {**found, **arguments}), **found}
    config = {**base, **found, **arguments}
    programs = Programs(config, folder)
    for component in _COMPONENTS:
        key = f"{component}_options"
        origin = f"{Path(file).name}: {key}: " if file is not None else ""
        options = programs.read(component, found.get(key, {}), origin=origin)
        if folder is not None and _same(config, base, component):
            options = programs.read(component, base[key], origin=f"{folder}: ") | options
        config[key] = options | programs.read(component, given[component])
        offered = programs.offered[component]
        if offered is not None:
            offered.missing(config[key])
    if programs.game is not None:
        games.check(config, [*arguments, *(["objective"] if given["objective"] else [])])
        config["game"] = programs.game.reference
    catalogue.build_objective(config["objective"], config["objective_options"])
    if config["track"] is not None or config["pictures"] is not None:
        from pvae import watching

        watching.check(config)
    config |= {"model": programs.model.reference, "guide": programs.guide.reference}
    return config, programs


def _same(config: Mapping[str, Any], base: Mapping[str, Any], component: str) -> bool:
    return bool(config[component] == base[component])


def _suited(model: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Options that the model's ``train_defaults`` name and the user left open."""
    suited = dict(getattr(catalogue.find("model", model).factory, "train_defaults", {}))
    if chosen.get("game") is not None:  # the derived guide is a program, not a distribution
        kept = ("guide", "guide_options", "transform")
        suited = {"guide": "gaussian", **{k: v for k, v in suited.items() if k in kept}}
    if chosen.get("binarize") is not None:
        suited.pop("transform", None)
    if "objective" in chosen:
        suited.pop("objective_options", None)
    return suited


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
    """The help page, with the options of model, guide, objective and game if a MODEL is named."""
    arguments = vars(_parse(parser, argv))
    if "model" in arguments:
        suited = _suited(arguments["model"], arguments)
        programs = Programs({**runs.DEFAULTS, **suited, **arguments})
        for component, offered in programs.offered.items():
            rows = offered.describe() if offered is not None else []
            if not rows or offered is None:
                continue
            group = parser.add_argument_group(f"{component} options ({offered.owner})")
            for option, text in rows:
                group.add_argument(option, metavar="…", help=text.replace("%", "%%"))
    parser.print_help()


# --- running and errors --------------------------------------------------------------------------


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parsed(command: Callable[[argparse.Namespace], None]) -> Callable[..., None]:
    return lambda argv, parser: command(_parse(parser, argv))


_COMMANDS: dict[str, tuple[Callable[..., None], Callable[[_Parser], None], str]] = {
    "train": (_train, _fill_train, "train a model and a guide on data"),
    "sweep": (_sweep, _fill_sweep, "search structure and training options"),
    "evaluate": (
        _parsed(evaluate.evaluate),
        _fill_evaluate,
        "estimate the held-out log evidence of a run",
    ),
    "diagnose": (
        _parsed(diagnose.diagnose),
        _fill_diagnose,
        "say where the bound is lost, what the latents carry and whether the guide is calibrated",
    ),
    "doctor": (
        _parsed(doctor.doctor),
        _fill_doctor,
        "say what went wrong in a training, and what to try",
    ),
    "compare": (
        _parsed(compare.compare),
        _fill_compare,
        "set VAEs and classical densities side by side",
    ),
    "board": (
        _parsed(board.board),
        _fill_board,
        "fit the public boards: many densities to many named data sets",
    ),
    "sample": (_parsed(sample.sample), _fill_sample, "draw data from a trained model"),
    "encode": (
        _parsed(latents.encode),
        _fill_encode,
        "write the latents that a trained guide finds in data",
    ),
    "reconstruct": (
        _parsed(latents.reconstruct),
        _fill_reconstruct,
        "show data beside what the model makes of their latents",
    ),
    "interpolate": (
        _parsed(latents.interpolate),
        _fill_interpolate,
        "show paths between data through latent space",
    ),
    "traverse": (
        _parsed(latents.traverse),
        _fill_traverse,
        "show what each latent dimension does to a datum",
    ),
    "ood": (
        _parsed(latents.out_of_distribution),
        _fill_ood,
        "score data from elsewhere against held-out data",
    ),
    "list": (
        _parsed(listing.list_names),
        _fill_list,
        "name the models, guides, objectives, data sets and baselines",
    ),
}


_SHARED = ("train", "evaluate", "compare")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: Its words, without the program's name; those of the process if ``None``.

    Returns:
        The exit code: 0, or that of the error (2 usage and programs, 65 data, 66 run folders, 70
        numbers, 74 files, 130 interrupted).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _printable()
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
    parser, made = _build_parser()
    if not words or words[0].startswith("-"):
        _parse(parser, words or ["--help"])
        raise OptionError(f"a COMMAND is missing: one of {', '.join(made)}")
    name = words[0]
    if name not in made:
        raise OptionError(f"no command is called {name!r}: {did_you_mean(name, made)}")
    keep_large_blocks()  # before the first of them
    place = launched()
    if place is None:
        _COMMANDS[name][0](words[1:], made[name])
        return
    if name not in _SHARED:
        raise OptionError(
            f"pvae {name} is the work of one process, and this is one of {place.size}: "
            f"{', '.join(_SHARED)} can be shared by torchrun or srun"
        )
    # torch would add a page of its own to the line that says which rank was lost
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with contextlib.ExitStack() as stack:
        if place.rank:
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            warnings.showwarning = lambda *_, **__: None
        _COMMANDS[name][0](words[1:], made[name])


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
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "allocate" in str(error)
    ):
        return f"the memory is too small: ask for fewer at a time ({first_line(error)}; {hint})", 70
    return f"{type(error).__name__}: {error} ({hint})", 70


def _fail(message: str, code: int) -> int:
    _note(f"pvae: error: {' '.join(message.split())}" if code != 130 else f"pvae: {message}")
    return code


def _printable() -> None:
    """Let what a terminal cannot show be a question mark, and what is closed take anything."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


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
