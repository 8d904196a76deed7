"""What a model expects of its latent sites, for guides that choose a family by it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pyro import poutine

from pvae.errors import ProgramError

__all__ = ["site_priors"]


def site_priors(model: Any, sites: Iterable[str]) -> dict[str, Any]:
    """Site -> its distribution in one run of ``model(size=1)``, batch shape ``(1,)`` or ``()``.

    Args:
        model: A model that generates by itself.
        sites: Names of its latent sites.

    Raises:
        ProgramError: it does not generate so, or has no such site.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), poutine.block():
            trace = poutine.trace(model).get_trace(size=1)
        return {name: trace.nodes[name]["fn"] for name in sites}
    except Exception as error:
        raise ProgramError(
            f"model(size=1) does not show the supports of its latent sites "
            f"({type(error).__name__}: {error}): let the model generate so, or use another guide"
        ) from error
