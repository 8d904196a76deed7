"""The public boards: which densities are fitted to which named data sets, and how.

A board is a list of cells (data set x entry x seed). A cell is known by the SHA-256 of its
configuration, a plain dict, so that nothing is ever computed twice::

    boards/binary-quick/
        cells/<sha256>/      result.json, tensors.safetensors: log p of every test datum
        cells/<sha256>.part/ a long cell that is not done yet
        board.csv, board.md, board.png

Nothing heavy is imported here: ``pvae board`` alone says what the boards hold.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pvae.errors import OptionError, did_you_mean

__all__ = ["BOARDS", "SCHEDULES", "Cell", "Task", "cells", "describe", "num_epochs", "rate_factor"]

_LARGE = 4_000_000  # numbers of training data, where fewer sizes of a density are tried
_SEEDLESS = ("kernel-density", "ppca")  # a fit of these is the same from every seed
_CLASSICAL = ("iterations", "sizes")  # what a schedule says of densities that are not trained
_VERSION = 1  # of what a configuration means: a change of it computes every cell anew


@dataclass(frozen=True)
class Task:
    """A named data set, prepared in one way.

    Attributes:
        data: Its name.
        binarize: As in :func:`pvae.data.load`.
        transform: Likewise.
        size: Numbers in the training data, roughly: the long cells are begun first.
    """

    data: str
    binarize: str | None = None
    transform: str | None = None
    size: int = 100_000


@dataclass(frozen=True)
class Cell:
    """One entry fitted to one data set from one seed.

    Attributes:
        task: The data set.
        entry: Short name of the entry, ``"vae-iwae-5"``.
        title: Its name in tables.
        config: All that the result depends on, as plain values.
    """

    task: Task
    entry: str
    title: str
    config: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of the configuration."""
        text = json.dumps(self.config, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def __str__(self) -> str:
        return f"{self.task.data} · {self.title} · seed {self.config['seed']}"


BOARDS: Mapping[str, Sequence[Task]] = {
    "binary": (
        Task("digits", binarize="fixed"),
        Task("mnist-static", size=39_200_000),
        Task("nltcs", size=300_000),
        Task("plants", size=1_200_000),
        Task("accidents", size=1_400_000),
        Task("mushrooms", size=200_000),
        Task("dna", size=300_000),
        Task("baudio", size=1_500_000),
    ),
    "continuous": (
        Task("digits", transform="dequantize"),
        Task("mnist", transform="dequantize", size=39_200_000),
    ),
}

# How a VAE is trained and scored. Either a number of steps, with the best epoch kept, or passes in
# segments: what a kill loses of such a cell is one segment. R1 is a ninth of the schedule of Burda
# et al. (2016): 3^i passes at 1e-3 * 10^(-i/7), i = 0 .. 5.
SCHEDULES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {
        "about": "a few steps of everything, to see that it runs",
        "steps": 20, "epochs": 3, "batch_size": 100, "lr": 2e-3, "z_dim": 2, "hidden": [16],
        "activation": "silu", "engine": "eager", "num_particles": 20, "iterations": 5,
        "sizes": [2, 5],
    },
    "quick": {
        "about": "minutes: 3000 steps a VAE, 100 particles",
        "steps": 3000, "epochs": 150, "batch_size": 100, "lr": 2e-3, "z_dim": 16,
        "hidden": [200, 200], "activation": "silu", "engine": "staged", "num_particles": 100,
        "iterations": 30, "sizes": [5, 10, 20, 50, 100, 500],
    },
    "reduced": {
        "about": "hours: 364 passes of a VAE, a ninth of the schedule of Burda et al. (2016), "
        "5000 particles",
        "passes": 364, "segment": 7, "batch_size": 100, "lr": 1e-3, "eps": 1e-4, "z_dim": 50,
        "hidden": [200, 200], "activation": "tanh", "engine": "compiled", "num_particles": 5000,
        "valid_particles": 500, "iterations": 30, "sizes": [5, 10, 20, 50, 100, 500],
    },
}  # fmt: skip


def rate_factor(passes: float) -> float:
    """``10^(-i/7)`` after some passes: stage i lasts 3^i passes (Burda et al. 2016)."""
    stage, end = 0, 1
    while passes >= end:
        stage += 1
        end += 3**stage
    return float(10 ** (-stage / 7))


# --- entries -------------------------------------------------------------------------------------

Entry = tuple[str, dict[str, Any]]  # title, and the part of a configuration that is its own


def _entries(board: str, task: Task, schedule: Mapping[str, Any]) -> dict[str, Entry]:
    """Short name -> entry, of the densities that are there and suit the data."""
    from pvae import baselines

    known = baselines.available()
    classical = _binary(task, schedule) if board == "binary" else _continuous(task, schedule)
    found = {name: entry for name, entry in classical.items() if entry[1]["baseline"] in known}
    return found | _networks(board, schedule)


def _density(title: str, baseline: str, **options: Sequence[Any]) -> Entry:
    """A classical density with every combination of some options, the best to be kept."""
    names = list(options)
    tried = [dict(zip(names, each, strict=True)) for each in itertools.product(*options.values())]
    return title, {"baseline": baseline, "candidates": tried}


def _binary(task: Task, schedule: Mapping[str, Any]) -> dict[str, Entry]:
    is_small = task.size < _LARGE
    return {
        "independent-bits": _density("independent bits", "bernoulli-mixture", n_components=[1]),
        "bernoulli-mixture": _density(
            "Bernoulli mixture", "bernoulli-mixture", n_components=schedule["sizes"],
            smoothing=[0.1, 1.0] if is_small else [1.0],
            max_iterations=[schedule["iterations"] * (4 if is_small else 1)],
        ),
    }  # fmt: skip


def _continuous(task: Task, schedule: Mapping[str, Any]) -> dict[str, Entry]:
    is_small = task.size < _LARGE
    sizes = [size for size in schedule["sizes"] if size <= (200 if is_small else 50)]
    few = [size for size in sizes if size <= 20]
    factors = [size for size in (2, 5, 10, 20, 30, 40) if size <= max(schedule["sizes"])]
    factors = factors if is_small else [max(factors)]
    floors = [1e-6, 1e-4, 1e-3] if is_small else [1e-6]
    steps = {} if is_small else {"max_iterations": [schedule["iterations"]]}
    found = {
        "gaussian-mixture": _density(
            "Gaussian mixture, diagonal", "gaussian-mixture",
            n_components=sizes if is_small else sizes[-1:], covariance_type=["diag"],
            reg_covar=floors,
        ),
        "student-t-mixture": _density(
            "Student t mixture, diagonal", "student-t-mixture",
            n_components=sizes if is_small else sizes[-1:], covariance_type=["diag"],
            reg_covar=floors, **steps,
        ),
        "mixture-of-factor-analysers": _density(
            "mixture of factor analysers", "mixture-of-factor-analysers",
            n_components=few if is_small else few[-1:], num_factors=[6] if is_small else [10],
            min_noise=[1e-5, 1e-4, 1e-3] if is_small else [1e-6], **steps,
        ),
        "factor-analysis": _density("factor analysis", "factor-analysis", n_components=factors),
        "ppca": _density("PPCA", "ppca", n_components=factors),
    }  # fmt: skip
    if is_small:
        found["gaussian-mixture-full"] = _density(
            "Gaussian mixture, full", "gaussian-mixture",
            n_components=few, covariance_type=["full"], reg_covar=floors, covariance_prior=[10.0],
        )  # fmt: skip
        found["kernel-density"] = _density("kernel density", "kernel-density")
    return found


def _networks(board: str, schedule: Mapping[str, Any]) -> dict[str, Entry]:
    def vae(
        title: str,
        objective: str,
        particles: int | None = None,
        programs: Mapping[str, str] | None = None,
        **model: Any,
    ) -> Entry:
        options = {} if particles is None else {"num_particles": particles}
        return title, {
            "objective": objective,
            "objective_options": options,
            "model_options": model,
            "likelihood": "bernoulli" if board == "binary" else "gaussian",
            **(programs or {}),
        }

    if "passes" in schedule:
        layers = {"model": "two_layer", "guide": "bottom_up"}
        vamp: dict[str, Any] = {"prior": "vamp", "prior_components": 500}
        return {
            "vae-elbo": vae("VAE, ELBO", "vae"),
            "vae-iwae-5": vae("VAE, IWAE-5", "iwae", 5),
            "vae-iwae-50": vae("VAE, IWAE-50", "iwae", 50),
            "vae-dreg-5": vae("VAE, IWAE-5 DReG", "dreg", 5),
            "vae-dreg-50": vae("VAE, IWAE-50 DReG", "dreg", 50),
            "vae-resampled-50": vae("VAE, IWAE-50 resampled", "resampled_iwae", 50),
            "vae-flow": vae("VAE, flow posterior", "vae", programs={"guide": "flow"}),
            "vae-vamp": vae("VAE, VampPrior", "vae", programs={"guide": "shared"}, **vamp),
            "two-layer": vae("two layers, ELBO", "vae", programs=layers),
            "two-layer-iwae-50": vae("two layers, IWAE-50", "iwae", 50, programs=layers),
        }
    found = {
        "vae-elbo": vae("VAE, ELBO", "vae"),
        "vae-mixture-prior": vae(
            "VAE, mixture prior, ELBO", "vae", prior="mixture", prior_components=20
        ),
        "vae-iwae-5": vae("VAE, IWAE-5", "iwae", 5),
        "vae-dreg-5": vae("VAE, IWAE-5 DReG", "dreg", 5),
    }
    if board != "binary":
        found.pop("vae-iwae-5")
    return found


# --- cells ---------------------------------------------------------------------------------------


def cells(
    board: str,
    *,
    schedule: str = "quick",
    data: Sequence[str] | None = None,
    entries: Sequence[str] | None = None,
    seeds: int = 1,
    precision: str = "full",
) -> list[Cell]:
    """The cells of a board, in the order of its data sets.

    Args:
        board: ``"binary"`` or ``"continuous"``.
        schedule: ``"quick"``, ``"reduced"`` or ``"smoke"``.
        data: Only these data sets.
        entries: Only these entries.
        seeds: Number of seeds, from 0.
        precision: In which VAEs are trained: see :func:`pvae.fit`. All are judged in full.

    Raises:
        OptionError: A name that the board does not hold, or no seed.
    """
    _check("board", board, BOARDS)
    _check("schedule", schedule, SCHEDULES)
    if precision != "full":
        from pvae.precision import precision_context

        precision_context(precision)  # refuses a name that it does not know
    if seeds < 1:
        raise OptionError(f"--seeds must be at least 1, got {seeds}")
    tasks = {task.data: task for task in BOARDS[board]}
    for name in data or ():
        _check(f"data set of the {board} board", name, tasks)
    chosen = [tasks[name] for name in data or tasks]
    how = SCHEDULES[schedule]
    offered = {task.data: _entries(board, task, how) for task in chosen}
    for name in entries or ():
        _check(f"cell of the {board} board", name, {n for each in offered.values() for n in each})
    return [
        Cell(task, name, *_trained(title, _config(task, own, how, seed), precision))
        for task in chosen
        for name, (title, own) in offered[task.data].items()
        for seed in range(1 if name in _SEEDLESS else seeds)
        if not entries or name in entries
    ]


def _trained(title: str, config: dict[str, Any], precision: str) -> Entry:
    """A VAE's title and configuration with another precision than the full one."""
    if precision == "full" or "training" not in config:
        return title, config
    training = config["training"] | {"precision": precision}
    return f"{title}, {precision}", config | {"training": training}


def _check(what: str, name: str, known: Any) -> None:
    if name not in known:
        raise OptionError(f"no {what} is called {name!r}: {did_you_mean(name, known)}")


def _config(
    task: Task, own: Mapping[str, Any], schedule: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    shared: dict[str, Any] = {
        "version": _VERSION, "data": task.data, "binarize": task.binarize,
        "transform": task.transform, "seed": seed, **own,
    }  # fmt: skip
    if "baseline" in own:
        return shared
    networks = ("z_dim", "hidden", "activation")
    model = {key: schedule[key] for key in networks} | own["model_options"]
    training = {k: v for k, v in schedule.items() if k not in (*networks, "about", *_CLASSICAL)}
    return shared | {"model_options": model, "training": training}


def num_epochs(training: Mapping[str, Any], rows: int) -> int:
    """Passes over ``rows`` data that make up the steps of a schedule, at most its epochs."""
    steps = math.ceil(rows / training["batch_size"])
    return int(min(training["epochs"], max(1, round(training["steps"] / steps))))


def describe() -> str:
    """What the boards hold, in words."""
    lines = []
    for board, tasks in BOARDS.items():
        lines.append(f"{board}: {', '.join(task.data for task in tasks)}")
        found = cells(board)
        titles = {cell.entry: cell.title for cell in found}
        width = max(map(len, titles))
        lines += [f"  {name:<{width}}  {title}" for name, title in titles.items()]
        lines.append(f"  {len(found)} cells a seed\n")
    lines.append("schedules:")
    width = max(map(len, SCHEDULES))
    lines += [f"  {name:<{width}}  {how['about']}" for name, how in SCHEDULES.items()]
    return "\n".join([*lines, "", "Compute one with: pvae board binary --schedule quick"])
