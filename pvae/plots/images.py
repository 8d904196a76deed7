"""Rows as images, side by side in one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pvae.errors import DataError
from pvae.plots.arrays import Array

__all__ = ["as_images", "aspect_ratio", "grey_range", "show_images"]


def as_images(x: Array, shape: Sequence[int]) -> Array:
    """``(n, D)`` to ``(n, H, W)`` or ``(n, H, W, 3)``; the frames of a video side by side."""
    if len(shape) == 4 and math.prod(shape) == x.shape[1]:
        frames, channels, height, width = shape
        x = np.moveaxis(x.reshape(-1, *shape), 1, 3).reshape(len(x), -1)
        shape = (channels, height, frames * width)
    if math.prod(shape) != x.shape[1] or len(shape) not in (2, 3):
        raise DataError(f"{x.shape[1]} features do not make up an image of shape {tuple(shape)}")
    images = x.reshape(len(x), *shape)
    if len(shape) == 3 and shape[0] in (1, 3):
        images = np.moveaxis(images, 1, -1)
    if images.ndim == 4 and images.shape[-1] not in (1, 3):
        raise DataError(f"images have 1 or 3 channels, got shape {tuple(shape)}")
    return images[..., 0] if images.ndim == 4 and images.shape[-1] == 1 else images


def aspect_ratio(shape: Sequence[int]) -> float:
    """Height over width of an image as :func:`as_images` lays it out."""
    if len(shape) == 4:
        return shape[2] / (shape[0] * shape[3])
    sizes = shape[-2:] if len(shape) == 2 or shape[0] in (1, 3) else shape[:2]
    return sizes[0] / sizes[1]


def mosaic(images: Array, columns: int) -> Array:
    """``(n, H, W[, 3])`` to one picture, thin gaps (NaN) between."""
    count, height, width = images.shape[:3]
    gap = max(1, round(min(height, width) / 14))
    rows = math.ceil(count / columns)
    size = (rows * (height + gap) - gap, columns * (width + gap) - gap)
    picture = np.full((*size, *images.shape[3:]), np.nan)
    for k, image in enumerate(images):
        top, left = (k // columns) * (height + gap), (k % columns) * (width + gap)
        picture[top : top + height, left : left + width] = image
    return picture


def grey_range(data: Array) -> tuple[float, float]:
    """The values drawn black and white, all but the outermost half per cent within."""
    low, high = (float(q) for q in np.quantile(data, (0.005, 0.995)))
    return (low, high) if high > low else (float(data.min()), float(data.max()) + 1e-9)


def show_images(
    axes: Any, x: Array, shape: Sequence[int], columns: int, low: float, high: float
) -> tuple[int, int]:
    """Draw rows ``(n, D)`` as images, so many side by side, black at ``low`` and white at ``high``.

    Returns:
        Height and width of the whole picture, in pixels.
    """
    picture = mosaic(as_images(x, shape), columns)
    height, width = picture.shape[:2]
    if picture.ndim == 3:
        picture = np.nan_to_num(np.clip((picture - low) / (high - low), 0, 1), nan=1.0)
    axes.imshow(picture, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    axes.set_axis_on()
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return height, width
