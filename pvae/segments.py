"""Long training in segments of passes: what a kill loses is the segment in flight.

After each segment parameters, optimiser state and history are written whole or not at all, and a
run that finds them goes on from there. Noise and order of a segment depend on the seed and on the
passes before it alone, so that a resumed training is the uninterrupted one.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pvae import runs
from pvae.checkpoints import load_tensors, save_tensors
from pvae.data import Dataset
from pvae.errors import RunError
from pvae.particles import named_tensors
from pvae.seeds import mix
from pvae.training import Run, device_of, fit

__all__ = ["fit_in_segments"]


def fit_in_segments(
    model: Any,
    guide: Any,
    dataset: Dataset,
    folder: Path,
    *,
    objective: Any,
    passes: int,
    segment: int,
    rate: Callable[[float], float],
    lr: float,
    batch_size: int,
    engine: str,
    seed: int,
    precision: str = "full",
    optimizer_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Run:
    """Train a pair of modules by Adam for some passes over the training data, resumable.

    Args:
        model: The generative program, an ``nn.Module``.
        guide: The inference program, likewise.
        dataset: What it is trained on; its validation split is not used.
        folder: Where the state lies between segments.
        objective: As in :func:`pvae.fit`.
        passes: Passes in all.
        segment: Passes between two saves.
        rate: Passes done -> factor of the learning rate.
        lr: Learning rate at factor one.
        batch_size: Data per step.
        engine: As in :func:`pvae.fit`.
        seed: Of order and noise.
        precision: As in :func:`pvae.fit`.
        optimizer_options: Further arguments of Adam.
        progress: Called with (passes done, passes) after each segment.

    Returns:
        The run with the parameters of the last pass; ``seconds`` are those of all its segments.

    Raises:
        RunError: A saved state is of another pair.
    """
    for program in (model, guide):
        program.to(device_of("auto"))  # where fit puts them: a state resumed goes there too
    weights = list(itertools.chain(model.parameters(), guide.parameters()))
    optimizer = torch.optim.Adam(weights, lr=lr, **(optimizer_options or {}))
    steps = math.ceil(len(dataset.train) / batch_size)
    whole = Run(model, guide, objective, num_parameters=sum(w.numel() for w in weights))
    done = _resume(whole, optimizer, folder)
    while done < passes:
        count = min(segment, passes - done)
        part = fit(
            model, guide, dataset.train_raw, objective=objective, epochs=count,
            batch_size=batch_size, optimizer=optimizer, preprocess=dataset.preprocess,
            lr_schedule=_rate_after(done, steps, rate),
            engine=engine, precision=precision, seed=mix(seed, done), progress=False,
        )  # fmt: skip
        for row in part.history:
            whole.history.append(
                {**row, "epoch": row["epoch"] + done, "step": row["step"] + done * steps}
            )
        whole.seconds += part.seconds
        whole.engine = part.engine
        done += count
        _save(whole, optimizer, folder, done)
        if progress is not None:
            progress(done, passes)
    whole.best_epoch = done
    return whole


def _rate_after(done: int, steps: int, rate: Callable[[float], float]) -> Callable[[int], float]:
    return lambda step: rate(done + step / steps)


def _save(run: Run, optimizer: torch.optim.Optimizer, folder: Path, done: int) -> None:
    older = _saved(folder)
    about = {"passes": done, "seconds": run.seconds, "history": run.history}
    with runs.create(folder / f"{done:06d}") as aside:
        state = named_tensors(run.model, run.guide) | _optimizer_state(optimizer)
        save_tensors(aside, state, about)
    for path in older:
        shutil.rmtree(path, ignore_errors=True)


def _saved(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]*") if path.is_dir())


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"optimizer.{k}.{name}": value
        for k, weight in enumerate(optimizer.param_groups[0]["params"])
        for name, value in optimizer.state[weight].items()
    }


def _resume(run: Run, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """Passes that were done before, their state copied into the run and the optimiser."""
    found = _saved(folder)
    if not found:
        return 0
    tensors, about = load_tensors(found[-1])
    own = named_tensors(run.model, run.guide)
    saved = {name: each for name, each in tensors.items() if not name.startswith("optimizer.")}
    shapes = [{name: value.shape for name, value in each.items()} for each in (own, saved)]
    if shapes[0] != shapes[1]:
        raise RunError(f"{found[-1]} is the state of another pair: remove it, or train elsewhere")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])
    weights = optimizer.param_groups[0]["params"]
    for name in tensors.keys() - saved.keys():
        _, index, key = name.split(".")
        weight, value = weights[int(index)], tensors[name]
        optimizer.state[weight][key] = value if key == "step" else value.to(weight.device)
    run.history = list(about["history"])
    run.seconds = float(about["seconds"])
    return int(about["passes"])
