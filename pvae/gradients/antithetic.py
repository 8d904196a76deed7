"""Discrete draws in antithetic pairs: DisARM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from pvae import particles as waist
from pvae.bounds import RenyiBound
from pvae.errors import ObjectiveError
from pvae.gradients.protocol import Beta, Bound, Gradient, Terms
from pvae.gradients.relaxed import check_one_site, leaf_of
from pvae.particles import Gate, Layout, Particles, rewritten

__all__ = ["Disarm", "disarm"]


@dataclass(frozen=True)
class Disarm(Gradient):
    r"""Antithetic Bernoulli draws, the choice of the pair's order integrated out.

    With ``u`` uniform, ``p = sigmoid(a)``, ``b = [u < p]`` and ``b' = [1 - u < p]``, dimension by
    dimension, the gradient in the logits of one guide site is::

        g = (f(b) - f(b')) (b - b') sigmoid(|a|) / 2

    with ``f = log w``: unbiased, of no more variance than ARM, without anything to choose. Half of
    the particles are the others' antithetic draws. Dong, Mnih & Tucker (2020); Yin & Zhou (2019)
    for ARM.
    """

    has_path: ClassVar[bool] = False
    weighs: ClassVar[bool] = True

    def check(self, bound: Bound, num_particles: int) -> None:
        """For the ELBO, whose reward is each particle's own; in pairs."""
        if not (isinstance(bound, RenyiBound) and bound.additive):
            raise ObjectiveError(
                f"disarm holds for bound=elbo, got {bound!r}: use gradient=score_function"
            )
        if num_particles % 2:
            raise ObjectiveError(
                f"disarm draws particles in pairs, got num_particles={num_particles}: use "
                f"{num_particles + 1}"
            )

    def check_pair(self, layout: Layout) -> None:
        """One guide site, Bernoulli."""
        check_one_site(self, layout, ("Bernoulli",))

    def draw(
        self, model: Any, guide: Any, batch: Any, num_particles: int, **options: Any
    ) -> Particles:
        """Draws of which particle k and k + K/2 are antithetic."""
        options = {"detach": True, "sites": True, **options}
        return waist.draw(model, rewritten(guide, _paired), batch, num_particles, **options)

    def score_sites(self, layout: Layout) -> frozenset[str]:
        """The one."""
        return frozenset(layout.event_dims)

    def surrogate(self, bound: Bound, terms: Terms, beta: Beta, gate: Gate | None) -> Tensor:
        """The ELBO, and the logits times their gradient."""
        log_weights = terms.log_joint - beta * terms.log_q
        value = bound(log_weights)
        if terms.sites is None:
            return value
        site = next(iter(terms.sites.values()))
        logits: Tensor = leaf_of(site.posterior).logits
        pairs = len(log_weights) // 2
        rewards = log_weights.detach()
        gain = (rewards[:pairs] - rewards[pairs:]) / 2
        flips = site.value[:pairs] - site.value[pairs:]
        slope = flips * torch.sigmoid(logits[:pairs].detach().abs())
        moved = (slope * logits[:pairs]).reshape(*gain.shape, -1).sum(-1)
        surrogate: Tensor = value + beta * terms.score.mean(0) + (gain * moved).mean(0)
        return surrogate

    def __repr__(self) -> str:
        return "disarm"


class _Antithetic(dist.Bernoulli):  # type: ignore[misc]
    """Bernoulli draws whose second half along the first dimension mirrors the first."""

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Antithetic:
        """The same distribution with a larger batch shape."""
        new = self._get_checked_instance(_Antithetic, _instance)
        expanded: _Antithetic = super().expand(batch_shape, _instance=new)
        return expanded

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Zeros and ones."""
        probs = self.probs.detach().expand(self._extended_shape(sample_shape))
        pairs = len(probs) // 2
        uniform = torch.rand_like(probs[:pairs])
        drawn: Tensor = (torch.cat([uniform, 1 - uniform]) < probs).to(probs.dtype)
        return drawn


def _paired(name: str, distribution: Any) -> Any:
    leaf = leaf_of(distribution)
    paired = _Antithetic(logits=leaf.logits, validate_args=False)
    return paired.to_event(len(distribution.event_shape))


disarm = Disarm()
