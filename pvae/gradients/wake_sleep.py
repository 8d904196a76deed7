"""Estimators that let the guide follow the posterior instead of raising the bound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pvae import particles as waist
from pvae.errors import ObjectiveError
from pvae.gradients.protocol import Beta, Bound, Gradient, Terms
from pvae.particles import Gate, Layout, Particles

__all__ = ["WakeSleep", "chi_phi", "guide_held", "sleep_phi", "wake_phi", "wake_sleep_phi"]


@dataclass(frozen=True)
class WakeSleep(Gradient):
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

    Attributes:
        guide: What the guide learns from.
        power: n, for weights ``softmax(n log w)`` in the wake phase: the guide then descends the
            chi bound CUBO_n instead of the inclusive KL (Dieng et al. 2017, at n = 2).
    """

    guide: str = "wake"
    power: float = 1.0
    has_path: ClassVar[bool] = False
    tempers: ClassVar[bool] = False
    weighs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.power < math.inf:
            raise ObjectiveError(f"chi_phi takes a finite order above 0, got {self.power}: try 2")

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
            log_weights = (terms.log_joint - terms.log_q).detach()
            weights = torch.softmax(self.power * log_weights, 0)
            parts.append((weights * terms.score).sum(0))
        if self.dreams:
            assert terms.dreams is not None  # noqa: S101  (draw() asked for them)
            parts.append(terms.dreams.mean(0))
        return value + torch.stack(parts).mean(0) if parts else value

    def __repr__(self) -> str:
        if self.power != 1:
            return f"chi_phi({self.power:g})"
        names = {"wake": "wake_phi", "sleep": "sleep_phi", "both": "wake_sleep_phi"}
        return names.get(self.guide, "guide_held")


def chi_phi(n: float = 2.0) -> WakeSleep:
    """The guide descends the chi upper bound of order n (CHIVI, Dieng et al. 2017)."""
    return WakeSleep(power=float(n))


wake_phi = WakeSleep()
sleep_phi = WakeSleep(guide="sleep")
wake_sleep_phi = WakeSleep(guide="both")
guide_held = WakeSleep(guide="none")
