"""Calibration on simulated data, and predictive checks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from pvae.plots.arrays import as_array
from pvae.plots.figures import COLOURS, GREY, grid_of_axes, rows_and_columns, shortened, single_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pvae.evidence import Calibration, PredictiveChecks

__all__ = ["coverage_curves", "predictive_histograms", "rank_histograms"]


def rank_histograms(calibration: Calibration) -> Figure:
    """Rank histograms with the band that 99 % of calibrated bars lie in; rejected ones in red.

    Args:
        calibration: What :func:`pvae.evidence.calibration` found; at most 16 quantities are drawn,
            the least uniform coordinates and all others.
    """
    shown = _shown_quantities(calibration)
    rows, columns = rows_and_columns(len(shown))
    figure, grid = grid_of_axes(
        rows, columns, width=2.9 * columns + 0.6, height=2.3 * rows + 0.9, bare=False
    )
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    bins, number = calibration.num_bins, len(calibration)
    expected = number / bins
    band = 2.576 * math.sqrt(expected * (1 - 1 / bins))
    ranks, rejected = as_array(calibration.ranks), set(calibration.rejected)
    for axes, q in zip(grid, shown, strict=False):
        counts = np.bincount(ranks[:, q] * bins // (calibration.num_draws + 1), minlength=bins)
        name = calibration.names[q]
        colour = COLOURS[1] if name in rejected else COLOURS[0]
        axes.axhspan(expected - band, expected + band, color="#DDDDDD", lw=0)
        axes.bar((np.arange(bins) + 0.5) / bins, counts, 1 / bins, color=colour, ec="white", lw=0.4)
        axes.set_title(shortened(name, 28), fontsize=9)
    figure.supxlabel("rank of the truth among the draws, as a share", fontsize=9)
    figure.suptitle(
        f"{number} simulated data, {calibration.num_draws} draws: {len(rejected)} of "
        f"{len(calibration.names)} quantities rejected", fontsize=11,
    )  # fmt: skip
    return figure


def _shown_quantities(calibration: Calibration) -> list[int]:
    names = calibration.names
    p = np.minimum(*(as_array(each) for each in calibration.p_values))
    others = [q for q, name in enumerate(names) if " " in name]
    coordinates = sorted((q for q in range(len(names)) if q not in others), key=lambda q: p[q])
    return sorted(coordinates[: 16 - len(others)]) + others


def coverage_curves(calibration: Calibration) -> Figure:
    """How often the truth lies in the region of each nominal level, against the diagonal.

    Args:
        calibration: What :func:`pvae.evidence.calibration` found.
    """
    levels = np.linspace(0, 1, 101)
    found = 100 * as_array(calibration.coverage(levels.tolist()))
    figure, axes = single_axes(6.6, 5)
    band = 100 * 2.576 * np.sqrt(levels * (1 - levels) / len(calibration))
    axes.fill_between(100 * levels, 100 * levels - band, 100 * levels + band, color="#DDDDDD", lw=0,
                      label="99 % of calibrated curves, at each level")  # fmt: skip
    axes.axline((0, 0), slope=1, color=GREY, lw=1)
    own = {name for name in calibration.names if " " in name}
    lines = [q for q, name in enumerate(calibration.names) if name not in own]
    for k, q in enumerate(lines):
        label = "latent coordinates, central intervals" if k == 0 else None
        axes.plot(100 * levels, found[:, q], color=COLOURS[0], lw=1, alpha=0.6, label=label)
    for name, colour in (("log q", COLOURS[1]), ("log joint", COLOURS[2])):
        if name in calibration.names:
            q = calibration.names.index(name)
            label = f"densest region by {name}"
            axes.plot(100 * levels, found[:, q], color=colour, lw=2, label=label)
    axes.set(xlabel="nominal level (%)", ylabel="truth inside (%)", xlim=(0, 100), ylim=(0, 100))
    axes.set_title(f"Coverage over {len(calibration)} simulated data", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def predictive_histograms(checks: PredictiveChecks) -> Figure:
    """Each statistic of replicated data, with its value on the data.

    Args:
        checks: What :func:`pvae.evidence.predictive_checks` found.
    """
    names = list(checks.observed)
    rows, columns = rows_and_columns(len(names))
    figure, grid = grid_of_axes(rows, columns, width=3.2 * columns, height=2.8 * rows, bare=False)
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(grid, names, strict=False):
        axes.hist(as_array(checks.replicated[name]), 24, color=COLOURS[5], ec="white", lw=0.4)
        axes.axvline(checks.observed[name], color=COLOURS[1], lw=2)
        axes.set_title(f"{shortened(name, 26)}, p = {checks.p_values[name]:.2g}", fontsize=10)
    figure.supxlabel("replicated data (bars) and the data (line)", fontsize=9)
    return figure
