"""What the KL of each latent site costs: terms that take the place of ``beta * KL``.

A term maps latent site -> ``log q - log p`` (or its closed form), ``(K, B)`` nats, and the number
that is scheduled to what the batch pays per datum, ``()`` or ``(B,)`` nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pvae import schedules
from pvae.errors import OptionError
from pvae.schedules import Schedule, as_schedule

__all__ = ["Balanced", "Capacity", "FreeBits", "KLTerm", "balanced", "capacity", "free_bits"]


class KLTerm:
    """A term; by itself ``beta * KL``.

    Attributes:
        steers: Whether the scheduled number is the term's own and not the KL's weight.
    """

    steers: ClassVar[bool] = False

    @property
    def schedule(self) -> Schedule:
        """The term's own number as a function of the step, where it steers."""
        raise NotImplementedError

    def __call__(self, kl: Mapping[str, Tensor], beta: Any) -> Tensor:
        """``()`` or ``(B,)``, nats per datum."""
        raise NotImplementedError


@dataclass(frozen=True)
class FreeBits(KLTerm):
    """``beta sum_site max(nats, mean KL of the site)`` (Kingma et al. 2016)."""

    nats: float

    def __post_init__(self) -> None:
        if not 0 <= self.nats < math.inf:
            raise OptionError(f"free bits are nats, 0 or more, got {self.nats}: try 0.5")

    def __call__(self, kl: Mapping[str, Tensor], beta: Any) -> Tensor:
        """``()``: below ``nats`` a site's KL costs nothing more and has no gradient."""
        floors = [schedules.free_bits(term, self.nats) for term in kl.values()]
        total: Tensor = beta * torch.stack(floors).sum()
        return total


@dataclass(frozen=True)
class Capacity(KLTerm):
    r"""``gamma |mean KL - C(step)|``: the KL is held at a capacity that grows.

    Burgess et al. (2018), Understanding disentangling in beta-VAE. The KL is the mean over the
    batch, which one sample of it per datum estimates without bias inside ``|.|`` but for the batch.

    Attributes:
        gamma: Weight of the deviation.
        nats: C, a number or a schedule ``step -> nats``.
    """

    gamma: float
    nats: float | Schedule
    steers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.gamma < math.inf:
            raise OptionError(f"capacity takes a gamma above 0, got {self.gamma}: try 100")

    @property
    def schedule(self) -> Schedule:
        """C as a function of the step, nats."""
        return as_schedule(self.nats)

    def __call__(self, kl: Mapping[str, Tensor], beta: Any) -> Tensor:
        """``()``, where ``beta`` is the capacity at this step."""
        total = torch.stack([term.mean() for term in kl.values()]).sum()
        value: Tensor = self.gamma * (total - beta).abs()
        return value


@dataclass(frozen=True)
class Balanced(KLTerm):
    r"""``beta sum_l g_l KL_l`` with ``g_l`` proportional to the site's own KL while beta < 1.

    ``g_l = L |mean KL_l| / sum_m |mean KL_m|``, held fixed and of mean one: in the warm-up a site
    that is used much pays more, so that none is switched off before it has learnt anything; at
    beta = 1 every ``g_l`` is one. The KL balancing of NVAE (Vahdat & Kautz 2020) for sites of equal
    size, which weighs a site by its size besides.
    """

    def __call__(self, kl: Mapping[str, Tensor], beta: Any) -> Tensor:
        """``(B,)``."""
        each = torch.stack([term.mean(0) for term in kl.values()])
        used = each.detach().mean(1).abs() + 1e-8
        shares = used / used.mean()
        warm = torch.as_tensor(beta, dtype=shares.dtype, device=shares.device) < 1
        shares = torch.where(warm, shares, torch.ones_like(shares))
        value: Tensor = beta * (shares[:, None] * each).sum(0)
        return value


def free_bits(nats: float) -> FreeBits:
    """Nats below which a latent site's KL costs nothing (Kingma et al. 2016)."""
    return FreeBits(nats)


def capacity(gamma: float, nats: float) -> Capacity:
    """The KL held at ``nats`` with weight ``gamma`` (Burgess et al. 2018)."""
    return Capacity(gamma, nats)


def balanced() -> Balanced:
    """Each site's KL weighed by its own size while beta is below one (Vahdat & Kautz 2020)."""
    return Balanced()
