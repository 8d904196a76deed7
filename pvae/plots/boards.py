"""Boards of models: means, and paired differences to the best."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, Any

import numpy as np

from pvae.errors import DataError
from pvae.plots.arrays import or_zero
from pvae.plots.figures import GREY, INK, empty_figure, polish, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pvae.comparison import Board

__all__ = ["board", "standings"]

_KINDS = {"exact": ("s", "#0072B2"), "estimate": ("o", "#D55E00"), "lower bound": ("^", "#009E73")}


def board(board: Board) -> Figure:
    """Mean test log p of each entry, and its paired difference to the best, both ± 2 SE.

    Args:
        board: What :func:`pvae.compare` returned.
    """
    rows = [row for row in board.rows if math.isfinite(row.mean)]
    figure = empty_figure(10.5, 1.7 + 0.42 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for place, row in enumerate(rows):
        marker, colour = _KINDS.get(row.kind, _KINDS["estimate"])
        style = {"fmt": marker, "color": colour, "ms": 7, "capsize": 3, "elinewidth": 1.5}
        left.errorbar(row.mean, place, xerr=2 * row.stderr, **style)
        right.errorbar(row.difference, place, xerr=2 * or_zero(row.difference_stderr), **style)
        if row.elbo is not None:
            left.plot(row.elbo, place, "|", color=GREY, ms=11, mew=2)
    _board_axes(left, right, rows)
    _kinds_legend(figure, rows)
    figure.suptitle(board.data[:1].upper() + board.data[1:], fontsize=11)
    return figure


def _board_axes(left: Any, right: Any, rows: Sequence[Any]) -> None:
    _mean_and_difference(left, right, [row.name for row in rows])
    left.set_xlabel("mean test log p ± 2 SE (nats per datum)")
    right.set_xlabel("paired difference to the best ± 2 SE (nats)")


def _mean_and_difference(left: Any, right: Any, names: Sequence[str], **style: Any) -> None:
    """One line for each name, the first above; means on the left, differences on the right."""
    for axes in (left, right):
        polish(axes)
        axes.grid(visible=True, axis="y", color="#EEEEEE")
    left.set_yticks(range(len(names)), [shortened(name, 28) for name in names], **style)
    left.set_ylim(len(names) - 0.5, -0.5)
    right.locator_params(axis="x", nbins=5)
    right.axvline(0, color=GREY, lw=1, zorder=0)
    right.tick_params(axis="y", length=0, labelleft=False)


def _kind_handles(kinds: Set[str], size: float) -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], marker=marker, color=colour, ls="", ms=size, label=kind)
        for kind, (marker, colour) in _KINDS.items()
        if kind in kinds
    ]


def _kinds_legend(figure: Any, rows: Sequence[Any]) -> None:
    from matplotlib.lines import Line2D

    handles = _kind_handles({row.kind for row in rows}, 7)
    if any(row.elbo is not None for row in rows):
        handles.append(Line2D([], [], marker="|", color=GREY, ls="", ms=11, mew=2, label="ELBO"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)


def standings(tables: Sequence[Any]) -> Figure:
    """Every data set of a public board: mean test log p ± 2 SE, and paired bootstrap intervals.

    Args:
        tables: What :func:`pvae.standings.standings` made; those without a finite mean are left
            out.

    Raises:
        DataError: There is nothing to draw.
    """
    shown = {table.data: _finite_lines(table) for table in tables}
    shown = {data: lines for data, lines in shown.items() if lines}
    if not shown:
        raise DataError("no cell of the board has a finite mean: there is nothing to draw")
    heights = [1.6 + len(lines) for lines in shown.values()]
    figure = empty_figure(11, 0.9 + 0.27 * sum(heights))
    grid = figure.subplots(len(shown), 2, squeeze=False, width_ratios=(3, 2), height_ratios=heights)
    for (left, right), (data, lines) in zip(grid, shown.items(), strict=True):
        right.sharey(left)
        for place, line in enumerate(lines):
            _standing(left, right, place, line)
        _standing_axes(left, right, data, lines)
    grid[-1, 0].set_xlabel("mean test log p ± 2 SE (nats per datum)")
    grid[-1, 1].set_xlabel("paired difference to the best of ours, 95 % (nats)")
    _standings_legend(figure, [line for lines in shown.values() for line in lines])
    return figure


def _finite_lines(table: Any) -> list[Any]:
    return [line for line in table.lines if line.mean is not None and math.isfinite(line.mean)]


def _standing(left: Any, right: Any, place: int, line: Any) -> None:
    if line.status == "published":
        left.plot(line.mean, place, "D", mfc="white", mec=GREY, ms=6)
        return
    marker, colour = _KINDS.get(line.kind, _KINDS["estimate"])
    style = {"fmt": marker, "color": colour, "ms": 6, "capsize": 3, "elinewidth": 1.5}
    left.errorbar(line.mean, place, xerr=2 * or_zero(line.stderr), **style)
    ends = [[or_zero(line.difference - line.low)], [or_zero(line.high - line.difference)]]
    right.errorbar(line.difference, place, xerr=np.maximum(ends, 0), **style)


def _standing_axes(left: Any, right: Any, data: str, lines: Sequence[Any]) -> None:
    _mean_and_difference(left, right, [line.title for line in lines], fontsize=8.5)
    for label, line in zip(left.get_yticklabels(), lines, strict=True):
        label.set_color("#666666" if line.status == "published" else INK)
    left.set_title(data, loc="left", fontsize=11)


def _standings_legend(figure: Any, lines: Sequence[Any]) -> None:
    from matplotlib.lines import Line2D

    kinds = {line.kind for line in lines}
    handles = _kind_handles(kinds, 6)
    if "published" in kinds:
        style: dict[str, Any] = {"marker": "D", "mfc": "white", "mec": GREY, "ls": "", "ms": 6}
        handles.append(Line2D([], [], label="published", **style))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
