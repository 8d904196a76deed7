"""Recipes: the objectives of the literature, one line each over :class:`pvae.Objective`.

Every function here that returns an Objective is an objective of the command line, its arguments the
options.
"""

from __future__ import annotations

from typing import Any

from pvae import bounds, gradients
from pvae.bounds import iw_elbo, renyi
from pvae.errors import ObjectiveError
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
from pvae.kl_terms import Balanced, Capacity
from pvae.objectives import Objective
from pvae.penalties import Decomposition, DensityRatio, Discrepancy, FreeDimensions, Moments
from pvae.schedules import Linear, Schedule

__all__ = [
    "balanced_vae",
    "beta_tcvae",
    "beta_vae",
    "capacity_vae",
    "chivi",
    "ciwae",
    "dip_vae",
    "disarm",
    "dreg",
    "factor_vae",
    "free_bits_vae",
    "info_vae",
    "iwae",
    "mcem",
    "miwae",
    "piwae",
    "renyi_vae",
    "rebar",
    "relax",
    "resampled_iwae",
    "rws",
    "stl",
    "tvo",
    "vae",
    "vimco",
    "wae",
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


def resampled_iwae(
    kept: int = 1,
    doubly: bool = True,  # noqa: FBT001, FBT002
    num_particles: int = 50,
    **options: Any,
) -> Objective:
    """The IW-ELBO differentiated at ``kept`` particles, by their weights (Burda et al. 2016).

    K forward passes of the model and ``kept`` backward ones; unbiased.

    Args:
        kept: Particles of each datum that are differentiated.
        doubly: Whether the guide's gradient is that of ``dreg``, else the noisier of ``iwae``.
        num_particles: K.
        options: Further arguments of :class:`pvae.Objective`.
    """
    gradient = gradients.resampled(kept, doubly=doubly)
    return Objective(bound=iw_elbo, gradient=gradient, num_particles=num_particles, **options)


def vimco(num_particles: int = 50, **options: Any) -> Objective:
    """The IW-ELBO with the leave-one-out score-function gradient (Mnih & Rezende 2016)."""
    return Objective(bound=iw_elbo, gradient=score_function, num_particles=num_particles, **options)


def rebar(
    temperature: float = 0.5,
    strength: float = 1.0,
    learned: bool = False,  # noqa: FBT001, FBT002
    num_particles: int = 1,
    **options: Any,
) -> Objective:
    """The ELBO of a discrete site, its relaxation as control variate (Tucker et al. 2017)."""
    gradient = gradients.rebar(temperature, strength, learned=learned)
    return Objective(gradient=gradient, num_particles=num_particles, **options)


def relax(
    temperature: float = 0.5,
    strength: float = 1.0,
    hidden: tuple[int, ...] = (32, 32),
    num_particles: int = 1,
    **options: Any,
) -> Objective:
    """The ELBO of a discrete site with a control variate that learns (Grathwohl et al. 2018)."""
    gradient = gradients.relax(temperature, strength, hidden)
    return Objective(gradient=gradient, num_particles=num_particles, **options)


def disarm(num_particles: int = 2, **options: Any) -> Objective:
    """The ELBO of a Bernoulli site by antithetic pairs of draws (Dong et al. 2020)."""
    return Objective(gradient=gradients.disarm, num_particles=num_particles, **options)


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


def beta_tcvae(
    beta: float = 6.0,
    alpha: float = 1.0,
    gamma: float = 1.0,
    estimator: str = "mss",
    num_particles: int = 1,
    **options: Any,
) -> Objective:
    """The KL's mutual information, total correlation and rest weighed apart (Chen et al. 2018).

    Args:
        beta: Weight of the total correlation.
        alpha: Weight of the mutual information.
        gamma: Weight of the dimension-wise KL.
        estimator: Of the aggregated posterior: ``"mss"`` or ``"mws"``.
        num_particles: K.
        options: Further arguments of :class:`pvae.Objective`.
    """
    if callable(beta):
        raise ObjectiveError(
            f"beta_tcvae weighs the total correlation by a number, got beta={beta!r}: anneal the "
            "KL with pvae.Objective(beta=..., penalty=pvae.penalties.total_correlation(weight))"
        )
    penalty = Decomposition(beta - 1, alpha - 1, gamma - 1, estimator)
    return Objective(num_particles=num_particles, penalty=penalty, **options)


def factor_vae(gamma: float = 10.0, num_particles: int = 1, **options: Any) -> Objective:
    """The ELBO less ``gamma`` times a total correlation by discriminator (Kim & Mnih 2018)."""
    return Objective(num_particles=num_particles, penalty=DensityRatio(gamma), **options)


def dip_vae(
    off_diagonal: float = 10.0,
    diagonal: float = 10.0,
    kind: str = "ii",
    num_particles: int = 1,
    **options: Any,
) -> Objective:
    """The ELBO with the aggregated posterior's covariance held at one (Kumar et al. 2018)."""
    penalty = Moments(off_diagonal, diagonal, kind)
    return Objective(num_particles=num_particles, penalty=penalty, **options)


def info_vae(
    alpha: float = 0.0,
    weight: float = 10.0,
    kernel: str = "imq",
    num_particles: int = 1,
    **options: Any,
) -> Objective:
    """InfoVAE: ``1 - alpha`` times the KL, ``alpha + weight - 1`` times an MMD (Zhao et al. 2019).

    At ``alpha = 1`` the KL is gone (MMD-VAE).
    """
    if not (alpha <= 1 and alpha + weight >= 1):
        raise ObjectiveError(
            f"info_vae takes alpha <= 1 and alpha + weight >= 1, got alpha={alpha}, "
            f"weight={weight}: try alpha=0, weight=10"
        )
    penalty = Discrepancy(alpha + weight - 1, kernel)
    return Objective(beta=1 - alpha, num_particles=num_particles, penalty=penalty, **options)


def wae(
    weight: float = 10.0, kernel: str = "imq", num_particles: int = 1, **options: Any
) -> Objective:
    """The reconstruction less ``weight`` times an MMD, no KL: WAE-MMD (Tolstikhin et al. 2018)."""
    penalty = Discrepancy(weight, kernel)
    return Objective(beta=0.0, num_particles=num_particles, penalty=penalty, **options)


def capacity_vae(
    gamma: float = 1000.0,
    capacity: float = 25.0,
    steps: int = 100_000,
    num_particles: int = 1,
    **options: Any,
) -> Objective:
    """The KL held at a value that grows to ``capacity`` nats (Burgess et al. 2018)."""
    term = Capacity(gamma, Linear(steps, 0.0, capacity))
    return Objective(num_particles=num_particles, kl_term=term, **options)


def free_bits_vae(nats: float = 0.1, num_particles: int = 1, **options: Any) -> Objective:
    """The ELBO with ``nats`` free in every latent dimension (Kingma et al. 2016)."""
    options = {"analytic_kl": True, **options}
    return Objective(num_particles=num_particles, penalty=FreeDimensions(nats), **options)


def balanced_vae(steps: int = 10_000, num_particles: int = 1, **options: Any) -> Objective:
    """The ELBO warmed up over ``steps``, each site's KL weighed by itself (Vahdat & Kautz 2020)."""
    options = {"beta": Linear(steps), **options}
    return Objective(num_particles=num_particles, kl_term=Balanced(), **options)
