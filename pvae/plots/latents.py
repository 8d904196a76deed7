"""Latents of data as points, and what each of their dimensions holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pvae.errors import DataError
from pvae.plots.arrays import Array, as_array, as_matrix, principal_axes
from pvae.plots.figures import COLOURS, MARKERS, legend_beside, shortened, single_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pvae.evidence import Information

__all__ = ["latent_information", "latent_scatter"]


def latent_scatter(z: Tensor, labels: Tensor | None = None) -> Figure:
    """Posterior means or draws of the latents, one point per datum, coloured by label.

    More than two dimensions are projected on their first two principal components, and the axes
    say so; one dimension becomes a histogram per label.

    Args:
        z: ``(N, L)``; further dimensions are flattened.
        labels: ``(N,)`` classes, or numbers (then a colour bar).

    Raises:
        DataError: There is not one label for each datum.
    """
    points = as_matrix(z)
    marks = None if labels is None else as_array(labels).reshape(-1)
    if marks is not None and len(marks) != len(points):
        raise DataError(f"{len(points)} latents need as many labels, got {len(marks)}")
    figure, axes = single_axes(7, 5.4)
    groups = _by_label(marks, len(points))
    if points.shape[1] == 1:
        _histograms(axes, points[:, 0], groups)
        return figure
    flat, names = _plane(points, "z")
    if groups is None:
        scatter = axes.scatter(*flat.T, c=marks, s=12, cmap="viridis", lw=0)
        figure.colorbar(scatter, ax=axes, label="label")
    for k, (label, rows) in enumerate((groups or {}).items()):
        style = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)]}
        axes.scatter(*flat[rows].T, s=16, alpha=0.75, lw=0, label=label, **style)
    axes.set(xlabel=names[0], ylabel=names[1], title=f"Latents of {len(points)} data")
    if groups and len(groups) > 1:
        legend_beside(axes, title="label", markerscale=1.6)
    return figure


def _by_label(marks: Array | None, count: int) -> dict[str, Array] | None:
    """Label -> rows; ``None`` where the labels are numbers rather than classes."""
    if marks is None:
        return {"all": np.arange(count)}
    classes = np.unique(marks)
    if len(classes) > 2 * len(MARKERS):
        return None
    return {f"{label}": np.flatnonzero(marks == label) for label in classes.tolist()}


def _histograms(axes: Any, z: Array, groups: Mapping[str, Array] | None) -> None:
    edges = np.histogram_bin_edges(z, 24)
    for k, (label, rows) in enumerate((groups or {"all": np.arange(len(z))}).items()):
        colour = COLOURS[k % len(COLOURS)]
        axes.hist(z[rows], edges, histtype="step", lw=1.8, color=colour, label=label)
    axes.set(xlabel="z", ylabel="data", title=f"Latents of {len(z)} data")
    if groups and len(groups) > 1:
        legend_beside(axes, title="label")


def _plane(points: Array, letter: str) -> tuple[Array, tuple[str, str]]:
    size = points.shape[1]
    if size == 2:
        return points, (f"{letter}[0]", f"{letter}[1]")
    centre, basis, share = principal_axes(points)
    names = [
        f"principal component {k + 1} of {size} dimensions ({part:.0%} of the variance)"
        for k, part in enumerate(share[:2])
    ]
    return (points - centre) @ basis[:2].T, (names[0], names[1])


def latent_information(information: Information) -> Figure:
    """Mean KL of each latent dimension, largest first: information and aggregate KL stacked.

    Args:
        information: What :func:`pvae.evidence.information` found.
    """
    rows = sorted(information.dimensions, key=lambda each: -each.kl)[:60]
    if not rows:
        raise DataError("no latent site falls into dimensions: there is nothing to draw")
    figure, axes = single_axes(max(7.0, 2.5 + 0.28 * len(rows)), 4.2)
    places = np.arange(len(rows))
    known = np.array([each.kl if each.mutual_information is None else each.mutual_information
                      for each in rows])  # fmt: skip
    rest = np.array([each.marginal_kl or 0.0 for each in rows])
    axes.bar(places, known, 0.75, color=COLOURS[0], label="mutual information")
    axes.bar(places, rest, 0.75, bottom=known, color=COLOURS[4], label="aggregate KL(q(z) || p(z))")
    collapsed = [k for k, each in enumerate(rows) if each.collapsed]
    if collapsed:
        axes.plot(collapsed, np.zeros(len(collapsed)), "v", color=COLOURS[1], ms=7,
                  label="collapsed", clip_on=False, zorder=5)  # fmt: skip
    names = [f"{shortened(each.site, 12)}[{each.index}]" for each in rows]
    axes.set_xticks(places, names, rotation=90 if len(rows) > 8 else 0)
    axes.set(ylabel="nats per datum")
    axes.set_title(
        f"KL of each latent dimension: {information.active_units} of {len(information.dimensions)} "
        "active", fontsize=11,
    )  # fmt: skip
    axes.legend(frameon=False, fontsize=9)
    return figure
