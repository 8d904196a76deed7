"""Recipes: the objectives of the literature, one line each over :class:`pvae.Objective`.

Every function here that returns an Objective is an objective of the command line, its arguments the
options.
"""

from __future__ import annotations

from typing import Any

from pvae import bounds
from pvae.bounds import iw_elbo, renyi
from pvae.gradients import (
    Gradient,
    chi_phi,
    covariance,
    doubly_reparameterized,
    guide_by,
    guide_held,
    score_function,
    sleep_phi,
    stick_the_landing,
    wake_phi,
)
from pvae.objectives import Objective
from pvae.schedules import Schedule

__all__ = [
    "beta_vae",
    "chivi",
    "ciwae",
    "dreg",
    "iwae",
    "mcem",
    "miwae",
    "piwae",
    "renyi_vae",
    "rws",
    "stl",
    "tvo",
    "vae",
    "vimco",
    "wake_sleep",
]


def vae(num_particles: int = 1, **options: Any) -> Objective:
    """The ELBO with the pathwise gradient (Kingma & Welling 2014)."""
    return Objective(num_particles=num_particles, **options)


def beta_vae(beta: float | Schedule = 4.0, num_particles: int = 1, **options: Any) -> Objective:
    """The ELBO with its KL weighted by ``beta`` (Higgins et al. 2017)."""
    return Objective(beta=beta, num_particles=num_particles, **options)


def iwae(num_particles: int = 50, **options: Any) -> Objective:
    """The importance-weighted ELBO with the pathwise gradient (Burda et al. 2016)."""
    return Objective(bound=iw_elbo, num_particles=num_particles, **options)


def dreg(num_particles: int = 50, **options: Any) -> Objective:
    """The IW-ELBO with the doubly reparameterised gradient (Tucker et al. 2019)."""
    return Objective(
        bound=iw_elbo, gradient=doubly_reparameterized, num_particles=num_particles, **options
    )


def vimco(num_particles: int = 50, **options: Any) -> Objective:
    """The IW-ELBO with the leave-one-out score-function gradient (Mnih & Rezende 2016)."""
    return Objective(bound=iw_elbo, gradient=score_function, num_particles=num_particles, **options)


def renyi_vae(alpha: float = 0.5, num_particles: int = 50, **options: Any) -> Objective:
    """The Rényi bound of order ``alpha`` with the pathwise gradient (Li & Turner 2016)."""
    return Objective(bound=renyi(alpha), num_particles=num_particles, **options)


def miwae(groups: int = 5, num_particles: int = 50, **options: Any) -> Objective:
    """The mean of ``groups`` IW-ELBOs of equal size (Rainforth et al. 2018)."""
    return Objective(bound=bounds.miwae(groups), num_particles=num_particles, **options)


def piwae(groups: int = 5, num_particles: int = 50, **options: Any) -> Objective:
    """The IW-ELBO for the model, MIWAE for the guide (Rainforth et al. 2018)."""
    gradient = guide_by(bounds.miwae(groups))
    return Objective(bound=iw_elbo, gradient=gradient, num_particles=num_particles, **options)


def ciwae(weight: float = 0.5, num_particles: int = 50, **options: Any) -> Objective:
    """``weight`` times the ELBO, the rest the IW-ELBO (Rainforth et al. 2018)."""
    return Objective(bound=bounds.ciwae(weight), num_particles=num_particles, **options)


def tvo(
    num_particles: int = 50, partitions: int = 5, start: float = 0.025, **options: Any
) -> Objective:
    """The thermodynamic lower bound with the covariance gradient (Masrani et al. 2019)."""
    bound = bounds.tvo(partitions, start)
    return Objective(bound=bound, gradient=covariance, num_particles=num_particles, **options)


def chivi(n: float = 2.0, num_particles: int = 10, **options: Any) -> Objective:
    """The IW-ELBO for the model, the chi bound of order n for the guide (Dieng et al. 2017)."""
    return Objective(bound=iw_elbo, gradient=chi_phi(n), num_particles=num_particles, **options)


def stl(num_particles: int = 1, **options: Any) -> Objective:
    """The ELBO with the stick-the-landing gradient (Roeder et al. 2017)."""
    return Objective(gradient=stick_the_landing, num_particles=num_particles, **options)


def wake_sleep(num_particles: int = 1, **options: Any) -> Objective:
    """Wake-sleep: the model by the ELBO, the guide on dreams (Hinton et al. 1995)."""
    return Objective(gradient=sleep_phi, num_particles=num_particles, **options)


def rws(num_particles: int = 10, gradient: Gradient = wake_phi, **options: Any) -> Objective:
    """Reweighted wake-sleep: IW-ELBO, guide by its weights (Bornschein & Bengio 2015)."""
    return Objective(bound=iw_elbo, gradient=gradient, num_particles=num_particles, **options)


def mcem(num_particles: int = 10, gradient: Gradient = guide_held, **options: Any) -> Objective:
    """Monte-Carlo EM: the model on weighed draws of a guide that is held (Wei & Tanner 1990)."""
    return Objective(bound=iw_elbo, gradient=gradient, num_particles=num_particles, **options)
