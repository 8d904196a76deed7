"""Data that are no images, beside what models make of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pvae.plots.arrays import Array, principal_axes
from pvae.plots.figures import (
    COLOURS,
    GREY,
    empty_figure,
    grid_of_axes,
    legend_beside,
    polish,
    rows_and_columns,
    shortened,
    single_axes,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["tables_beside", "tables_reconstructed"]

_MAX_FEATURES = 16  # of a table, before a picture of its marginals becomes unreadable
_MAX_POINTS = 2000


def tables_beside(sources: Mapping[str, Array]) -> Figure:
    """Quantiles of each feature, over clouds of each model's samples and the data."""
    models = {name: x for name, x in sources.items() if name != "data"}
    if sources["data"].shape[1] == 1 or not models:
        figure, axes = single_axes(7.5, 3.4)
        _marginals(axes, sources)
        return figure
    rows, columns = rows_and_columns(len(models))
    figure = empty_figure(max(8.0, 3 * columns), 3.4 + 2.9 * rows)
    parts: Any = figure.subfigures(2, 1, height_ratios=(3.4, 2.9 * rows))
    above, below = parts
    _marginals(above.subplots(), sources)
    _clouds(below, below.subplots(rows, columns, squeeze=False, sharex=True, sharey=True), sources)
    return figure


def _clouds(figure: Any, grid: Any, sources: Mapping[str, Array]) -> None:
    """Each model's samples over the data, in the plane of the data's principal components."""
    models = [(name, x) for name, x in sources.items() if name != "data"]
    centre, basis, _ = principal_axes(sources["data"])
    for axes in grid.flat[len(models) :]:
        axes.set_axis_off()
    for k, (axes, (name, x)) in enumerate(zip(grid.flat, models, strict=False)):
        _cloud(axes, sources["data"], centre, basis, GREY, 0.45)
        _cloud(axes, x, centre, basis, COLOURS[k % len(COLOURS)], 0.6)
        axes.set_title(shortened(name, 26), fontsize=10)
        polish(axes)
    figure.supxlabel("principal component 1 of the data", fontsize=10)
    figure.supylabel("principal component 2", fontsize=10)


def _cloud(axes: Any, x: Array, centre: Array, basis: Array, colour: str, alpha: float) -> None:
    flat = (x[:_MAX_POINTS] - centre) @ basis[:2].T
    axes.scatter(*flat.T, s=7, lw=0, color=colour, alpha=alpha)


def _marginals(axes: Any, sources: Mapping[str, Array]) -> None:
    width = next(iter(sources.values())).shape[1]
    shown = min(width, _MAX_FEATURES)
    colours = [GREY, *COLOURS]
    step = 0.8 / len(sources)
    room = 430 * step / shown  # points between neighbouring bars
    for k, (name, x) in enumerate(sources.items()):
        q05, q25, q50, q75, q95 = np.quantile(x[:, :shown], (0.05, 0.25, 0.5, 0.75, 0.95), axis=0)
        places = np.arange(shown) + (k - (len(sources) - 1) / 2) * step
        colour = colours[k % len(colours)]
        axes.vlines(places, q05, q95, color=colour, lw=1.2)
        axes.vlines(places, q25, q75, color=colour, lw=min(6, 0.6 * room), label=shortened(name))
        axes.plot(places, q50, "o", color="white", mec=colour, ms=min(5, 0.8 * room))
    few = "" if shown == width else f" (the first {shown} of {width})"
    axes.set(xlabel=f"feature{few}", ylabel="value", xticks=range(shown))
    axes.set_title("Median, 25 to 75 % and 5 to 95 % of each feature", fontsize=11)
    polish(axes)
    legend_beside(axes)


def tables_reconstructed(sources: Mapping[str, Array]) -> Figure:
    """Each model's reconstructed values against those of the data."""
    data = sources["data"]
    models = {name: x for name, x in sources.items() if name != "data"}
    rows, columns = rows_and_columns(len(models))
    figure, grid = grid_of_axes(rows, columns, width=3.4 * columns, height=3.6 * rows, bare=False)
    for axes in grid[1:]:
        axes.sharex(grid[0])
        axes.sharey(grid[0])
    for k, (axes, (name, x)) in enumerate(zip(grid, models.items(), strict=False)):
        count = min(len(x), len(data))
        truth, made = data[:count].reshape(-1), x[:count].reshape(-1)
        stride = math.ceil(len(truth) / _MAX_POINTS)
        axes.axline((0, 0), slope=1, color=GREY, lw=1)
        colour = COLOURS[k % len(COLOURS)]
        axes.scatter(truth[::stride], made[::stride], s=7, lw=0, alpha=0.5, color=colour)
        error = math.sqrt(float(np.square(truth - made).mean()))
        axes.set_title(f"{shortened(name, 26)}\nroot mean square error {error:.3g}", fontsize=10)
        axes.set(xlabel="value", ylabel="reconstruction" if k % columns == 0 else "")
    return figure
