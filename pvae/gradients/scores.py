"""Estimators that differentiate the guide's density at its draws: score functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pvae import particles as waist
from pvae.bounds import RenyiBound, ThermodynamicBound
from pvae.errors import ObjectiveError
from pvae.gradients.protocol import Beta, Bound, Gradient, Terms
from pvae.particles import Gate, Layout, Particles

__all__ = ["Covariance", "ScoreFunction", "covariance", "mixed", "score_function"]


@dataclass(frozen=True)
class ScoreFunction(Gradient):
    r"""The score-function (REINFORCE) gradient with a leave-one-out baseline.

    ``sum_k (L - L_{-k}) dlog q(z_k|x)`` plus the explicit derivative of L, where ``L_{-k}`` is the
    bound with ``log w_k`` replaced by the mean of the others: leave-one-out REINFORCE for the
    ELBO (Kool et al. 2019), VIMCO for the IW-ELBO (Mnih & Rezende 2016).

    Attributes:
        sites: ``"all"`` treats every guide site so; ``"discrete"`` only those without a pathwise
            derivative, the others go pathwise.
    """

    sites: str = "all"
    has_path: ClassVar[bool] = False

    def check(self, bound: Bound, num_particles: int) -> None:
        """Leaving one out takes two."""
        if num_particles < 2:
            raise ObjectiveError(
                f"the score-function gradient leaves one particle out, got num_particles="
                f"{num_particles}: use at least 2"
            )

    def draw(
        self, model: Any, guide: Any, batch: Any, num_particles: int, **options: Any
    ) -> Particles:
        """Draws without a path, or with one where a site has it."""
        detach = self.sites == "all"
        return waist.draw(model, guide, batch, num_particles, detach=detach, **options)

    def score_sites(self, layout: Layout) -> frozenset[str]:
        """All guide sites, or the discrete ones."""
        return frozenset(layout.event_dims if self.sites == "all" else layout.score_sites)

    def surrogate(self, bound: Bound, terms: Terms, beta: Beta, gate: Gate | None) -> Tensor:
        """The bound, plus each particle's reward times its log density.

        ``beta log q / K``, whose gradient has mean zero, is added: for the ELBO it cancels the
        explicit derivative of ``-log q`` and its noise.
        """
        log_weights = terms.log_joint - beta * terms.log_q
        value = bound(log_weights)
        reward = value.detach() - _leave_one_out(bound, log_weights.detach())
        surrogate: Tensor = value + beta * terms.score.mean(0) + (reward * terms.score).sum(0)
        return surrogate

    def __repr__(self) -> str:
        return "score_function" if self.sites == "all" else "mixed"


@dataclass(frozen=True)
class Covariance(Gradient):
    r"""The TVO's covariance gradient, which needs no derivative of the draws.

    With ``pi_b`` the density proportional to ``q w^b``, at every exponent b of the bound::

        d E_pi[log w] = E_pi[d log w] + Cov_pi[log w, d log q + b d log w]

    Both moments are taken over the K particles with self-normalised weights ``softmax(b log w)``,
    so it is biased by O(1/K), as the bound's own value is. Masrani, Le & Wood (2019).
    """

    has_path: ClassVar[bool] = False

    def check(self, bound: Bound, num_particles: int) -> None:
        """For the TVO; a covariance takes two particles."""
        if not isinstance(bound, ThermodynamicBound):
            raise ObjectiveError(
                f"covariance follows bound=tvo(...) only, got {bound!r}: use "
                "gradient=score_function"
            )
        if num_particles < 2:
            raise ObjectiveError(
                f"covariance compares particles with each other, got num_particles="
                f"{num_particles}: use at least 2"
            )

    def draw(
        self, model: Any, guide: Any, batch: Any, num_particles: int, **options: Any
    ) -> Particles:
        """Draws without a path."""
        return waist.draw(model, guide, batch, num_particles, detach=True, **options)

    def score_sites(self, layout: Layout) -> frozenset[str]:
        """All guide sites."""
        return frozenset(layout.event_dims)

    def surrogate(self, bound: Bound, terms: Terms, beta: Beta, gate: Gate | None) -> Tensor:
        """Its gradient is the covariance formula, summed over the partition.

        At ``b = 0`` the score's own mean, which is zero, is left out.
        """
        assert isinstance(bound, ThermodynamicBound)  # noqa: S101  (check() refused the others)
        log_weights = terms.log_joint - beta * terms.log_q
        value: Any = 0.0
        for exponent, width in bound.points:
            weights = torch.softmax(exponent * log_weights.detach(), 0)
            centred = log_weights.detach()
            centred = centred - (weights * centred).sum(0)
            moved = log_weights if exponent else terms.log_joint
            tilted = terms.log_q + exponent * log_weights
            value = value + width * (weights * (moved + centred * tilted)).sum(0)
        return value  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return "covariance"


def _leave_one_out(bound: Bound, log_weights: Tensor) -> Tensor:
    """The bound with each particle in turn replaced by the mean of the others, ``(K, B)``."""
    num_particles, num_data = log_weights.shape
    others = _of_others(log_weights, torch.cumsum, torch.add, 0.0) / (num_particles - 1)
    if isinstance(bound, RenyiBound):  # in O(K)
        if bound.additive:
            return bound(log_weights) + (others - log_weights) / num_particles
        order = 1 - bound.alpha
        rest = _of_others(order * log_weights, torch.logcumsumexp, torch.logaddexp, -math.inf)
        return (torch.logaddexp(rest, order * others) - math.log(num_particles)) / order
    replaced = torch.where(
        torch.eye(num_particles, dtype=torch.bool, device=log_weights.device)[..., None],
        others,
        log_weights[:, None],
    )  # (K, K, B): in column k, particle k is replaced
    return bound(replaced.reshape(num_particles, -1)).reshape(num_particles, num_data)


def _of_others(
    values: Tensor,
    scan: Callable[..., Tensor],
    join: Callable[[Tensor, Tensor], Tensor],
    nothing: float,
) -> Tensor:
    """A sum over all particles but one, each in turn: ``(K, B)``; nothing is taken off a total."""
    end = torch.full_like(values[:1], nothing)
    before = torch.cat([end, scan(values, 0)[:-1]])
    after = torch.cat([scan(values.flip(0), 0).flip(0)[1:], end])
    return join(before, after)


score_function = ScoreFunction()
mixed = ScoreFunction(sites="discrete")
covariance = Covariance()
