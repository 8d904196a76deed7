"""Mixed precision: linear and convolution layers in bfloat16, everything else as it is.

Densities, their parameters and every reduction over particles, sites or data keep the precision
of the data: only the products inside the layers are rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pvae.errors import OptionError, did_you_mean

__all__ = ["PRECISIONS", "precision_context"]

PRECISIONS = ("bfloat16", "full")

_LAYERS: set[Any] = {
    functional.linear,
    *(getattr(torch, f"{name}{d}d") for name in ("conv", "conv_transpose") for d in (1, 2, 3)),
}


class _LayersInBfloat16(TorchFunctionMode):
    """Runs each layer on bfloat16 copies of its tensors and gives its output back as it was."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func not in _LAYERS or next(iter([*args, *kwargs.values()])).dtype != torch.float32:
            return func(*args, **kwargs)
        output = func(*map(_rounded, args), **{k: _rounded(v) for k, v in kwargs.items()})
        return output.float()


def _rounded(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) else value


def precision_context(name: str) -> Any:
    """A context in which layers run in the precision ``name``: ``"full"`` or ``"bfloat16"``.

    Raises:
        OptionError: there is none of that name.
    """
    if name not in PRECISIONS:
        raise OptionError(f"no precision is called {name!r}: {did_you_mean(name, PRECISIONS)}")
    return nullcontext() if name == "full" else _LayersInBfloat16()
