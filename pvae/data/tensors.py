"""From any array of numbers to a checked tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pvae.errors import DataError

__all__ = ["all_finite", "locate", "require_binary", "to_tensor"]

_UNKNOWN_TO_TORCH = (np.dtype(np.uint64), np.dtype(np.longdouble))
_WIDENED = {np.dtype(np.uint16): np.int32, np.dtype(np.uint32): np.int64}


def to_tensor(
    array: Any,
    what: str = "x",
    *,
    device: torch.device | str | None = None,
    allow_nan: bool = False,
) -> Tensor:
    """A finite, numeric, non-empty tensor ``(N, ...)`` of the array's own precision.

    Args:
        array: Tensor or numpy array; numpy memory is shared where torch can.
        what: How messages call it.
        device: Where it is put; ``None`` leaves it.
        allow_nan: Let NaN pass, as a missing cell.

    Raises:
        DataError: It is no array of real numbers, has no rows, or holds a NaN or an infinity.
    """
    if isinstance(array, np.ndarray):
        array = _from_numpy(array, what)
    if not isinstance(array, Tensor):
        raise DataError(
            f"{what} is of type {type(array).__name__}, expected a tensor or a numpy array: "
            "convert it first"
        )
    if array.is_complex() or array.layout != torch.strided:
        raise DataError(
            f"{what} is a tensor of {array.dtype} and {array.layout}, expected dense real numbers: "
            "convert it first"
        )
    if array.ndim == 0:
        raise DataError(f"{what} is a single number, expected rows (N, ...): add a dimension")
    if array.numel() == 0:
        lacks = "number in each row" if len(array) else "row"
        raise DataError(f"{what} is empty, shape {tuple(array.shape)}: give at least one {lacks}")
    tensor = array.to(device)
    _require_finite(tensor.masked_fill(tensor.isnan(), 0) if allow_nan else tensor, what)
    return tensor


def _from_numpy(array: np.ndarray[Any, Any], what: str) -> Tensor:
    if array.dtype.kind in "SU":
        raise DataError(f"{what} has dtype {array.dtype}, expected numbers: number its words")
    if array.dtype.kind not in "biuf" or array.dtype in _UNKNOWN_TO_TORCH:
        raise DataError(
            f"{what} has dtype {array.dtype}, expected real numbers of at most 64 bits: "
            "convert it with astype, to float64 or int64 say"
        )
    native = array.dtype.newbyteorder("=")
    array = array.astype(_WIDENED.get(native, native), copy=False)
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def all_finite(x: Tensor) -> bool:
    """Whether no entry is NaN or infinite, without a mask as large as the data."""
    return not x.is_floating_point() or bool(torch.stack(torch.aminmax(x)).isfinite().all())


def _require_finite(tensor: Tensor, what: str) -> None:
    if not all_finite(tensor):
        bad = ~torch.isfinite(tensor)
        value = tensor[bad][0].item()
        raise DataError(
            f"{what}: {locate(bad)} is {value}, expected finite numbers: drop or impute "
            f"such entries ({int(bad.sum())} in all)"
        )


def require_binary(x: Tensor, what: str = "x") -> None:
    """Check that every entry of ``(N, ...)`` is 0 or 1.

    Raises:
        DataError: An entry is neither.
    """
    bad = (x != 0) & (x != 1)
    if bool(bad.any()):
        raise DataError(
            f"{what}: {locate(bad)} is {x[bad][0].item():g}, expected 0 or 1: "
            "load the data with binarize='dynamic', 'fixed' or 'threshold'"
        )


def locate(bad: Tensor) -> str:
    """``"row 3, feature 1"``: the first true entry of ``(N, ...)``, features in row-major order."""
    row, feature = divmod(int(bad.flatten().nonzero()[0]), bad[0].numel())
    return f"row {row}" if bad.ndim == 1 else f"row {row}, feature {feature}"
