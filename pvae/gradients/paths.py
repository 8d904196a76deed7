"""Estimators that differentiate through the guide's draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from pvae import particles as waist
from pvae.bounds import RenyiBound, SmoothBound, check_bound
from pvae.errors import ObjectiveError
from pvae.gradients.protocol import Beta, Bound, Gradient, Terms
from pvae.particles import Gate, Layout, Particles

__all__ = [
    "DoublyReparameterized",
    "GuideBy",
    "Path",
    "Pathwise",
    "StickTheLanding",
    "doubly_reparameterized",
    "guide_by",
    "pathwise",
    "stick_the_landing",
]


class Path(Gradient):
    """What differentiates through the draws asks that they can be differentiated."""

    def check_pair(self, layout: Layout) -> None:
        """Every guide site must be reparameterised."""
        for site, family in layout.score_sites.items():
            raise ObjectiveError(
                f"guide site {site!r} ({family}) has no pathwise derivative: use "
                "gradient=pvae.gradients.mixed with num_particles=4, say (--objective.gradient "
                "mixed --objective.num_particles 4), or sum it out with "
                "pyro.infer.TraceEnum_ELBO()"
            )


@dataclass(frozen=True)
class Pathwise(Path):
    r"""The reparameterisation gradient: ``d/dphi L(log w(z(phi, eps), phi))``.

    Sound for every differentiable bound. Kingma & Welling (2014); Rezende et al. (2014).
    """

    def surrogate(self, bound: Bound, terms: Terms, beta: Beta, gate: Gate | None) -> Tensor:
        """The bound itself."""
        return bound(terms.log_joint - beta * terms.log_q)

    def __repr__(self) -> str:
        return "pathwise"


@dataclass(frozen=True)
class StickTheLanding(Path):
    r"""The ELBO's path derivative: the score of ``log q``, of mean zero, is left out.

    ``E[ dz/dphi . d/dz (log p(x, z) - log q(z|x)) ]``; zero for every draw where q is the exact
    posterior. Roeder, Wu & Duvenaud (2017).
    """

    rescores: ClassVar[bool] = True

    def check(self, bound: Bound, num_particles: int) -> None:
        """Unbiased for the ELBO only."""
        if not (isinstance(bound, RenyiBound) and bound.additive):
            raise ObjectiveError(
                f"stick_the_landing is unbiased for bound=elbo only, got {bound!r}: use "
                "gradient=doubly_reparameterized"
            )

    def draw(
        self, model: Any, guide: Any, batch: Any, num_particles: int, **options: Any
    ) -> Particles:
        """Reparameterised draws, weighed a second time with the draws held fixed."""
        return waist.draw(model, guide, batch, num_particles, score=True, **options)

    def surrogate(self, bound: Bound, terms: Terms, beta: Beta, gate: Gate | None) -> Tensor:
        """The bound with the guide's parameters held in ``log q``."""
        return bound(terms.log_joint - beta * _held(terms))

    def __repr__(self) -> str:
        return "stick_the_landing"


@dataclass(frozen=True)
class DoublyReparameterized(Path):
    r"""DReG for every bound with known derivative: the score is reparameterised once more.

    With ``v_k = dL/dlog w_k`` and ``e_k = dlog v_k/dlog w_k``, the guide's gradient is::

        sum_k v_k (1 - beta e_k) dz_k/dphi . d/dz log w_k

    For the Rényi family ``e_k = (1 - alpha)(1 - v_k)``: ``sum_k v_k^2 ...`` for the IW-ELBO (Tucker
    et al. 2019) and stick-the-landing for the ELBO. The model's gradient keeps ``v_k``.
    """

    rescores: ClassVar[bool] = True

    def check(self, bound: Bound, num_particles: int) -> None:
        """The bound's derivative must be known twice."""
        if not isinstance(bound, SmoothBound):
            raise ObjectiveError(
                f"doubly_reparameterized knows elbo, iw_elbo, renyi(alpha), miwae(groups) and "
                f"ciwae(weight), got {bound!r}: use gradient=pathwise"
            )

    def draw(
        self, model: Any, guide: Any, batch: Any, num_particles: int, **options: Any
    ) -> Particles:
        """Draws that reach the model through a gate, weighed a second time held fixed."""
        return waist.draw(model, guide, batch, num_particles, score=True, gate=Gate(), **options)

    def surrogate(self, bound: Bound, terms: Terms, beta: Beta, gate: Gate | None) -> Tensor:
        """Weighted log densities; the gate rescales what flows from the model into the draws."""
        assert isinstance(bound, SmoothBound)  # noqa: S101  (check() refused the others)
        log_weights = (terms.log_joint - beta * terms.log_q).detach()
        weights = bound.weights(log_weights)
        coefficient = 1 - beta * bound.elasticity(log_weights)
        if gate is not None:
            gate.open(coefficient)
        value: Tensor = (weights * (terms.log_joint - beta * coefficient * _held(terms))).sum(0)
        return value

    def __repr__(self) -> str:
        return "doubly_reparameterized"


@dataclass(frozen=True)
class GuideBy(Path):
    r"""The model follows the objective's bound, the guide another: both pathwise.

    With ``a_k = dL/dlog w_k`` of the objective's bound and ``v_k`` of the guide's, the gradient is
    ``sum_k a_k dlog p(x, z_k)`` for the model and ``sum_k v_k dz_k/dphi . d/dz log w_k`` plus the
    score for the guide. PIWAE is the IW-ELBO with a guide by MIWAE (Rainforth et al. 2018): a
    guide's signal-to-noise falls with K where a model's rises.

    Attributes:
        bound: What the guide raises.
    """

    bound: Bound

    def check(self, bound: Bound, num_particles: int) -> None:
        """Both derivatives must be known, and the guide's bound fit K."""
        for known in (bound, self.bound):
            if not isinstance(known, SmoothBound):
                raise ObjectiveError(
                    f"{self!r} knows elbo, iw_elbo, renyi(alpha), miwae(groups) and ciwae(weight), "
                    f"got {known!r}: use gradient=pathwise"
                )
        check_bound(self.bound, num_particles)

    def check_pair(self, layout: Layout) -> None:
        """Every guide site must be reparameterised, and local unless both bounds add up."""
        super().check_pair(layout)
        if layout.globals and self.weighs:
            raise ObjectiveError(
                f"site {layout.globals[0]!r} is shared by all data, and {self.bound!r} does not "
                "add up over data: use gradient=pathwise"
            )

    @property
    def weighs(self) -> bool:  # type: ignore[override]
        """The guide's bound is no more linear in log w than the objective's need be."""
        return not (isinstance(self.bound, RenyiBound) and self.bound.additive)

    def draw(
        self, model: Any, guide: Any, batch: Any, num_particles: int, **options: Any
    ) -> Particles:
        """Draws that reach the model through a gate."""
        return waist.draw(model, guide, batch, num_particles, gate=Gate(), **options)

    def surrogate(self, bound: Bound, terms: Terms, beta: Beta, gate: Gate | None) -> Tensor:
        """The model's weights outside the gate, the guide's behind it.

        The gate multiplies by ``v_k / a_k``; ``a_k`` is kept above 1e-20, which rounds away in the
        model's gradient and leaves the guide's product exact.
        """
        assert isinstance(bound, SmoothBound)  # noqa: S101  (check() refused the others)
        assert isinstance(self.bound, SmoothBound)  # noqa: S101
        log_weights = (terms.log_joint - beta * terms.log_q).detach()
        outside = bound.weights(log_weights).clamp(min=1e-20)
        behind = self.bound.weights(log_weights)
        if gate is not None:
            gate.open(behind / outside)
        value: Tensor = (outside * terms.log_joint - beta * behind * terms.log_q).sum(0)
        return value

    def __repr__(self) -> str:
        return f"guide_by({self.bound!r})"


def guide_by(bound: Bound) -> GuideBy:
    """The guide follows ``bound``, whatever bound the model follows."""
    return GuideBy(bound)


def _held(terms: Terms) -> Tensor:
    if terms.held is None:
        raise ObjectiveError("this gradient needs particles drawn with score=True")
    return terms.held


pathwise = Pathwise()
stick_the_landing = StickTheLanding()
doubly_reparameterized = DoublyReparameterized()
