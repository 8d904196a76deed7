"""Numbers of a picture: tensors as arrays, and their principal components."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Array", "as_array", "as_matrix", "or_zero", "principal_axes"]

Array = NDArray[Any]


def as_array(values: Any) -> Array:
    """A tensor (or a list of numbers) as an array."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def as_matrix(values: Any) -> Array:
    """Rows of numbers, ``(N, D)`` floats; further dimensions are flattened."""
    numbers = as_array(values).astype(float)
    return numbers.reshape(len(numbers), math.prod(numbers.shape[1:]))


def or_zero(value: float) -> float:
    """The value, or zero where it is not finite."""
    return value if math.isfinite(value) else 0.0


def principal_axes(points: Array) -> tuple[Array, Array, Array]:
    """Centre ``(D,)``, principal axes, two at least, and the share of variance along each."""
    centre = points.mean(0)
    spread = points - centre if len(points) > 1 else np.zeros((2, points.shape[1]))
    _, singular, axes = np.linalg.svd(spread, full_matrices=False)
    share = singular**2 / max(float((singular**2).sum()), 1e-300)
    return centre, axes, share
