"""One cell of a board: fitted, scored on the test data, and kept in a folder of its own.

The folder is written whole or not at all. A VAE's cell holds its run folder too (``run/``, which
``pvae evaluate`` takes), a classical density's the fitted density (``density/``).
"""

from __future__ import annotations

import json
import platform
import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae import __version__, board, catalogue, runs
from pvae.errors import OptionError, PvaeError, RunError

if TYPE_CHECKING:
    from torch import Tensor

    from pvae.data import Dataset

__all__ = ["Result", "compute", "read"]

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """What a cell found; nats per datum, on the original scale of the data.

    Attributes:
        log_p: ``(N,)`` log density of each test datum, float64.
        kind: ``"exact"``, ``"estimate"`` or ``"lower bound"``.
        valid_mean: Mean log density of the validation data, by the same method (``reduced``: with a
            tenth of the particles).
        unreliable: Share of test data with k-hat above 0.7; ``None`` where nothing was drawn.
        num_parameters: Fitted numbers.
        seconds: Time of the fit and of the scores.
        chosen: What validation chose, in words.
        num_particles: K of the estimates; ``None`` where nothing was drawn.
        fingerprint: Of the test data.
        x_dim: Features of a datum.
    """

    log_p: Tensor
    kind: str
    valid_mean: float
    unreliable: float | None
    num_parameters: int | None
    seconds: float
    chosen: str
    num_particles: int | None
    fingerprint: str
    x_dim: int


def read(folder: Path) -> Result:
    """The result in a cell's folder.

    Raises:
        RunError: A file is missing or damaged.
    """
    from pvae.checkpoints import load_tensors

    tensors, _ = load_tensors(folder)
    try:
        content = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        found = {name: content[name] for name in Result.__dataclass_fields__ if name != "log_p"}
        return Result(log_p=tensors["log_p"], **found)
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(f"{folder / 'result.json'} is damaged: remove the folder") from None


def compute(config: Config, folder: Path) -> None:
    """Fit, score and write one cell; one that is there already is left alone.

    Args:
        config: As :class:`pvae.board.Cell` has it.
        folder: Its final place; ``<folder>.part`` holds the state of a long training.

    Raises:
        PvaeError: The data are missing, or the entry cannot be fitted to them.
    """
    if folder.exists():
        return
    dataset = runs.data_of(dict(config))
    part = folder.with_name(f"{folder.name}.part")
    with runs.create(folder) as aside:
        started = time.perf_counter()
        make = _density if "baseline" in config else _network
        entry, chosen, earlier = make(config, dataset, aside, part)
        _write(aside, config, dataset, entry, chosen, started - earlier)
    shutil.rmtree(part, ignore_errors=True)


def _write(
    folder: Path, config: Config, dataset: Dataset, entry: Any, chosen: str, started: float
) -> None:
    """Score the entry and write what it found; ``started`` is when its fit began."""
    import torch

    from pvae import compare
    from pvae.checkpoints import save_tensors

    training = config.get("training", {"num_particles": 1})
    draws, seed = training["num_particles"], config["seed"]
    fewer = training.get("valid_particles", draws)  # for the table alone: it chooses nothing
    test = compare({"cell": entry}, dataset.test, num_particles=draws, seed=seed)
    valid = compare({"cell": entry}, dataset.valid, num_particles=fewer, seed=seed)
    row = test["cell"]
    is_drawn = row.unreliable is not None
    save_tensors(folder, {"log_p": test.evidence["cell"].log_evidence}, {"units": "nats"})
    content = {
        "mean": row.mean,
        "stderr": row.stderr,
        "kind": row.kind,
        "valid_mean": valid["cell"].mean,
        "unreliable": row.unreliable,
        "num_parameters": row.num_parameters,
        "seconds": time.perf_counter() - started,
        "chosen": chosen,
        "num_particles": draws if is_drawn else None,
        "x_dim": dataset.x_dim,
        "fingerprint": runs.facts(dataset)["fingerprint"],
        "data": dataset.description(),
        "threads": torch.get_num_threads(),
        "versions": {"pvae": __version__, "python": platform.python_version()} | _versions(),
        "config": dict(config),
    }
    runs.write_json(folder / "result.json", content)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "pyro-ppl", "numpy", "scikit-learn")}


# --- classical densities -------------------------------------------------------------------------


def _density(config: Config, dataset: Dataset, folder: Path, part: Path) -> tuple[Any, str, float]:
    """The candidate with the best validation log density; one that does not suit is left out."""
    best, best_mean, best_options, refused = None, float("-inf"), {}, None
    for options in config["candidates"]:
        try:
            density = _fitted(config, options, dataset)
            mean = float(density.score_samples(dataset.valid.x).mean())
        except PvaeError as error:
            refused = refused or error
            warnings.warn(f"{_in_words(options)} was left out: {error}", stacklevel=2)
            continue
        if best is None or mean > best_mean:
            best, best_mean, best_options = density, mean, options
    if best is None:
        raise refused or OptionError("there is no candidate to fit")
    best.save(folder / "density")
    varied = {
        name: value
        for name, value in best_options.items()
        if any(each[name] != value for each in config["candidates"])
    }
    option = getattr(best, "option", None)
    if not config["candidates"][0] and option is not None:
        varied = {option: best.chosen}
    return best, _in_words(varied), 0.0


def _fitted(config: Config, options: Mapping[str, Any], dataset: Dataset) -> Any:
    from pvae import baselines

    kind = baselines.get(config["baseline"])
    seeded = {"seed": config["seed"]} if "seed" in catalogue.option_names(kind) else {}
    return kind(**options, **seeded).fit(dataset.train.x, dataset.valid.x)


_SHORT = {"n_components": "K", "num_factors": "factors", "reg_covar": "floor"}


def _in_words(options: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{_SHORT.get(name, name)} {value:.3g}" if isinstance(value, float)
        else f"{_SHORT.get(name, name)} {value}"
        for name, value in options.items()
    )  # fmt: skip


# --- VAEs ----------------------------------------------------------------------------------------


def _network(config: Config, dataset: Dataset, folder: Path, part: Path) -> tuple[Any, str, float]:
    """Train the VAE into ``folder/run``; the seconds of segments that an earlier process did."""
    from pvae.checkpoints import save_tensors

    training = config["training"]
    full = _run_config(config, dataset)
    known, moments = runs.facts(dataset), runs.statistics(dataset) | runs.example_rows(dataset)
    model, guide = runs.pair(full, known | moments)
    objective = catalogue.build_objective(config["objective"], config["objective_options"])
    folder, earlier = folder / "run", 0.0
    if "passes" in training:
        started = time.perf_counter()
        run = _train_in_segments(model, guide, dataset, objective, training, config["seed"], part)
        _write_run(run, folder)
        earlier = max(0.0, run.seconds - (time.perf_counter() - started))
    else:
        run = _train(model, guide, dataset, objective, full, folder)
    save_tensors(folder / "checkpoints" / "data", moments, {})
    counted = {"num_parameters": run.num_parameters, "data_facts": known}
    runs.write_config(folder, {"pvae": __version__, **full, **counted})
    return run, f"epoch {run.best_epoch} of {len(run.history)}", earlier


_PAIR = {"model": "vae", "guide": "gaussian"}  # unless a cell names others


def _run_config(config: Config, dataset: Dataset) -> dict[str, Any]:
    """The configuration of the run, as ``pvae train`` would have written it."""
    training = config["training"]
    names = {role: config.get(role, default) for role, default in _PAIR.items()}
    offered = {
        role: catalogue.option_names(catalogue.find(role, name).factory)
        for role, name in names.items()
    }
    given = config["model_options"] | {"likelihood": config["likelihood"]}
    model = {key: value for key, value in given.items() if key in offered["model"]}
    guide = {key: given[key] for key in ("hidden", "activation") if key in offered["guide"]}
    is_long = "passes" in training
    epochs = training["passes"] if is_long else board.num_epochs(training, len(dataset.train))
    return {
        **runs.DEFAULTS,
        **{key: config[key] for key in ("data", "binarize", "transform", "seed", "objective")},
        "objective_options": dict(config["objective_options"]),
        **names,
        "model_options": model,
        "guide_options": guide,
        "epochs": epochs,
        "lr_schedule": "constant" if is_long else "cosine",
        "patience": None if is_long else 20,
        **{key: training[key] for key in ("batch_size", "lr", "engine")},
        "precision": training.get("precision", "full"),
    }


def _train(
    model: Any, guide: Any, dataset: Dataset, objective: Any, full: Config, folder: Path
) -> Any:
    from pvae.training import fit

    names = ("epochs", "batch_size", "lr", "lr_schedule", "patience", "engine", "precision", "seed")
    return fit(
        model, guide, dataset.train_raw, objective=objective, valid=dataset.valid.x,
        preprocess=dataset.preprocess, run_dir=folder, checkpoint_every=None, progress=False,
        **{name: full[name] for name in names},
    )  # fmt: skip


def _train_in_segments(
    model: Any, guide: Any, dataset: Dataset, objective: Any, training: Config, seed: int,
    part: Path,
) -> Any:  # fmt: skip
    from pvae.segments import fit_in_segments

    return fit_in_segments(
        model, guide, dataset, part, objective=objective, rate=board.rate_factor, seed=seed,
        optimizer_options={"eps": training["eps"]}, progress=_say_passes,
        precision=training.get("precision", "full"),
        **{name: training[name] for name in ("passes", "segment", "lr", "batch_size", "engine")},
    )  # fmt: skip


def _say_passes(done: int, passes: int) -> None:
    print(f"{done} of {passes} passes", flush=True)


def _write_run(run: Any, folder: Path) -> None:
    from pvae.checkpoints import save_tensors, write_aside
    from pvae.particles import named_tensors

    about = {"epoch": run.best_epoch}
    save_tensors(folder / "checkpoints" / "best", named_tensors(run.model, run.guide), about)
    lines = "".join(json.dumps(row) + "\n" for row in run.history)
    write_aside(folder / "metrics.jsonl", lines.encode())
