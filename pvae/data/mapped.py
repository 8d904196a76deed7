"""Rows of an array that is mapped from a file: read as they are needed, never held whole."""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pvae.data.tensors import to_tensor
from pvae.errors import DataError

__all__ = ["MappedRows", "is_mapped"]

# A page fault brings the pages around it along: 64 KiB of a file for each row, at least.
_AROUND = 2**16
_KEPT = 2**28  # bytes of the file that may stay in this process's memory


def is_mapped(array: Any) -> bool:
    """Whether it is an array mapped from a file."""
    return isinstance(array, np.memmap)


class MappedRows:
    """N rows in a file, where a tensor ``(N, ...)`` would do; a batch is gathered and checked.

    What was read stays in the system's cache, but is taken out of this process's memory before it
    fills it. A map that was opened for changes that are not written (``mmap_mode="c"``) keeps them,
    and so its pages.

    Args:
        array: ``(N, ...)``, mapped from a file.
        what: How messages call it.
        device: Where batches are put.
        allow_nan: Let NaN pass, as a missing cell.

    Raises:
        DataError: It is no array of real numbers, or has no rows.
    """

    def __init__(
        self,
        array: np.memmap[Any, Any],
        what: str = "x",
        *,
        device: torch.device | str | None = None,
        allow_nan: bool = False,
    ) -> None:
        if array.ndim == 0 or array.size == 0:
            raise DataError(
                f"{what} has shape {array.shape}, expected rows (N, ...): give at least one"
            )
        self.array, self.what, self.allow_nan = array, what, allow_nan
        self.device = torch.device("cpu" if device is None else device)
        self.shape, self.held = torch.Size(array.shape), 0
        self.dtype = self._read(np.arange(1)).dtype

    def __len__(self) -> int:
        return len(self.array)

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """The rows ``index`` ``(B,)`` as a tensor on the device.

        Raises:
            DataError: One of them holds a NaN or an infinity, or cannot be read.
        """
        rows = self._read(index.cpu().numpy())
        return rows.to(self.device, non_blocking=True)

    def outline(self) -> Tensor:
        """A few rows by which the data are known again: the first, the last, 254 between."""
        return self._read(np.unique(np.linspace(0, len(self) - 1, 256).astype(np.int64)))

    def _read(self, index: np.ndarray[Any, Any]) -> Tensor:
        rows = np.empty((len(index), *self.array.shape[1:]), self.array.dtype)
        each = rows[0].nbytes + _AROUND
        order = np.argsort(index)  # through the file from front to back
        for places in np.array_split(order, math.ceil(len(index) * each / _KEPT)):
            rows[places] = self.array[index[places]]
            self._forget(len(places) * each)
        if rows.dtype.kind == "f":
            bad = np.isinf(rows) if self.allow_nan else ~np.isfinite(rows)
            if bad.any():
                first = int(bad.reshape(len(rows), -1).any(1).argmax())
                raise DataError(
                    f"{self.what}: row {index[first]} holds {rows[first][bad[first]][0]}, expected "
                    "finite numbers: drop or impute such rows"
                )
        return to_tensor(rows, self.what, allow_nan=self.allow_nan)

    def _forget(self, read: int) -> None:
        """Give back what was read, once it is much."""
        self.held += read
        if self.held < _KEPT:
            return
        self.held = 0
        mapped: Any = self.array
        while mapped is not None and not isinstance(mapped, mmap.mmap):
            mapped = getattr(mapped, "base", None)
        if mapped is not None and self.array.mode != "c" and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)
