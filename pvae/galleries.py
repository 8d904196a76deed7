"""Pictures of what a trained pair makes: each function returns a matplotlib ``Figure``.

Images are shown as images; tables, which have no image shape, as curves or as a map of numbers.
Reconstructions, samples and latents of several models side by side are in :mod:`pvae.plots`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pvae.errors import DataError
from pvae.latent_paths import Traversal
from pvae.out_of_distribution import Detection
from pvae.plots.arrays import as_array, as_matrix
from pvae.plots.figures import (
    COLOURS,
    empty_figure,
    grid_of_axes,
    polish,
    rows_and_columns,
    shortened,
)
from pvae.plots.images import as_images, aspect_ratio, grey_range, mosaic, show_images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["importances", "interpolations", "pairs", "sample_grid", "scores", "tiles", "traversals"]

_MAX_ROWS = 12  # of a picture, before its cells become unreadable
_WIDTH = 9.0  # inches


def sample_grid(
    samples: Tensor, image_shape: Sequence[int], *, columns: int | None = None, title: str = ""
) -> Figure:
    """Samples as one mosaic, as near a square as they make.

    Args:
        samples: ``(N, D)``, on the scale of the data.
        image_shape: ``(H, W)``, ``(C, H, W)`` or ``(H, W, C)``.
        columns: Images in a row.
        title: Above the picture.

    Raises:
        DataError: There are none, or they do not make up images of that shape.
    """
    x = _some(samples)
    across = math.ceil(math.sqrt(len(x))) if columns is None else columns
    down = math.ceil(len(x) / across)
    size = min(_WIDTH, 0.75 * across)
    figure, (axes,) = grid_of_axes(
        1, 1, width=size, height=size * aspect_ratio(image_shape) * down / across + 0.3
    )
    show_images(axes, x, image_shape, across, *grey_range(x))
    axes.set_title(shortened(title, 70), fontsize=10)
    return figure


def pairs(
    data: Tensor, reconstructed: Tensor, image_shape: Sequence[int], *, columns: int = 6
) -> Figure:
    """Originals, each with its reconstruction on its right.

    Args:
        data: ``(N, D)``.
        reconstructed: ``(N, D)``, row n that of datum n.
        image_shape: ``(H, W)``, ``(C, H, W)`` or ``(H, W, C)``.
        columns: Pairs in a row.

    Raises:
        DataError: They are not of equally many data, or do not make up images of that shape.
    """
    x, y = _some(data), _some(reconstructed)
    if x.shape != y.shape:
        raise DataError(f"a reconstruction of each datum is needed, got {y.shape} for {x.shape}")
    low, high = grey_range(x)
    figure = empty_figure(_WIDTH, 1.0)
    grid = figure.subplots(1, columns, squeeze=False)[0]
    down = math.ceil(len(x) / columns)
    for k, axes in enumerate(grid):
        axes.set_axis_off()
        rows = np.arange(k, len(x), columns)
        if not len(rows):
            continue
        both = np.stack([x[rows], y[rows]], 1).reshape(-1, x.shape[1])
        blank = np.full((2 * (down - len(rows)), x.shape[1]), np.nan)
        show_images(axes, np.concatenate([both, blank]), image_shape, 2, low, high)
    height = 0.88 * _WIDTH / columns / 2 * aspect_ratio(image_shape) * down
    figure.set_size_inches(_WIDTH, height + 0.4)
    engine: Any = figure.get_layout_engine()
    engine.set(wspace=0.12)  # pairs stand apart
    figure.suptitle("data (left of each pair) and reconstructions (right)", fontsize=10)
    return figure


def interpolations(decoded: Tensor, image_shape: Sequence[int] | None = None) -> Figure:
    """Paths between pairs of data, one per row: from the first step on the left to the last.

    A table's path is a map of numbers, its features in rows and the steps in columns.

    Args:
        decoded: ``(T, N, D)``, as :func:`pvae.latent_paths.interpolate` gives a site.
        image_shape: ``(H, W)``, ``(C, H, W)`` or ``(H, W, C)``; ``None`` for tables.

    Raises:
        DataError: Not of that shape.
    """
    x = _steps(decoded)
    steps, count = x.shape[0], min(x.shape[1], _MAX_ROWS)
    if image_shape is None:
        return _table_paths(x[:, :count])
    flat = np.moveaxis(x[:, :count], 0, 1).reshape(count * steps, -1)
    height = _WIDTH * aspect_ratio(image_shape) * count / steps + 0.3
    figure, (axes,) = grid_of_axes(1, 1, width=_WIDTH, height=height)
    show_images(axes, flat, image_shape, steps, *grey_range(flat))
    axes.set_title("from one reconstruction (left) to another (right)", fontsize=10)
    return figure


def _table_paths(x: Any) -> Figure:
    steps, count = x.shape[:2]
    rows, columns = rows_and_columns(count)
    figure, grid = grid_of_axes(
        rows, columns, width=2.4 * columns, height=2.6 * rows + 0.4, bare=False
    )
    low, high = grey_range(x)
    for k, axes in enumerate(grid[:count]):
        axes.grid(visible=False)
        shown = axes.imshow(x[:, k].T, aspect="auto", vmin=low, vmax=high, cmap="viridis")
        axes.set(xticks=[0, steps - 1], xticklabels=["start", "end"], title=f"path {k + 1}")
    for axes in grid[count:]:
        axes.set_axis_off()
    grid[0].set_ylabel("feature")
    figure.colorbar(shown, ax=grid, label="mean")
    return figure


def traversals(
    traversal: Traversal, site: str, image_shape: Sequence[int] | None = None, *, datum: int = 0
) -> Figure:
    """One row for each latent dimension: the datum as the dimension moves over its prior.

    Rows are ordered by how much they change the data; at most 12 are shown. For tables, a map of
    what each dimension adds to each feature, from its lowest quantile to its highest.

    Args:
        traversal: As :func:`pvae.latent_paths.traverse` gives it.
        site: The observed site.
        image_shape: ``(H, W)``, ``(C, H, W)`` or ``(H, W, C)``; ``None`` for tables.
        datum: Which of the N data.

    Raises:
        DataError: There is no such site or datum, or it does not make up images of that shape.
    """
    if site not in traversal.decoded:
        raise DataError(f"no observed site is called {site!r}: {', '.join(traversal.decoded)}")
    values = as_array(traversal.decoded[site]).astype(float)
    if not 0 <= datum < values.shape[2]:
        raise DataError(f"the traversal is of {values.shape[2]} data, got datum {datum}")
    x = values[:, :, datum].reshape(*values.shape[:2], -1)  # (L, T, D)
    effect = np.square(x - x.mean(1, keepdims=True)).mean((1, 2)) ** 0.5
    order = np.argsort(-effect)[:_MAX_ROWS]
    names = [f"{name}[{index}]" for name, index in traversal.dimensions]
    if image_shape is None:
        return _table_effects(x[order], [names[k] for k in order])
    steps, count = x.shape[1], len(order)
    flat = x[order].reshape(count * steps, -1)
    height = (_WIDTH - 1) * aspect_ratio(image_shape) * count / steps + 0.6
    figure, (axes,) = grid_of_axes(1, 1, width=_WIDTH, height=height)
    height, width = show_images(axes, flat, image_shape, steps, *grey_range(flat))
    pitch = height / count, width / steps
    axes.set_yticks([(k + 0.5) * pitch[0] for k in range(count)], [names[k] for k in order])
    ends = (0, steps // 2, steps - 1)
    quantiles = [f"{100 * float(traversal.quantiles[k]):.3g} %" for k in ends]
    axes.set_xticks([(k + 0.5) * pitch[1] for k in ends], quantiles)
    axes.tick_params(length=0, labelsize=9)
    axes.set_title("quantile of the prior, one latent dimension at a time", fontsize=10)
    return figure


def _table_effects(x: Any, names: Sequence[str]) -> Figure:
    change = x[:, -1] - x[:, 0]
    figure = empty_figure(_WIDTH, 1.4 + 0.32 * len(names))
    axes = figure.subplots()
    most = max(float(np.abs(change).max()), 1e-12)
    shown = axes.imshow(change, aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="feature", title="change of the mean from the lowest quantile to the highest")
    figure.colorbar(shown, ax=axes)
    return figure


def scores(detections: Mapping[str, Detection]) -> Figure:
    """Histograms of each score of data from inside and outside, with its AUROC ± SE.

    The range leaves out the most extreme hundredth of each set, which would hide the rest.

    Args:
        detections: As :func:`pvae.out_of_distribution.detect` gives them.

    Raises:
        DataError: There is none.
    """
    if not detections:
        raise DataError("there is no score to draw: pass what detect returned")
    rows, columns = rows_and_columns(len(detections))
    figure, grid = grid_of_axes(rows, columns, width=4.2 * columns, height=3.2 * rows, bare=False)
    for axes, (name, found) in zip(grid, detections.items(), strict=False):
        sets = {"inside": as_array(found.inside), "outside": as_array(found.outside)}
        low = min(float(np.quantile(x, 0.005)) for x in sets.values())
        high = max(float(np.quantile(x, 0.995)) for x in sets.values())
        edges = np.linspace(low, high if high > low else low + 1, 41)
        for (label, x), colour in zip(sets.items(), COLOURS, strict=False):
            shares = np.full(len(x), 1 / len(x))
            kept = np.clip(x, edges[0], edges[-1])
            axes.hist(kept, edges, weights=shares, color=colour, alpha=0.55, label=label)
        axes.set(xlabel=f"score by {shortened(name)} (nats)", ylabel="share of the data")
        axes.set_title(f"AUROC {found.auroc.value:.3f} ± {found.auroc.stderr:.3f}", fontsize=10)
        axes.legend(frameon=False, fontsize=9)
    for axes in grid[len(detections) :]:
        axes.set_axis_off()
    return figure


def tiles(
    rows: Tensor, image_shape: Sequence[int], *, columns: int, scale: tuple[float, float]
) -> Tensor:
    """Images as one picture ``(H, W)`` or ``(3, H, W)`` in [0, 1], thin white lines between.

    Args:
        rows: ``(N, D)``.
        image_shape: ``(H, W)``, ``(C, H, W)`` or ``(H, W, C)``.
        columns: Images in a row.
        scale: The values that become 0 and 1.

    Raises:
        DataError: There are none, or they do not make up images of that shape.
    """
    low, high = scale
    both = mosaic(as_images(_some(rows), image_shape), columns)
    grey = np.nan_to_num(np.clip((both - low) / max(high - low, 1e-12), 0, 1), nan=1.0)
    picture = torch.from_numpy(grey).float()
    return picture if picture.dim() == 2 else picture.movedim(-1, 0)


def importances(importance: Any, factors: Sequence[str]) -> Figure:
    """How much each latent dimension serves to predict each factor: a map ``(L, K)``.

    Args:
        importance: As :func:`pvae.disentanglement.dci` gives it.
        factors: Names of the K factors.

    Raises:
        DataError: There is not one name for each factor.
    """
    table = as_matrix(importance)
    if table.shape[1] != len(factors):
        raise DataError(
            f"importance of {table.shape[1]} factors needs as many names, got {factors}"
        )
    figure = empty_figure(1.8 + 0.75 * len(factors), 1.3 + 0.3 * len(table))
    axes = figure.subplots()
    polish(axes)
    axes.grid(visible=False)
    shown = axes.imshow(table, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(factors)), [shortened(name, 12) for name in factors], fontsize=9)
    axes.set_yticks(range(len(table)))
    axes.set(ylabel="latent dimension")
    figure.colorbar(shown, ax=axes, label="importance")
    return figure


def _some(values: Tensor) -> Any:
    found = as_matrix(values)
    if len(found) == 0:
        raise DataError("there is nothing to draw: pass at least one row")
    return found


def _steps(decoded: Tensor) -> Any:
    found = as_array(decoded).astype(float)
    if found.ndim < 3 or found.size == 0:
        raise DataError(
            f"paths are (steps, data, features), got {tuple(found.shape)}: pass one observed site "
            "of interpolate()"
        )
    return found.reshape(*found.shape[:2], -1)
