"""Which operation made the first NaN or infinity."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

__all__ = ["first_operation"]

_UNFILLED = ("empty", "new_empty", "resize")  # what is in their memory says nothing
_FOREIGN = ("torch", "pyro")


def first_operation(work: Callable[[], Any]) -> str | None:
    """Run ``work`` and name the operation that made the first NaN, or else the first infinity.

    It is one whose tensors were all finite and whose result is not: ``"log (mine.py, line 12)"``,
    the place that called it where that is known (backward passes are called by torch). A value that
    comes with the data is made by none.

    Args:
        work: What computes it; its own random numbers have to be seeded.

    Returns:
        The operation in words; ``None`` if there is none.
    """
    watch = _Watch()
    with watch:
        work()
    return watch.nan or watch.infinity


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at what goes into each operation and what comes out of it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nan: str | None = None
        self.infinity: str | None = None

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.nan is not None:
            return func(*args, **(kwargs or {}))
        healthy = all(bool(torch.isfinite(each).all()) for each in _real((args, kwargs)))
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.strip("_")
        if healthy and not name.startswith(_UNFILLED):
            found = _real(made)
            if any(bool(each.isnan().any()) for each in found):
                self.nan = _at(name)
            if self.infinity is None and any(bool(each.isinf().any()) for each in found):
                self.infinity = _at(name)
        return made


def _real(values: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(values)
    return [t.detach() for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def _at(name: str) -> str:
    """The operation, with the line of a model, a guide or a user's file that called it."""
    for frame in reversed(traceback.extract_stack(limit=60)[:-2]):
        path = Path(frame.filename)
        if path == _HERE or set(_FOREIGN) & set(path.parts):
            continue
        if path.is_relative_to(_HERE.parent) and path.parent.name not in ("models", "guides"):
            return name
        return f"{name} ({path.name}, line {frame.lineno})"
    return name


_HERE = Path(__file__)
