"""``pvae sample``: draws from a run, as an array, a picture or lines of text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae import runs
from pvae.commands.preparing import data_for
from pvae.commands.saying import say
from pvae.errors import OptionError

if TYPE_CHECKING:
    from pvae.data import Dataset

__all__ = ["sample"]


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
