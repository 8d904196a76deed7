"""``pvae train --game``: an adversarial game instead of a bound, into an ordinary run folder.

A game is a function of a model (and a guide) that returns a :class:`pvae.adversarial.Game`: one of
:mod:`pvae.games` by its name, or one in the user's own file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae import __version__, catalogue, runs
from pvae.commands.preparing import load_data, threads
from pvae.commands.programs import Programs, choose_likelihood
from pvae.commands.saying import say
from pvae.commands.train import refuse_changes, restored, resumable
from pvae.errors import DataError, OptionError, ProgramError
from pvae.launchers import launched

if TYPE_CHECKING:
    from torch import Tensor

    from pvae.adversarial import Contest, Game
    from pvae.data import Dataset

__all__ = ["OF_BOUNDS", "check", "resume", "train"]

# Options of a training by a bound, of which a game has nothing or its own.
OF_BOUNDS = (
    "objective", "optimizer", "lr", "lr_schedule", "clip_norm", "alternate", "patience", "parts",
    "engine", "precision", "on_nan", "labels", "bucket_by",
)  # fmt: skip


def check(config: Mapping[str, Any], given: Collection[str]) -> None:
    """Refuse what cannot go with a game, before anything is read.

    Args:
        config: A resolved configuration with a game.
        given: The options that are on the command line.

    Raises:
        OptionError: An option is for trainings by a bound.
    """
    for name in OF_BOUNDS:
        if name in given or config[name] != runs.DEFAULTS[name]:
            own = "; its players' rate is --game.lr" if name == "lr" else ""
            raise OptionError(
                f"--{name.replace('_', '-')} is for a training by a bound, and --game "
                f"{config['game']} has losses and optimisers of its own: leave it out{own}"
            )
    place = launched()
    if place is not None:
        raise OptionError(
            f"--game is the work of one process, and this is one of {place.size}: start it without "
            "torchrun or srun"
        )


def train(config: dict[str, Any], programs: Programs, run_dir: str | None) -> None:
    """``pvae train --game``: one run folder.

    Args:
        config: Every key of :data:`pvae.runs.DEFAULTS`, with the options that were given.
        programs: The model, the guide and the game that ``config`` names.
        run_dir: The folder to write; the next free one in ``runs`` if ``None``.
    """
    assert programs.game is not None
    data = Path(str(config["data"])).stem
    name = f"{programs.model.name}-{programs.game.name}-{data}".replace("_", "-")
    final = Path(run_dir) if run_dir else runs.next_folder(name)
    with runs.begin(final), resumable(final):
        dataset = _data(config)
        say(dataset.description())
        chosen = choose_likelihood(config, programs, dataset)
        if chosen is not None:
            say(f"likelihood {chosen}, for {dataset.kind} data (--model.likelihood changes it)")
        with threads(dataset):
            _play(config, programs, dataset, final)


def resume(config: dict[str, Any], programs: Programs, folder: Path) -> None:
    """``pvae train --resume`` of a run with a game.

    Args:
        config: That of the run, with the options that were given.
        programs: The model, the guide and the game that ``config`` names.
        folder: The run.

    Raises:
        RunError: It was started under another configuration, or another process is at work in it.
    """
    from pvae.locks import locked

    with locked(folder), resumable(folder):
        before = runs.read_config(folder)
        dataset = load_data(config)
        refuse_changes(config, before, folder)
        say(dataset.description())
        done = len(runs.history(folder, torn=True))
        with threads(dataset):
            contest = _play(config, programs, dataset, folder, before=before)
    if len(contest.history) == done:
        say(f"{folder} was finished already: a larger --epochs goes on with it")


# --- data ----------------------------------------------------------------------------------------


def _data(config: dict[str, Any]) -> Dataset:
    """The data set; images of whole levels become grey values where nothing else was asked for."""
    dataset = load_data(config)
    if dataset.padding is not None or dataset.vocabulary is not None:
        raise DataError(
            f"{dataset.name} is text or padded sequences, whose samples no gradient reaches: give "
            "images to --game, or leave --game out"
        )
    untold = config["binarize"] is None and config["transform"] is None
    if untold and dataset.kind == "continuous" and _is_grey(dataset):
        config["binarize"] = "dynamic"
        dataset = load_data(config)
    return dataset


def _is_grey(dataset: Dataset) -> bool:
    return dataset.image_shape is not None and dataset.num_levels is not None


def _training_data(game: Game, name: str, model: Any, dataset: Dataset) -> tuple[Tensor, Any]:
    """Rows, and what is done to each batch of them."""
    rows = dataset.train_raw
    if runs.batch_for(model, rows, dataset.train.labels) is not rows:
        raise ProgramError(
            f"{type(model).__name__} takes labels, and games are about data alone: take a model of "
            "x, such as conv or vae"
        )
    if not game.on_means:
        return rows, dataset.preprocess
    if dataset.kind == "integer":
        raise DataError(
            f"{name} sets data beside means in [0, 1], and {dataset.name} has whole numbers up to "
            f"{(dataset.num_levels or 2) - 1}: leave --transform out"
        )
    return rows, None if dataset.kind == "binary" else dataset.preprocess


def _shown(game: Game, dataset: Dataset) -> Tensor:
    """Data to look at, as the game sees them: grey training data, or else held-out ones."""
    return dataset.train_raw if game.on_means and dataset.kind == "binary" else dataset.valid.x


# --- playing -------------------------------------------------------------------------------------


def _play(
    config: dict[str, Any],
    programs: Programs,
    dataset: Dataset,
    folder: Path,
    *,
    before: Mapping[str, Any] | None = None,
) -> Contest:
    """Build, play and draw; what was chosen is added to ``config``."""
    from pvae.adversarial import play
    from pvae.checkpoints import save_tensors
    from pvae.watching import watchers

    assert programs.game is not None
    for component, offered in programs.offered.items():
        if offered is not None:
            config[f"{component}_options"] = offered.defaults() | config[f"{component}_options"]
    about = runs.facts(dataset)
    moments = runs.statistics(dataset) | runs.example_rows(dataset)
    model, guide = runs.pair(config, about | moments, folder=None if before is None else folder)
    game = _built(config, programs.game, model, guide, about)
    rows, preprocess = _training_data(game, programs.game.name, model, dataset)
    has_encoder = "guide" in catalogue.option_names(programs.game.factory)
    shown = _shown(game, dataset)
    trackers = watchers(config, model, dataset, folder, rows=shown, reconstruct=has_encoder)
    if before is None and programs.takes(*moments):
        save_tensors(folder / "checkpoints" / "data", moments, {})
    count = sum(p.numel() for player in game.players for p in player.parameters)
    kept = {key: config[key] for key in runs.DEFAULTS}
    full = {"pvae": __version__, **kept, "num_parameters": count, "data_facts": about}
    with restored(folder):
        runs.write_config(folder, full, sources=before is None)
        contest = play(
            game, rows, preprocess=preprocess, run_dir=folder, resume=before is not None,
            epochs=config["epochs"], batch_size=config["batch_size"], seed=config["seed"],
            device=config["device"], checkpoint_every=config["checkpoint_every"],
            keep_checkpoints=config["keep_checkpoints"], trackers=trackers,
        )  # fmt: skip
    say(_in_words(contest, game, count))
    _draw(contest, game, dataset, shown, folder, name=config["model"], reconstruct=has_encoder)
    say(f"wrote {folder}; next: pvae sample {folder}")
    return contest


def _built(
    config: Mapping[str, Any],
    program: catalogue.Program,
    model: Any,
    guide: Any,
    about: Mapping[str, Any],
) -> Game:
    """The game, whose networks depend on the seed alone."""
    import torch

    from pvae.adversarial import Game
    from pvae.seeds import mix

    shape = about["image_shape"]
    known = {
        "model": model, "guide": guide, "x_dim": about["x_dim"],
        "image_shape": None if shape is None else tuple(shape),
    }  # fmt: skip
    wanted = catalogue.option_names(program.factory)
    filled = {name: value for name, value in known.items() if name in wanted}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(config["seed"], 2))
        game = program.factory(**filled, **config["game_options"])
    if not isinstance(game, Game):
        raise ProgramError(
            f"{program.name} returns a {type(game).__name__}, not a pvae.adversarial.Game: let it "
            "return one"
        )
    # What a run folder holds is the whole pair, whether or not both were at play.
    return dataclasses.replace(game, modules={**game.modules, "model": model, "guide": guide})


def _in_words(contest: Contest, game: Game, count: int) -> str:
    last = contest.history[-1]
    losses = ", ".join(f"{p.name} {last[p.name]:.3g}" for p in game.players)
    accuracy = ""
    if "accuracy" in last:
        accuracy = f"; the discriminator is right {last['accuracy']:.0%} of the time"
    collapsed = "; ".join(contest.collapsed) or "no side gave up"
    return (
        f"{len(contest.history)} epochs, {count} parameters, {contest.seconds:.1f} s\n"
        f"losses {losses}{accuracy}\n{collapsed}"
    )


def _draw(
    contest: Contest,
    game: Game,
    dataset: Dataset,
    rows: Tensor,
    folder: Path,
    *,
    name: str,
    reconstruct: bool,
) -> None:
    """Losses by epoch, samples beside data, reconstructions."""
    from pvae import plots

    back, shape = dataset.transform.inverse, dataset.image_shape
    data = rows[:64]

    def made(guide: Any) -> Tensor:
        draws, means, _ = runs.generate(contest.model, data, guide=guide)
        return back(draws if means is None else means)

    figures = folder / "figures"
    players = [player.name for player in game.players]
    runs.save_figure(
        lambda: plots.game_curves(contest.history, players), figures / "training_curves.png"
    )
    runs.save_figure(
        lambda: plots.samples_beside_data({f"{name}: samples": made(None)}, back(data), shape),
        figures / "samples.png",
    )
    if reconstruct:
        runs.save_figure(
            lambda: plots.reconstructions(back(data), {name: made(contest.guide)}, shape),
            figures / "reconstructions.png",
        )
