"""Gradient estimators: how a bound is differentiated with respect to the guide.

An estimator says how particles are drawn and which *surrogate* is differentiated; the surrogate's
value is not the bound's, only its gradient is. The gradient with respect to the model is the same
in nearly all of them: ``sum_k dL/dlog w_k * dlog p(x, z_k)``.

With a KL weight beta, ``log w = log p(x|z) + beta (log p(z) - log q(z|x))`` throughout.
"""

from __future__ import annotations

from pvae.gradients.antithetic import Disarm, disarm
from pvae.gradients.paths import (
    DoublyReparameterized,
    GuideBy,
    Pathwise,
    StickTheLanding,
    doubly_reparameterized,
    guide_by,
    pathwise,
    stick_the_landing,
)
from pvae.gradients.protocol import Gradient, Terms
from pvae.gradients.relaxed import Rebar, Relax, rebar, relax
from pvae.gradients.resampling import Resampled, resampled
from pvae.gradients.scores import (
    Covariance,
    ScoreFunction,
    covariance,
    mixed,
    score_function,
)
from pvae.gradients.wake_sleep import (
    WakeSleep,
    chi_phi,
    guide_held,
    sleep_phi,
    wake_phi,
    wake_sleep_phi,
)

__all__ = [
    "Covariance",
    "Disarm",
    "DoublyReparameterized",
    "Gradient",
    "GuideBy",
    "Pathwise",
    "Rebar",
    "Relax",
    "Resampled",
    "ScoreFunction",
    "StickTheLanding",
    "Terms",
    "WakeSleep",
    "chi_phi",
    "covariance",
    "disarm",
    "doubly_reparameterized",
    "guide_by",
    "guide_held",
    "mixed",
    "pathwise",
    "rebar",
    "relax",
    "resampled",
    "score_function",
    "sleep_phi",
    "stick_the_landing",
    "wake_phi",
    "wake_sleep_phi",
]
