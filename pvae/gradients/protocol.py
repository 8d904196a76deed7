"""What a gradient estimator is: how particles are drawn, and which surrogate is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from pvae import particles as waist
from pvae.particles import Gate, LatentSite, Layout, Particles, Relaxed

__all__ = ["Beta", "Bound", "Gradient", "Terms"]

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
        relaxed: The model at relaxed draws, for control variates. ``None`` unless asked for.
        sites: Local latent site -> draws, posterior and prior. ``None`` unless asked for.
        weight: Share of each particle in the weights of all K, where only some were kept: the
            terms are theirs, ``(n, B)``. ``None`` otherwise.
    """

    log_joint: Tensor
    log_q: Tensor
    held: Tensor | None
    score: Tensor
    dreams: Tensor | None = None
    relaxed: Relaxed | None = None
    sites: Mapping[str, LatentSite] | None = None
    weight: Tensor | None = None


class Gradient:
    """An estimator; what most of them have in common is written out here.

    Attributes:
        has_path: Whether the guide's draws keep their pathwise derivative.
        tempers: Whether it takes a KL weight other than one.
        weighs: Whether it looks at the weights themselves, beyond the bound's derivative.
        rescores: Whether the guide is weighed a second time with its draws held fixed.
        reruns: Whether the model is run a second time at some of the draws.
    """

    has_path: ClassVar[bool] = True
    tempers: ClassVar[bool] = True
    weighs: ClassVar[bool] = False
    rescores: ClassVar[bool] = False
    reruns: ClassVar[bool] = False

    @property
    def dreams(self) -> bool:
        """Whether the guide learns from what the model draws itself."""
        return False

    @property
    def learns(self) -> bool:
        """Whether it has parameters of its own, see :meth:`start`."""
        return False

    def check(self, bound: Bound, num_particles: int) -> None:
        """Raise ObjectiveError where the estimator is unsound for the bound."""

    def check_pair(self, layout: Layout) -> None:
        """Raise ObjectiveError where it is unsound for the pair."""

    def start(self, sites: Mapping[str, LatentSite]) -> None:
        """Build what the estimator learns by itself, from one look at the pair's sites."""

    def networks(self) -> dict[str, nn.Module]:
        """Those that it has built; the surrogate has their gradient too."""
        return {}

    def draw(
        self, model: Any, guide: Any, batch: Any, num_particles: int, **options: Any
    ) -> Particles:
        """Particles whose graph is cut as the estimator needs it."""
        return waist.draw(model, guide, batch, num_particles, **options)

    def score_sites(self, layout: Layout) -> frozenset[str]:
        """Guide sites whose gradient goes through their density, not through the draws."""
        return frozenset()

    def surrogate(self, bound: Bound, terms: Terms, beta: Beta, gate: Gate | None) -> Tensor:
        """``(B,)``: differentiate this."""
        raise NotImplementedError
