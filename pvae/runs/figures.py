"""The pictures of a run folder; one that cannot be drawn is a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae.errors import DataError, first_line
from pvae.runs.datasets import test_batch
from pvae.runs.generation import generate

if TYPE_CHECKING:
    from pvae.data import Dataset
    from pvae.training import Run

__all__ = ["draw_board_figures", "draw_figures", "save_figure"]


def draw_figures(run: Run, dataset: Dataset, folder: Path, *, name: str) -> None:
    """Training curves, samples beside data, reconstructions, and latents by label, as PNGs."""
    draw_board_figures({name.rpartition("/")[2]: run}, {}, dataset, folder)


def draw_board_figures(
    networks: Mapping[str, Run], classical: Mapping[str, Any], dataset: Dataset, folder: Path
) -> None:
    """The same of several runs, best first, beside samples of the best classical density.

    A picture that cannot be drawn is a warning, never the loss of a trained run.
    """
    from pvae import plots

    best = next(iter(networks.values()))
    pictures: dict[str, Callable[[], Any]] = {
        "training_curves": lambda: plots.training_curves(
            {name: _on_the_original_scale(run.history, dataset) for name, run in networks.items()}
        ),
    }
    if dataset.vocabulary is None:  # the numbers of words are no quantity to draw
        pictures["samples"] = lambda: _samples(networks, classical, dataset)
        pictures["reconstructions"] = lambda: _reconstructions(networks, dataset)
    if any(getattr(density, "selection", None) for density in classical.values()):
        pictures["selection"] = lambda: plots.selection_curves(classical)
    if dataset.test.labels is not None:
        pictures["latents"] = lambda: _latent_scatter(best, dataset)
    for title, make in pictures.items():
        save_figure(make, folder / "figures" / f"{title}.png")


def _on_the_original_scale(history: Sequence[Any], dataset: Dataset) -> list[dict[str, float]]:
    """Bounds as densities of the data as they were given, like all that is printed."""
    shifts = {
        "bound": float(dataset.train.log_det.mean()),
        "valid_bound": float(dataset.valid.log_det.mean()),
    }
    return [
        {**row, **{key: row[key] + shift for key, shift in shifts.items() if key in row}}
        for row in history
    ]


def save_figure(make: Callable[[], Any], path: Path) -> Path | None:
    """Draw and write one picture; ``None`` and a warning if it cannot be drawn."""
    from pvae import plots

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        plots.save(make(), path)
    except OSError:
        raise
    except Exception as error:
        warnings.warn(
            f"the picture {path.name} was not drawn ({type(error).__name__}: {first_line(error)})",
            UserWarning,
            stacklevel=2,
        )
        return None
    return path


def _samples(networks: Mapping[str, Run], classical: Mapping[str, Any], dataset: Dataset) -> Any:
    """Draws of the best run with their means, and of the best classical density."""
    from pvae import plots

    rows, back = dataset.test.x[:64], dataset.transform.inverse
    name, run = next(iter(networks.items()))
    draws, means, _ = generate(run.model, test_batch(run.model, dataset, 64))
    shown = {f"{name}: samples": back(draws)}
    if means is not None:
        shown[f"{name}: means"] = back(means)
    for rival, density in list(classical.items())[:1]:
        shown[rival] = back(density.sample(len(rows)).to(rows.dtype))
    return plots.samples_beside_data(shown, back(rows), dataset.image_shape)


def _reconstructions(networks: Mapping[str, Run], dataset: Dataset) -> Any:
    from pvae import plots

    rows, back, shown = dataset.test.x[:16], dataset.transform.inverse, {}
    for name, run in networks.items():
        example = test_batch(run.model, dataset, 16)
        draws, means, _ = generate(run.model, example, guide=run.guide)
        shown[name] = back(draws if means is None else means)
    return plots.reconstructions(back(rows), shown, dataset.image_shape)


def _latent_scatter(run: Run, dataset: Dataset) -> Any:
    from pvae import plots

    example = test_batch(run.model, dataset, len(dataset.test))
    _, _, latent = generate(run.model, example, guide=run.guide)
    if latent is None:
        raise DataError("the guide has no real latent site")
    return plots.latent_scatter(latent, dataset.test.labels)
