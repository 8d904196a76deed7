"""Optimisers by name, class or instance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pvae.errors import OptionError, did_you_mean

__all__ = ["build_optimizer"]


def build_optimizer(
    optimizer: str | type[torch.optim.Optimizer] | torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    *,
    lr: float,
    options: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """One optimiser over all parameters, fused where torch has it so.

    Args:
        optimizer: A name from ``torch.optim`` in small letters (adam, adamw, sgd, rmsprop, …), a
            class, or an instance, which is taken as it is.
        parameters: What it updates.
        lr: Learning rate.
        options: Further arguments of its constructor (``{"momentum": 0.9}``).

    Raises:
        OptionError: there is none of that name, or it does not take the options.
    """
    is_made = isinstance(optimizer, torch.optim.Optimizer)
    kind: Any = type(optimizer) if is_made else optimizer
    if not isinstance(kind, type):
        kind = _optimizer_class(optimizer)
    if issubclass(kind, (torch.optim.LBFGS, torch.optim.SparseAdam)):
        raise OptionError(
            f"{kind.__name__} needs a closure or sparse gradients, which these steps have not: use "
            "optimizer='adam' or its kin"
        )
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    if not 0 < lr < math.inf:
        raise OptionError(f"lr must be positive and finite, got {lr}")
    given = dict(options or {})
    try:
        if "fused" in kind.__init__.__code__.co_varnames and not {"fused", "foreach"} & set(given):
            given = {"fused": True, **given}
        built: torch.optim.Optimizer = kind(parameters, lr=lr, **given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"{kind.__name__} refused its options {given}: {error}") from error
    return built


def _optimizer_class(name: Any) -> Any:
    if not isinstance(name, str):
        raise OptionError(
            f"optimizer takes a name in torch.optim, a class or an instance of it, got {name!r}: "
            "try 'adam'"
        )
    known = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and key != "Optimizer"
    }
    unfit = {"lbfgs", "sparseadam", "muon"}  # a closure, sparse gradients, matrices only
    known = {key: value for key, value in known.items() if key not in unfit}
    if name.lower() not in known:
        raise OptionError(f"no optimizer is called {name!r}: {did_you_mean(name, known)}")
    return known[name.lower()]
