"""Variational autoencoders as Pyro programs, judged by their held-out log-likelihood.

A model and a guide are Pyro functions that name the same latent sites. Everything pvae computes
about such a pair is a function of its log importance weights, of shape ``(K, B)``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that defines it (None: the name is a submodule itself). Resolved on
# first use, so that `import pvae` and `pvae --help` cost no import of torch.
_HOME = {
    "Evidence": "pvae.evidence",
    "Objective": "pvae.objectives",
    "Particles": "pvae.particles",
    "PvaeError": "pvae.errors",
    "Run": "pvae.training",
    "baselines": None,
    "beta_vae": "pvae.objectives",
    "bounds": None,
    "compare": "pvae.comparison",
    "data": None,
    "draw": "pvae.particles",
    "dreg": "pvae.objectives",
    "evidence": None,
    "fit": "pvae.training",
    "gradients": None,
    "guides": None,
    "iwae": "pvae.objectives",
    "load": "pvae.runs",
    "models": None,
    "plots": None,
    "schedules": None,
    "stl": "pvae.objectives",
    "vae": "pvae.objectives",
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pvae' has no attribute {name!r}")
    home = _HOME[name]
    if home is None:
        return importlib.import_module(f"pvae.{name}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from pvae import baselines, bounds, data, evidence, gradients, guides, models, plots, schedules
    from pvae.comparison import compare
    from pvae.errors import PvaeError
    from pvae.evidence import Evidence
    from pvae.objectives import Objective, beta_vae, dreg, iwae, stl, vae
    from pvae.particles import Particles, draw
    from pvae.runs import load
    from pvae.training import Run, fit
