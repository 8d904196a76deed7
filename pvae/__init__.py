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
    "Alternate": "pvae.alternation",
    "Evidence": "pvae.evidence",
    "Objective": "pvae.objectives",
    "Particles": "pvae.particles",
    "PvaeError": "pvae.errors",
    "Run": "pvae.training",
    "adversarial": None,
    "arviz": None,
    "audio": None,
    "baselines": None,
    "beta_vae": "pvae.recipes",
    "bounds": None,
    "compare": "pvae.comparison",
    "data": None,
    "disentanglement": None,
    "distributed": None,
    "doctor": None,
    "draw": "pvae.particles",
    "dreg": "pvae.recipes",
    "evidence": None,
    "fit": "pvae.training",
    "foreign": None,
    "galleries": None,
    "games": None,
    "gradients": None,
    "guides": None,
    "imputation": None,
    "iwae": "pvae.recipes",
    "latent_density": None,
    "latent_paths": None,
    "latents": None,
    "load": "pvae.runs",
    "mcem": "pvae.recipes",
    "models": None,
    "out_of_distribution": None,
    "penalties": None,
    "plots": None,
    "recipes": None,
    "rws": "pvae.recipes",
    "sample_quality": None,
    "schedules": None,
    "sequences": None,
    "stl": "pvae.recipes",
    "trackers": None,
    "vae": "pvae.recipes",
    "wake_sleep": "pvae.recipes",
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
    from pvae import adversarial as adversarial
    from pvae import arviz as arviz
    from pvae import audio as audio
    from pvae import baselines as baselines
    from pvae import bounds as bounds
    from pvae import data as data
    from pvae import disentanglement as disentanglement
    from pvae import distributed as distributed
    from pvae import doctor as doctor
    from pvae import evidence as evidence
    from pvae import foreign as foreign
    from pvae import galleries as galleries
    from pvae import games as games
    from pvae import gradients as gradients
    from pvae import guides as guides
    from pvae import imputation as imputation
    from pvae import latent_density as latent_density
    from pvae import latent_paths as latent_paths
    from pvae import latents as latents
    from pvae import models as models
    from pvae import out_of_distribution as out_of_distribution
    from pvae import penalties as penalties
    from pvae import plots as plots
    from pvae import recipes as recipes
    from pvae import sample_quality as sample_quality
    from pvae import schedules as schedules
    from pvae import sequences as sequences
    from pvae import trackers as trackers
    from pvae.alternation import Alternate as Alternate
    from pvae.comparison import compare as compare
    from pvae.errors import PvaeError as PvaeError
    from pvae.evidence import Evidence as Evidence
    from pvae.objectives import Objective as Objective
    from pvae.particles import Particles as Particles
    from pvae.particles import draw as draw
    from pvae.recipes import beta_vae as beta_vae
    from pvae.recipes import dreg as dreg
    from pvae.recipes import iwae as iwae
    from pvae.recipes import mcem as mcem
    from pvae.recipes import rws as rws
    from pvae.recipes import stl as stl
    from pvae.recipes import vae as vae
    from pvae.recipes import wake_sleep as wake_sleep
    from pvae.runs import load as load
    from pvae.training import Run as Run
    from pvae.training import fit as fit
