"""Batches: a tensor, or a tuple or dict of tensors, whose first dimension indexes the data.

All data may also be rows mapped from a file, of which batches are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pvae.data.dataset import Dataset, Split
from pvae.data.mapped import MappedRows, is_mapped
from pvae.data.tensors import to_tensor
from pvae.errors import DataError

__all__ = ["Batch", "as_batch", "is_streamed", "num_rows", "share", "take"]

Batch = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


def as_batch(
    data: Any,
    *,
    device: torch.device | str | None = None,
    model: Any = None,
    streams: bool = False,
) -> Batch:
    """Check data and put them on the device, in the structure they came in.

    Precision and integer types stay what they are.

    Args:
        data: Tensor or numpy array ``(N, ...)``, a tuple, list or dict of them, a :class:`Split`
            (its ``x``) or a :class:`Dataset` (its ``train.x``).
        device: Where the tensors are put; ``None`` leaves them.
        model: The model they are for; where its ``takes_missing`` is true, NaN is a missing cell.
        streams: Leave arrays that are mapped from a file (``numpy.memmap``) where they are, as
            :class:`pvae.data.mapped.MappedRows`, whose rows are checked as they are taken.

    Returns:
        A tensor, a tuple of tensors or a dict of tensors.

    Raises:
        DataError: Something in it is not finite, not numeric, empty, or of another length.
    """
    if isinstance(data, Dataset):
        data = data.train
    if isinstance(data, Split):
        data = data.x
    options: dict[str, Any] = {
        "device": device,
        "allow_nan": bool(getattr(model, "takes_missing", False)),
    }

    def check(array: Any, what: str = "x") -> Any:
        if isinstance(array, MappedRows):
            array = array if streams else array[:]
            return array.to(device)
        kind: Any = MappedRows if streams and is_mapped(array) else to_tensor
        return kind(array, what, **options)

    if isinstance(data, Mapping):
        parts = {str(k): check(v, f"x[{k!r}]") for k, v in data.items()}
        _require_equal_rows({repr(key): part for key, part in parts.items()})
        return parts
    if isinstance(data, (tuple, list)):
        items = tuple(check(v, f"x[{i}]") for i, v in enumerate(data))
        _require_equal_rows({str(i): item for i, item in enumerate(items)})
        return items
    checked: Batch = check(data)
    return checked


def _require_equal_rows(parts: Mapping[str, Tensor]) -> None:
    if not parts:
        raise DataError("x holds no tensors, expected at least one: give the data")
    first, *others = parts
    for key in others:
        if len(parts[key]) != len(parts[first]):
            raise DataError(
                f"x[{key}] has {len(parts[key])} rows but x[{first}] has {len(parts[first])}, "
                "expected one row per datum in each: align them"
            )


def num_rows(batch: Batch) -> int:
    """Number of data N."""
    return len(_tensors(batch)[0])


def take(batch: Batch, index: Tensor) -> Batch:
    """The rows ``index`` ``(B,)`` of every tensor, in the same structure."""
    if isinstance(batch, (Tensor, MappedRows)):
        return batch.index_select(0, index)
    if isinstance(batch, Mapping):
        return {key: part.index_select(0, index) for key, part in batch.items()}
    return tuple(part.index_select(0, index) for part in batch)


def _tensors(batch: Batch) -> tuple[Tensor, ...]:
    if isinstance(batch, (Tensor, MappedRows)):
        return (batch,)
    return tuple(batch.values()) if isinstance(batch, Mapping) else batch


def share(batch: Batch, start: int, stop: int) -> Any:
    """The rows from ``start`` to ``stop`` of every tensor; those mapped from a file stay there."""
    return torch.utils._pytree.tree_map(
        lambda rows: rows.part(start, stop) if isinstance(rows, MappedRows) else rows[start:stop],
        batch,
    )


def is_streamed(batch: Batch) -> bool:
    """Whether some of its rows stay in a file."""
    return any(isinstance(rows, MappedRows) for rows in _tensors(batch))
