"""Rows of an array that is mapped from a file: read as they are needed, never held whole."""

from __future__ import annotations

import functools
import math
import mmap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pvae.allocation import give_back
from pvae.data.tensors import to_tensor
from pvae.errors import DataError

__all__ = ["MappedRows", "Moments", "is_mapped"]

Prepare = Callable[[Tensor, Tensor], Tensor]
"""Rows as they are in the file, ``(B, ...)``, and their numbers -> those that are used."""

# A page fault brings the pages around it along: 64 KiB of a file for each row, at least.
_AROUND = 2**16
_KEPT = 2**28  # bytes of the file that may stay in this process's memory
_BLOCK = 2**24  # bytes read at once where all rows are looked at


@dataclass(frozen=True)
class Moments:
    """Of each feature, in float64.

    Attributes:
        mean: Its mean.
        std: Its standard deviation, of the population.
        low: Its smallest value.
        high: Its largest.
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, blocks: Iterable[Tensor]) -> Moments:
        """Of rows that come in blocks ``(B, ...)``, merged as Chan, Golub & LeVeque (1983) do."""
        count = 0
        mean = squares = low = high = torch.zeros(())
        for block in blocks:
            x, rows = block.double(), len(block)
            own = x.mean(0)
            own_squares = (x - own).square().sum(0)
            if count:
                moved = own - mean
                squares = squares + own_squares + moved.square() * (count * rows / (count + rows))
                mean = mean + moved * (rows / (count + rows))
                low, high = torch.minimum(low, x.amin(0)), torch.maximum(high, x.amax(0))
            else:
                mean, squares, low, high = own, own_squares, x.amin(0), x.amax(0)
            count += rows
        return cls(mean, (squares / count).sqrt(), low, high)


def is_mapped(array: Any) -> bool:
    """Whether it is an array mapped from a file."""
    return isinstance(array, np.memmap)


class MappedRows:
    """N rows in a file, where a tensor ``(N, ...)`` would do; a batch is gathered and checked.

    What was read stays in the system's cache, but is taken out of this process's memory before it
    fills it. A map that was opened for changes that are not written (``mmap_mode="c"``) keeps them,
    and so its pages.

    Args:
        array: ``(M, ...)``, mapped from a file.
        what: How messages call it.
        device: Where batches are put.
        allow_nan: Let NaN pass, as a missing cell.
        order: ``(N,)`` the rows of the file that these are; all of them if ``None``.
        prepare: What is made of rows as they are read.

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
        order: Tensor | None = None,
        prepare: Prepare | None = None,
    ) -> None:
        if array.ndim == 0 or array.size == 0:
            raise DataError(
                f"{what} has shape {array.shape}, expected rows (N, ...): give at least one"
            )
        self.array, self.what, self.allow_nan = array, what, allow_nan
        self.order, self.prepare = order, prepare
        self.device, self.held = torch.device("cpu" if device is None else device), 0
        first = self._take(torch.zeros(1, dtype=torch.int64))
        self.dtype, self.shape = first.dtype, torch.Size([len(self), *first.shape[1:]])

    def __len__(self) -> int:
        return len(self.array if self.order is None else self.order)

    def __getitem__(self, rows: slice) -> Tensor:
        """Some rows in a row, as a tensor."""
        return self.index_select(0, torch.arange(len(self))[rows])

    def numel(self) -> int:
        """Numbers in all rows."""
        return self.shape.numel()

    def to(self, device: torch.device | str | None) -> MappedRows:
        """The same rows, whose batches are put on ``device``."""
        return self if device is None else self.like(device=torch.device(device))

    def part(self, start: int, stop: int) -> MappedRows:
        """The rows from ``start`` to ``stop``, still in the file."""
        order = torch.arange(len(self)) if self.order is None else self.order
        shifted = self.prepare
        if self.prepare is not None and start:
            before = self.prepare
            shifted = lambda x, numbers: before(x, numbers + start)  # noqa: E731
        return self.like(order=order[start:stop], prepare=shifted)

    def then(self, change: Callable[[Tensor], Tensor]) -> MappedRows:
        """The same rows with a further change."""
        before = self.prepare
        return self.like(prepare=lambda x, rows: change(x if before is None else before(x, rows)))

    def like(self, **changes: Any) -> MappedRows:
        """The same rows with other arguments."""
        names = ("what", "device", "allow_nan", "order", "prepare")
        return MappedRows(self.array, **({name: getattr(self, name) for name in names} | changes))

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """The rows ``index`` ``(B,)`` as a tensor on the device.

        Raises:
            DataError: One of them holds a NaN or an infinity, or cannot be read.
        """
        return self._take(index.cpu()).to(self.device, non_blocking=True)

    def blocks(self) -> Iterator[Tensor]:
        """All rows in order, some at a time."""
        for start in range(0, len(self), self._block):
            yield self[start : start + self._block]

    @property
    def _block(self) -> int:
        return max(1, _BLOCK // max(1, int(self.array[0].nbytes)))

    @functools.cached_property
    def moments(self) -> Moments:
        """Of each feature over all rows, read once from the front of the file to its end."""
        rows = torch.arange(len(self)) if self.order is None else self.order.argsort()
        return Moments.of(self._take(each) for each in torch.split(rows, self._block))

    def outline(self) -> Tensor:
        """A few rows by which the data are known again: the first, the last, 254 between."""
        chosen = np.unique(np.linspace(0, len(self) - 1, 256).astype(np.int64))
        return self._take(torch.from_numpy(chosen))

    def _take(self, index: Tensor) -> Tensor:
        rows = self._read((index if self.order is None else self.order[index]).numpy())
        return rows if self.prepare is None else self.prepare(rows, index)

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
        give_back()
        mapped: Any = self.array
        while mapped is not None and not isinstance(mapped, mmap.mmap):
            mapped = getattr(mapped, "base", None)
        if mapped is not None and self.array.mode != "c" and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)
