"""A trained pair and its history, read from a run folder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae import catalogue
from pvae.errors import RunError
from pvae.runs.configurations import read_config
from pvae.runs.pairs import pair

if TYPE_CHECKING:
    from torch import Tensor

    from pvae.training import Run

__all__ = ["history", "load"]


def load(run_dir: str | Path) -> Run:
    """The trained pair of a run folder, every byte of its parameters verified.

    Neither data nor a training step are needed. Of a run that was interrupted, or whose best
    parameters are damaged, the newest good checkpoint is taken, with a warning.

    Raises:
        RunError: the folder is no run, or a file in it is missing or damaged.
        ProgramError: the user's model file does not run.
    """
    from pvae.checkpoints import load_tensors
    from pvae.training import Run

    folder = Path(run_dir)
    config = read_config(folder)
    known = dict(config["data_facts"])
    if (folder / "checkpoints" / "data").is_dir():
        known |= load_tensors(folder / "checkpoints" / "data")[0]
    tensors, about = _best(folder)
    model, guide = pair(config, known, folder=folder)
    _restore(model, guide, tensors, known["x_dim"], folder)
    rows = history(folder, torn=about["stopped"] == "interrupted")
    by_length = "epochs" if len(rows) == config["epochs"] else "patience"
    return Run(
        model=model,
        guide=guide,
        objective=catalogue.build_objective(config["objective"], config["objective_options"]),
        history=rows,
        best_epoch=int(about["epoch"]),
        num_parameters=int(config.get("num_parameters") or 0),
        seconds=sum(row.get("seconds", 0.0) for row in rows),
        run_dir=folder,
        stopped=about["stopped"] or by_length,
    )


def _best(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The best parameters of a run, with their epoch and why it stopped."""
    from pvae.checkpoints import load_tensors, newest, steps

    root = folder / "checkpoints"
    try:
        tensors, manifest = load_tensors(root / "best")
        later = [path for path in steps(root) if int(path.name[5:13]) > manifest.get("step", 0)]
        if not later or manifest.get("step") is None:
            return tensors, {"epoch": manifest.get("epoch", 0), "stopped": manifest.get("stopped")}
        damage = None
    except RunError as error:
        damage = error if (root / "best").exists() else None
        if not steps(root):
            raise
    found = newest(root)
    assert found is not None
    where, (tensors, manifest) = found
    place = manifest.get("place")
    if not (isinstance(place, dict) and {"epoch", "best_epoch"} <= place.keys()):
        raise RunError(f"{where} is no checkpoint of a training")
    reason = damage or f"{folder} was interrupted in epoch {place['epoch']}"
    warnings.warn(f"{reason}; the best parameters of {where.name} are used", stacklevel=3)
    kind = "best." if any(name.startswith("best.") for name in tensors) else "state."
    kept = {n.removeprefix(kind): t for n, t in tensors.items() if n.startswith(kind)}
    stopped = None if damage else "interrupted"
    return kept, {"epoch": place["best_epoch"], "stopped": stopped}


def _restore(
    model: Any, guide: Any, tensors: Mapping[str, Tensor], x_dim: int, folder: Path
) -> None:
    """Copy the saved tensors into the pair, each by its name."""
    import torch

    from pvae.particles import named_tensors, parameters

    own = named_tensors(model, guide)
    tensors = {n: t for n, t in tensors.items() if not n.startswith(("objective.", "game."))}
    if any(name.startswith("store.") for name in tensors):
        own |= parameters(model, guide, torch.zeros(2, x_dim))
    for name in sorted(own.keys() ^ tensors.keys()):
        what = "is not in" if name in own else "has no place in the pair of"
        raise RunError(f"tensor {name!r} {what} {folder}: was the model's file changed?")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise RunError(
                    f"tensor {name!r} of {folder} has shape {tuple(tensors[name].shape)}, the "
                    f"model expects {tuple(tensor.shape)}: was its file changed?"
                )
            tensor.copy_(tensors[name])


def history(folder: Path, *, torn: bool = False) -> list[dict[str, float]]:
    """The rows of ``metrics.jsonl``.

    Args:
        folder: The run.
        torn: The file may lack, or may not have ended its last line.

    Raises:
        RunError: It is missing or damaged.
    """
    path = folder / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8")
        if torn:
            text = text[: text.rfind("\n") + 1]
        return [json.loads(line) for line in text.splitlines() if line]
    except (OSError, ValueError) as error:
        if torn and isinstance(error, FileNotFoundError):
            return []
        raise RunError(f"{path} is missing or damaged: train the run again") from None
