"""Gradient estimators: how a bound is differentiated with respect to the guide.

An estimator says how particles are drawn and which *surrogate* is differentiated; the surrogate's
value is not the bound's, only its gradient is. The gradient with respect to the model is the same
in all of them: ``sum_k dL/dlog w_k * dlog p(x, z_k)``.

With a KL weight beta, ``log w = log p(x|z) + beta (log p(z) - log q(z|x))`` throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pvae import particles as waist
from pvae.bounds import RenyiBound
from pvae.errors import ObjectiveError
from pvae.particles import Gate, Layout, Particles

__all__ = [
    "DoublyReparameterized",
    "Gradient",
    "Pathwise",
    "ScoreFunction",
    "StickTheLanding",
    "Terms",
    "WakeSleep",
    "doubly_reparameterized",
    "guide_held",
    "mixed",
    "pathwise",
    "score_function",
    "sleep_phi",
    "stick_the_landing",
    "wake_phi",
    "wake_sleep_phi",
]

Bound = Callable[[Tensor], Tensor]
Beta = Any  # a number or a scalar tensor


@dataclass(frozen=True)
class Terms:
    """What a surrogate is made of, each ``(K, B)``, nats.

    Attributes:
        log_joint: ``log p(x|z) + beta log p(z)``.
        log_q: ``log q(z|x)``, differentiable through draws and parameters.
        held: ``log q(z|x)`` with the guide's parameters held: differentiable through the draws
            alone. ``None`` unless asked for.
        score: ``log q`` of the sites that have no pathwise derivative here.
        dreams: ``log q(z'|x')`` of what the model drew itself, ``(1, B)``. ``None`` unless asked
            for.
    """

    log_joint: Tensor
    log_q: Tensor
    held: Tensor | None
    score: Tensor
    dreams: Tensor | None = None


class Gradient(Protocol):
    """The interface of an estimator."""

    def check(self, bound: Bound, num_particles: int) -> None:
        """Raise ObjectiveError where the estimator is unsound for the bound."""

    def check_pair(self, layout: Layout) -> None:
        """Raise ObjectiveError where it is unsound for the pair."""

    def draw(
        self, model: Any, guide: Any, batch: Any, num_particles: int, **options: Any
    ) -> Particles:
        """Particles whose graph is cut as the estimator needs it."""

    def score_sites(self, layout: Layout) -> frozenset[str]:
        """Guide sites whose gradient goes through their density, not through the draws."""

    def surrogate(self, bound: Bound, terms: Terms, beta: Beta, gate: Gate | None) -> Tensor:
        """``(B,)``: differentiate this."""


def _refuse_discrete(layout: Layout, name: str) -> None:
    for site, family in layout.score_sites.items():
        raise ObjectiveError(
            f"guide site {site!r} ({family}) has no {name} derivative: use "
            "gradient=pvae.gradients.mixed, or sum it out with pyro.infer.TraceEnum_ELBO()"
        )


@dataclass(frozen=True)
class Pathwise:
    r"""The reparameterisation gradient: ``d/dphi L(log w(z(phi, eps), phi))``.

    Kingma & Welling (2014); Rezende et al. (2014).
    """

    def check(self, bound: Bound, num_particles: int) -> None:
        """Sound for every differentiable bound."""

    def check_pair(self, layout: Layout) -> None:
        """Every guide site must be reparameterised."""
        _refuse_discrete(layout, "pathwise")

    def draw(
        self, model: Any, guide: Any, batch: Any, num_particles: int, **options: Any
    ) -> Particles:
        """Plain reparameterised draws."""
        return waist.draw(model, guide, batch, num_particles, **options)

    def score_sites(self, layout: Layout) -> frozenset[str]:
        """None."""
        return frozenset()

    def surrogate(self, bound: Bound, terms: Terms, beta: Beta, gate: Gate | None) -> Tensor:
        """The bound itself."""
        return bound(terms.log_joint - beta * terms.log_q)

    def __repr__(self) -> str:
        return "pathwise"


@dataclass(frozen=True)
class StickTheLanding:
    r"""The ELBO's path derivative: the score of ``log q``, of mean zero, is left out.

    ``E[ dz/dphi . d/dz (log p(x, z) - log q(z|x)) ]``; zero for every draw where q is the exact
    posterior. Roeder, Wu & Duvenaud (2017).
    """

    def check(self, bound: Bound, num_particles: int) -> None:
        """Unbiased for the ELBO only."""
        if not (isinstance(bound, RenyiBound) and bound.additive):
            raise ObjectiveError(
                f"stick_the_landing is unbiased for bound=elbo only, got {bound!r}: use "
                "gradient=doubly_reparameterized"
            )

    def check_pair(self, layout: Layout) -> None:
        """Every guide site must be reparameterised."""
        _refuse_discrete(layout, "pathwise")

    def draw(
        self, model: Any, guide: Any, batch: Any, num_particles: int, **options: Any
    ) -> Particles:
        """Reparameterised draws, weighed a second time with the draws held fixed."""
        return waist.draw(model, guide, batch, num_particles, score=True, **options)

    def score_sites(self, layout: Layout) -> frozenset[str]:
        """None."""
        return frozenset()

    def surrogate(self, bound: Bound, terms: Terms, beta: Beta, gate: Gate | None) -> Tensor:
        """The bound with the guide's parameters held in ``log q``."""
        return bound(terms.log_joint - beta * _held(terms))

    def __repr__(self) -> str:
        return "stick_the_landing"


@dataclass(frozen=True)
class DoublyReparameterized:
    r"""DReG for the whole Rényi family: the score inside the weights is reparameterised again.

    With ``v_k = dL/dlog w_k``, the guide's gradient is::

        sum_k v_k (1 - beta (1 - alpha)(1 - v_k)) dz_k/dphi . d/dz log w_k

    which is ``sum_k v_k^2 ...`` for the IW-ELBO (Tucker et al. 2019) and stick-the-landing for the
    ELBO. The model's gradient keeps ``v_k``.
    """

    def check(self, bound: Bound, num_particles: int) -> None:
        """Known for the Rényi family."""
        if not isinstance(bound, RenyiBound):
            raise ObjectiveError(
                f"doubly_reparameterized knows elbo, iw_elbo and renyi(alpha), got {bound!r}: use "
                "gradient=pathwise"
            )

    def check_pair(self, layout: Layout) -> None:
        """Every guide site must be reparameterised."""
        _refuse_discrete(layout, "pathwise")

    def draw(
        self, model: Any, guide: Any, batch: Any, num_particles: int, **options: Any
    ) -> Particles:
        """Draws that reach the model through a gate, weighed a second time held fixed."""
        return waist.draw(model, guide, batch, num_particles, score=True, gate=Gate(), **options)

    def score_sites(self, layout: Layout) -> frozenset[str]:
        """None."""
        return frozenset()

    def surrogate(self, bound: Bound, terms: Terms, beta: Beta, gate: Gate | None) -> Tensor:
        """Weighted log densities; the gate rescales what flows from the model into the draws."""
        assert isinstance(bound, RenyiBound)  # noqa: S101  (check() refused the others)
        weights = bound.weights((terms.log_joint - beta * terms.log_q).detach())
        coefficient = 1 - beta * (1 - bound.alpha) * (1 - weights)
        if gate is not None:
            gate.open(coefficient)
        value: Tensor = (weights * (terms.log_joint - beta * coefficient * _held(terms))).sum(0)
        return value

    def __repr__(self) -> str:
        return "doubly_reparameterized"


@dataclass(frozen=True)
class ScoreFunction:
    r"""The score-function (REINFORCE) gradient with a leave-one-out baseline.

    ``sum_k (L - L_{-k}) dlog q(z_k|x)`` plus the explicit derivative of L, where ``L_{-k}`` is the
    bound with ``log w_k`` replaced by the mean of the others: leave-one-out REINFORCE for the
    ELBO (Kool et al. 2019), VIMCO for the IW-ELBO (Mnih & Rezende 2016).

    Attributes:
        sites: ``"all"`` treats every guide site so; ``"discrete"`` only those without a pathwise
            derivative, the others go pathwise.
    """

    sites: str = "all"

    def check(self, bound: Bound, num_particles: int) -> None:
        """Leaving one out takes two."""
        if num_particles < 2:
            raise ObjectiveError(
                f"the score-function gradient leaves one particle out, got num_particles="
                f"{num_particles}: use at least 2"
            )

    def check_pair(self, layout: Layout) -> None:
        """Sound for every pair."""

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
class WakeSleep:
    r"""The model follows the bound; the guide follows the posterior, the other way round.

    With draws ``z_k ~ q`` held fixed and ``w~ = softmax(log w)``, the model's gradient is that of
    the bound as ever; the guide minimises ``KL(p(z|x) || q(z|x))`` instead of raising the bound, so
    its draws need no derivative and a discrete site is as good as any. Its gradient is

    - ``"wake"``: ``sum_k w~_k dlog q(z_k|x)``, on the data; biased by O(1/K), since the weights are
      normalised by themselves (reweighted wake-sleep, Bornschein & Bengio 2015);
    - ``"sleep"``: ``dlog q(z'|x')`` with ``z', x'`` drawn from the model, one for each datum;
      unbiased, but for the model's data (wake-sleep, Hinton, Dayan, Frey & Neal 1995);
    - ``"both"``: the mean of the two;
    - ``"none"``: nothing. With the IW-ELBO as bound that is Monte-Carlo EM (Wei & Tanner 1990): the
      model's gradient is ``sum_k w~_k dlog p(x, z_k)``.

    Parameters that guide and model share get both gradients.
    """

    guide: str = "wake"

    def check(self, bound: Bound, num_particles: int) -> None:
        """Self-normalised weights of one particle are 1, and the guide would learn nothing."""
        if num_particles < 2 and self.guide in ("wake", "both"):
            raise ObjectiveError(
                f"{self!r} compares particles by their weights, got num_particles="
                f"{num_particles}: use at least 2, or gradient=sleep_phi"
            )

    def check_pair(self, layout: Layout) -> None:
        """The guide's density at given latents must be known."""
        own = [n for n in layout.event_dims if n not in (*layout.latents, *layout.globals)]
        if own:
            raise ObjectiveError(
                f"guide site {own[0]!r} is none of the model's, so {self!r} has no posterior for "
                "it to follow: use gradient=pathwise, or a guide without it"
            )

    def draw(
        self, model: Any, guide: Any, batch: Any, num_particles: int, **options: Any
    ) -> Particles:
        """Draws without a path, with the model's own dreams where the guide learns from them."""
        return waist.draw(
            model, guide, batch, num_particles, detach=True, dream=self.dreams, **options
        )

    @property
    def dreams(self) -> bool:
        """Whether the guide learns from what the model draws itself."""
        return self.guide in ("sleep", "both")

    def score_sites(self, layout: Layout) -> frozenset[str]:
        """All guide sites."""
        return frozenset(layout.event_dims)

    def surrogate(self, bound: Bound, terms: Terms, beta: Beta, gate: Gate | None) -> Tensor:
        """The bound for the model, the guide's own log density for the guide."""
        value: Tensor = bound(terms.log_joint - beta * terms.log_q.detach())
        parts = []
        if self.guide in ("wake", "both"):
            weights = torch.softmax((terms.log_joint - terms.log_q).detach(), 0)
            parts.append((weights * terms.score).sum(0))
        if self.dreams:
            assert terms.dreams is not None  # noqa: S101  (draw() asked for them)
            parts.append(terms.dreams.mean(0))
        return value + torch.stack(parts).mean(0) if parts else value

    def __repr__(self) -> str:
        names = {"wake": "wake_phi", "sleep": "sleep_phi", "both": "wake_sleep_phi"}
        return names.get(self.guide, "guide_held")


def _held(terms: Terms) -> Tensor:
    if terms.held is None:
        raise ObjectiveError("this gradient needs particles drawn with score=True")
    return terms.held


def _leave_one_out(bound: Bound, log_weights: Tensor) -> Tensor:
    """The bound with each particle in turn replaced by the mean of the others, ``(K, B)``."""
    num_particles, num_data = log_weights.shape
    others = (log_weights.sum(0) - log_weights) / (num_particles - 1)
    replaced = torch.where(
        torch.eye(num_particles, dtype=torch.bool, device=log_weights.device)[..., None],
        others,
        log_weights[:, None],
    )  # (K, K, B): in column k, particle k is replaced
    return bound(replaced.reshape(num_particles, -1)).reshape(num_particles, num_data)


pathwise = Pathwise()
stick_the_landing = StickTheLanding()
doubly_reparameterized = DoublyReparameterized()
score_function = ScoreFunction()
mixed = ScoreFunction(sites="discrete")
wake_phi = WakeSleep()
sleep_phi = WakeSleep(guide="sleep")
wake_sleep_phi = WakeSleep(guide="both")
guide_held = WakeSleep(guide="none")
