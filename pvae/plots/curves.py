"""Bounds by epoch, and criteria by size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pvae.errors import DataError
from pvae.plots.arrays import Array
from pvae.plots.figures import (
    COLOURS,
    GREY,
    INK,
    empty_figure,
    legend_beside,
    polish,
    rows_and_columns,
    shortened,
    single_axes,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["History", "selection_curves", "training_curves"]

History = Sequence[Mapping[str, float]]


def training_curves(histories: Mapping[str, History]) -> Figure:
    """Training and validation bound by epoch, nats per datum; the best epoch is marked.

    The vertical axis leaves out the plunge of the first epochs where it would hide the rest.

    Args:
        histories: Name -> ``run.history``.

    Raises:
        DataError: No history has an epoch.
    """
    known = {name: history for name, history in histories.items() if history}
    if not known:
        raise DataError("there is no epoch to draw: pass {name: run.history} of a trained run")
    figure, axes = single_axes(7.5, 4.5)
    shown: list[float] = []
    for (name, history), colour in zip(known.items(), itertools.cycle(COLOURS), strict=False):
        shown += _curve(axes, name, history, colour)
    _leave_out_the_plunge(axes, shown, max(len(history) for history in known.values()))
    axes.plot([], [], "--", color=GREY, lw=1.2, label="training")
    if any("valid_bound" in history[-1] for history in known.values()):
        axes.plot([], [], "-", color=GREY, lw=2, label="validation")
        axes.plot([], [], "o", color=GREY, mec="white", ms=8, label="best epoch")
    axes.set(xlabel="epoch", ylabel="bound (nats per datum)", title="Bound by epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend_beside(axes)
    return figure


def game_curves(history: History, players: Sequence[str]) -> Figure:
    """The players' losses by epoch, and how often the discriminator is right.

    Args:
        history: That of a :class:`pvae.adversarial.Contest`.
        players: Whose losses are drawn.

    Raises:
        DataError: There is no epoch.
    """
    if not history:
        raise DataError("there is no epoch to draw: pass the history of a game")
    figure = empty_figure(9.0, 4.0)
    left, right = figure.subplots(1, 2)
    epochs = _column(history, "epoch")
    lone = "o" if len(history) == 1 else None
    for name, colour in zip(players, itertools.cycle(COLOURS), strict=False):
        left.plot(epochs, _column(history, name), color=colour, label=shortened(name), marker=lone)
    sizes = [abs(row[name]) for row in history for name in players if name in row]
    apart = max(sizes, default=1.0) > 30 * min(sizes, default=1.0)  # nats beside log-odds
    left.set(xlabel="epoch", ylabel="loss", title="Losses", yscale="symlog" if apart else "linear")
    watched = {
        "accuracy": "discriminator's accuracy",
        "sample_spread": "samples' spread / data's",
        "told_apart": "share of posteriors and contrast told apart",
    }
    for (key, label), colour in zip(watched.items(), COLOURS, strict=False):
        if key in history[0]:
            right.plot(epochs, _column(history, key), color=colour, label=label, marker=lone)
    if history[0].keys() & {"accuracy", "told_apart"}:
        right.axhline(0.5, color=GREY, lw=0.8, ls=":")  # where the discriminator guesses
    right.set(xlabel="epoch", ylim=(0, None), title="Balance")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    return figure


def _curve(axes: Any, name: str, history: History, colour: str) -> list[float]:
    """One run's lines; returns the values that must be seen: all but the first tenth."""
    epochs = _column(history, "epoch")
    train, valid = _column(history, "bound"), _column(history, "valid_bound")
    lone = "o" if len(history) == 1 else None
    label = shortened(name)
    axes.plot(epochs, train, "--", color=colour, lw=1.2, alpha=0.8, marker=lone, ms=4)
    axes.plot([], [], "-", color=colour, lw=4, label=label)
    if np.isfinite(valid).any():
        best, judged = int(np.nanargmax(valid)), ~np.isnan(valid)
        axes.plot(epochs[judged], valid[judged], "-", color=colour, lw=2)
        axes.plot(epochs[best], valid[best], "o", color=colour, mec="white", ms=8, zorder=5)
    settled = slice(math.ceil(len(history) / 10), None)
    values = [*train[settled], *valid[settled]]
    return [value for value in values if math.isfinite(value)]


def _column(history: History, key: str) -> Array:
    return np.array([row.get(key, math.nan) for row in history], dtype=float)


def _leave_out_the_plunge(axes: Any, shown: list[float], epochs: int) -> None:
    if epochs < 5 or not shown:
        return
    low, high = min(shown), max(shown)
    if low - axes.get_ylim()[0] > 1.5 * (high - low) > 0:
        margin = 0.06 * (high - low)
        axes.set_ylim(low - margin, high + margin)
        note = {"transform": axes.transAxes, "ha": "right", "fontsize": 8.5, "color": "#666666"}
        axes.text(0.98, 0.03, "the first epochs lie below the axis", **note)


def selection_curves(densities: Mapping[str, Any]) -> Figure:
    """How each density chose its size: the criterion against the candidates, the choice ringed.

    Args:
        densities: Name -> a fitted baseline; those that had nothing to choose are left out.

    Raises:
        DataError: None of them had anything to choose.
    """
    chosen = {name: each for name, each in densities.items() if getattr(each, "selection", None)}
    if not chosen:
        raise DataError("none of the densities had a size to choose: give several n_components")
    rows, columns = rows_and_columns(len(chosen))
    figure = empty_figure(3.6 * columns, 2.7 * rows)
    grid = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes, (name, density), colour in zip(
        grid, chosen.items(), itertools.cycle(COLOURS), strict=False
    ):
        _criterion(axes, density, colour)
        axes.set_title(shortened(name, 30), fontsize=10)
        axes.set_xlabel(density.option)
        polish(axes)
    for axes in grid[len(chosen) :]:
        axes.set_visible(False)
    for axes in grid[::columns]:
        axes.set_ylabel("criterion (nats per datum)")
    return figure


def _criterion(axes: Any, density: Any, colour: str) -> None:
    values = sorted(density.selection)
    heights = [density.selection[value] for value in values]
    axes.plot(values, heights, "o-", color=colour, ms=4)
    best = density.selection[density.chosen]
    axes.plot(density.chosen, best, "o", ms=11, mfc="none", mec=INK)
    finite = [height for height in heights if math.isfinite(height)]
    spread = best - float(np.median(finite))
    # A candidate that fails by thousands of nats would flatten all others.
    axes.set_ylim(max(min(finite), best - 4 * spread) - 0.1 * spread, best + 0.3 * spread)
    axes.set_xscale("log")
    axes.minorticks_off()
    ticks = values if len(values) <= 8 else values[:: len(values) // 4]
    axes.set_xticks(ticks, [f"{value:.2g}" if value < 1 else f"{value:g}" for value in ticks])
