"""A batch as its programs get it, and which of its tensors a model observes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from pvae.errors import ProgramError
from pvae.particles.types import Batch

__all__ = ["arguments", "entries_of", "leading_size", "observed_keys", "tensors_of", "with_entries"]


def arguments(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as positional and keyword arguments of a program."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def entries_of(batch: Batch) -> list[tuple[Any, Any]]:
    """The arguments of a batch by position or keyword."""
    args, kwargs = arguments(batch)
    return [*enumerate(args), *kwargs.items()]


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """All tensors in a batch, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        yield from tensors_of(list(batch.values()))
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from tensors_of(value)


def leading_size(batch: Batch) -> int:
    """Rows of the first tensor in a batch."""
    for value in tensors_of(batch):
        if value.dim() > 0:
            return value.shape[0]
    raise ProgramError("a batch must hold at least one tensor with a row for each datum")


def observed_keys(observed: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
    """Observed site -> key of the batch's tensor that it observes, for those that observe one."""
    entries = entries_of(batch)
    found: dict[str, Any] = {}
    for name, node in observed.items():
        for key, entry in entries:
            if name not in found and _is_same(node["value"], entry):
                found[name] = key
    return found


def _is_same(value: Any, entry: Any) -> bool:
    """Whether a site's value is an entry of the batch, or a view of it of another shape."""
    if not (isinstance(value, Tensor) and isinstance(entry, Tensor)):
        return False
    return value is entry or (
        value.data_ptr() == entry.data_ptr()
        and value.numel() == entry.numel()
        and value.dtype == entry.dtype
        and value.is_contiguous()
        and entry.is_contiguous()
    )


def with_entries(batch: Batch, made: Mapping[Any, Tensor]) -> Batch:
    """The batch with other tensors at the keys of ``made``, in the form and dtype of the old."""

    def entry(key: Any, old: Any) -> Any:
        return made[key].reshape(old.shape).to(old.dtype) if key in made else old

    if isinstance(batch, Mapping):
        return {key: entry(key, old) for key, old in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(entry(key, old) for key, old in enumerate(batch))
    return entry(0, batch)
