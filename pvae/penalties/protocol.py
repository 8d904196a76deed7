"""What a penalty is, and what all of them ask of a latent site."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pvae.errors import ObjectiveError, OptionError
from pvae.particles import LatentSite, Layout

__all__ = ["Penalty", "factorises", "flat", "not_negative"]


class Penalty:
    """The interface of a penalty; it looks at one latent site, drawn inside the data plate.

    Attributes:
        uses_posterior: Whether it needs ``q(z|x)`` itself, beside draws from it.
    """

    uses_posterior: ClassVar[bool] = True

    def check(self, sites: Mapping[str, LatentSite], layout: Layout) -> None:
        """Raise ObjectiveError where it is unsound for the pair, from one look at its sites."""
        if len(sites) != 1:
            raise ObjectiveError(
                f"{self!r} looks at one latent site of each datum, and the model has "
                f"{len(sites)} ({', '.join(map(repr, sites)) or 'all data share theirs'}): use "
                "beta= or kl_term= for a KL of several sites"
            )
        name, site = next(iter(sites.items()))
        if len(site.posterior.batch_shape) != 2:
            raise ObjectiveError(
                f"{self!r} takes a latent site that is one event of each datum, and {name!r} lies "
                "in a plate of its own: add .to_event(n) for it"
            )
        others = [n for n in layout.event_dims if n != name]
        if others and self.uses_posterior:
            raise ObjectiveError(
                f"{self!r} needs q({name} | x), and the guide draws {others[0]!r} beside it, over "
                "which it would have to be integrated: use penalty=pvae.penalties.mmd(...), which "
                "needs draws alone"
            )
        self.check_site(name, site)

    def check_site(self, name: str, site: LatentSite) -> None:
        """Raise ObjectiveError where it is unsound for the one site."""

    def start(self, sites: Mapping[str, LatentSite]) -> None:
        """Build what the penalty learns by itself."""

    def networks(self) -> dict[str, nn.Module]:
        """Those that it has built, trained by its own loss."""
        return {}

    def __call__(self, sites: Mapping[str, LatentSite], beta: Any, num_data: float) -> Tensor:
        """``()`` nats per datum, to be added to the loss.

        Args:
            sites: Latent site -> draws, posterior and prior, batch shape ``(K, B)``.
            beta: KL weight at this step.
            num_data: N.
        """
        return self.of_site(next(iter(sites.values())), beta, num_data)

    def of_site(self, site: LatentSite, beta: Any, num_data: float) -> Tensor:
        """``()`` nats per datum of the one site."""
        raise NotImplementedError


def not_negative(name: str, **weights: float) -> None:
    """Refuse weights below zero.

    Raises:
        OptionError: one is.
    """
    for key, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise OptionError(f"{name} takes {key} of 0 or more, got {weight}: try 10")


def flat(value: Tensor) -> Tensor:
    """Draws ``(K, B, event)`` as ``(K, B, D)``."""
    return value.reshape(*value.shape[:2], -1)


def factorises(distribution: Any) -> bool:
    """Whether its dimensions are independent of each other."""
    while isinstance(distribution, torch.distributions.Independent):
        distribution = distribution.base_dist
    return bool(distribution.event_shape == ())
