"""Data beside samples, and above reconstructions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from pvae.errors import DataError
from pvae.plots.arrays import Array, as_matrix
from pvae.plots.figures import grid_of_axes, rows_and_columns, shortened
from pvae.plots.images import aspect_ratio, grey_range, show_images
from pvae.plots.tables import tables_beside, tables_reconstructed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["reconstructions", "samples_beside_data"]


def samples_beside_data(
    samples: Mapping[str, Tensor], data: Tensor, image_shape: Sequence[int] | None = None
) -> Figure:
    """Data beside samples of each model.

    Images are laid out as square mosaics. Tables (``image_shape`` is ``None``) become quantiles of
    each feature, and scatters of the first two principal components of the data.

    Args:
        samples: Name -> samples ``(S, D)``.
        data: Data ``(N, D)``.
        image_shape: ``(H, W)``, ``(C, H, W)`` or ``(H, W, C)``.

    Raises:
        DataError: Widths disagree, or do not make up images of that shape.
    """
    sources = {"data": as_matrix(data), **{name: as_matrix(x) for name, x in samples.items()}}
    _check_widths(sources)
    if image_shape is None:
        return tables_beside(sources)
    side = min(8, *(math.isqrt(len(x)) for x in sources.values()))
    rows, columns = rows_and_columns(len(sources))
    figure, grid = grid_of_axes(rows, columns, width=2.7 * columns, height=2.95 * rows)
    low, high = grey_range(sources["data"])
    for axes, (name, x) in zip(grid, sources.items(), strict=False):
        show_images(axes, x[: side**2], image_shape, side, low, high)
        axes.set_title(shortened(name, 26), fontsize=10)
    return figure


def reconstructions(
    data: Tensor, reconstructed: Mapping[str, Tensor], image_shape: Sequence[int] | None = None
) -> Figure:
    """Data above their reconstructions, one row per model; for tables value against value.

    Args:
        data: Data ``(N, D)``.
        reconstructed: Name -> ``(N, D)``, row n the reconstruction of datum n.
        image_shape: ``(H, W)``, ``(C, H, W)`` or ``(H, W, C)``; ``None`` for tables.

    Raises:
        DataError: Widths disagree, or do not make up images of that shape.
    """
    sources = {"data": as_matrix(data), **{name: as_matrix(x) for name, x in reconstructed.items()}}
    _check_widths(sources)
    if image_shape is None:
        return tables_reconstructed(sources)
    count = min(12, *(len(x) for x in sources.values()))
    height = 9.8 * aspect_ratio(image_shape) / count + 0.28
    figure, grid = grid_of_axes(len(sources), 1, width=10, height=height * len(sources))
    low, high = grey_range(sources["data"])
    for axes, (name, x) in zip(grid, sources.items(), strict=False):
        show_images(axes, x[:count], image_shape, count, low, high)
        axes.set_title(shortened(name, 60), loc="left", fontsize=10, pad=3)
    return figure


def _check_widths(sources: Mapping[str, Array]) -> None:
    expected = sources["data"].shape[1]
    for name, x in sources.items():
        if x.shape[1] != expected:
            raise DataError(f"the data have {expected} features but {name!r} has {x.shape[1]}")
        if len(x) == 0:
            raise DataError(f"{name!r} is empty: pass at least one row")
