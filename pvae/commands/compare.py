"""``pvae compare``: a board of given runs, or of the default roster, on one data set."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae import roster, runs
from pvae.commands.preparing import grouped, load_data, threads
from pvae.commands.programs import Programs, choose_likelihood, need_encoder
from pvae.commands.saying import say, watched
from pvae.commands.train import train_into
from pvae.errors import OptionError, RunError
from pvae.launchers import leads

if TYPE_CHECKING:
    from pvae.comparison import Board
    from pvae.data import Dataset
    from pvae.roster import Entry
    from pvae.training import Run

__all__ = ["compare"]


def compare(arguments: argparse.Namespace) -> None:
    """``pvae compare``: the board of given runs, or of the default roster."""
    if arguments.num_particles < 1:
        raise OptionError(f"--num-particles must be at least 1, got {arguments.num_particles}")
    for option in ("epochs", "binarize", "transform"):
        if arguments.runs and getattr(arguments, option) is not None:
            raise OptionError(
                f"--{option} is for the roster, and runs were given, which are trained: "
                "leave one out"
            )
    if arguments.epochs is None:
        arguments.epochs = 100
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
    with grouped({"device": "cpu"}) as group, contextlib.ExitStack() as stack:
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
        return train_into(config, programs, dataset, folder, progress=sys.stderr.isatty())

    return roster.fit(dataset, config, folder, train_vae)


def _score(entries: Mapping[str, Entry], dataset: Dataset, arguments: argparse.Namespace) -> Board:
    from pvae import comparison

    with watched(f"scoring {len(dataset.test)} test data") as progress:
        return comparison.compare(
            {name: entry for name, (entry, _) in entries.items()},
            dataset,
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
