"""Control variates for discrete draws from their continuous relaxation: REBAR."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from pvae import particles as waist
from pvae.bounds import RenyiBound
from pvae.errors import ObjectiveError, OptionError
from pvae.gradients.protocol import Beta, Bound, Gradient, Terms
from pvae.particles import Gate, Layout, Particles, Relaxed

__all__ = ["Rebar", "rebar"]

_FAMILIES = ("Bernoulli", "OneHotCategorical")


@dataclass(frozen=True)
class Rebar(Gradient):
    r"""The score function with the relaxed ELBO as control variate, for one discrete guide site.

    A discrete draw is ``b = H(u)`` of a relaxed one, ``u`` logistic or Gumbel noise plus logits;
    ``v`` is u given b. With ``f = log w``, ``s_t`` a sigmoid or softmax of temperature t, and
    ``c = strength f(s_t(.))``, the guide's gradient is::

        (f(b) - c(v)) dlog q(b) + d c(u) - d c(v)

    unbiased for any smooth c (Tucker et al. 2017; RELAX, Grathwohl et al. 2018, learns c). Draws
    are coupled so that ``u = v`` and only their derivatives differ: the model is run once more and
    not twice. With several particles the mean of the others' ``f - c`` is taken off besides; where
    that alone explains the reward, as for a single Bernoulli, ``score_function`` is quieter.

    Attributes:
        temperature: t.
        strength: Of the control variate; 0 is the plain score function.
    """

    temperature: float = 0.5
    strength: float = 1.0
    has_path: ClassVar[bool] = False
    weighs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (0 < self.temperature < math.inf and 0 <= self.strength < math.inf):
            raise OptionError(
                "rebar takes a temperature above 0 and a strength of 0 or more, got "
                f"temperature={self.temperature}, strength={self.strength}: try 0.5 and 1"
            )

    def check(self, bound: Bound, num_particles: int) -> None:
        """For the ELBO, whose reward is each particle's own."""
        if not (isinstance(bound, RenyiBound) and bound.additive):
            raise ObjectiveError(
                f"{self!r} holds for bound=elbo, got {bound!r}: use gradient=score_function"
            )

    def check_pair(self, layout: Layout) -> None:
        """One guide site, of a family with a relaxation."""
        sites = {name: layout.score_sites.get(name, "continuous") for name in layout.event_dims}
        if len(sites) != 1 or next(iter(sites.values())) not in _FAMILIES:
            found = ", ".join(f"{name!r} ({family})" for name, family in sites.items())
            raise ObjectiveError(
                f"{self!r} relaxes a guide of one site, Bernoulli or OneHotCategorical, got "
                f"{found}: use gradient=score_function or mixed"
            )
        if layout.particle_dim != -2 or not layout.vectorize:
            raise ObjectiveError(
                f"{self!r} takes a site that is one event of each datum, with all particles at "
                "once: add .to_event(n) for its own dimensions, or use gradient=score_function"
            )

    def draw(
        self, model: Any, guide: Any, batch: Any, num_particles: int, **options: Any
    ) -> Particles:
        """Discrete draws, weighed once more at their relaxation."""
        return waist.draw(
            model, guide, batch, num_particles, detach=True, relax=self.relax, **options
        )

    def relax(self, distribution: Any, value: Tensor) -> tuple[Tensor, Tensor, Any]:
        """A relaxed draw held fixed, a zero with the derivative of u less v, and the density."""
        squash, logits, given = _coupled(_leaf(distribution), value)
        free = logits + (given - logits).detach()
        path = squash(free / self.temperature) - squash(given / self.temperature)
        leaf = squash(given / self.temperature).detach().requires_grad_()
        return leaf, path, _density

    def score_sites(self, layout: Layout) -> frozenset[str]:
        """The one."""
        return frozenset(layout.event_dims)

    def surrogate(self, bound: Bound, terms: Terms, beta: Beta, gate: Gate | None) -> Tensor:
        """The ELBO, the rewarded score, and the control variate's own derivative."""
        log_weights = terms.log_joint - beta * terms.log_q
        value = bound(log_weights)
        if terms.relaxed is None:  # no gradients are taken
            return value
        control, slope = _control(terms.relaxed, beta)
        reward = log_weights.detach() - self.strength * control
        if len(reward) > 1:
            reward = reward - (reward.sum(0) - reward) / (len(reward) - 1)
        path = (slope * terms.relaxed.path).reshape(*reward.shape, -1).sum(-1)
        rewarded: Tensor = (beta + reward) * terms.score + self.strength * path
        return value + rewarded.mean(0)

    def __repr__(self) -> str:
        return f"rebar({self.temperature:g}, {self.strength:g})"


def _control(relaxed: Relaxed, beta: Beta) -> tuple[Tensor, Tensor]:
    """``log w`` at the relaxed draws ``(K, B)`` and its slope there, both held fixed."""
    value = relaxed.likelihood - beta * relaxed.kl
    slope = _slope(relaxed.likelihood, relaxed) - beta * _slope(relaxed.kl, relaxed)
    return value.detach(), slope


def _slope(value: Tensor, relaxed: Relaxed) -> Tensor:
    slope = None
    if value.requires_grad:
        (slope,) = torch.autograd.grad(
            value.sum(), relaxed.leaf, retain_graph=True, allow_unused=True
        )
    if slope is None:
        raise ObjectiveError(
            f"the model has no derivative by site {relaxed.name!r}, whose values it rounds or uses "
            "as an index, and a control variate that jumps would be biased: let it be a smooth "
            "function of them, or use gradient=score_function"
        )
    return slope


def _coupled(distribution: Any, value: Tensor) -> tuple[Any, Tensor, Tensor]:
    """The squashing function, the logits, and relaxed draws given the discrete ones."""
    smallest = torch.finfo(value.dtype).tiny
    noise = torch.rand_like(value).clamp(min=smallest, max=1 - torch.finfo(value.dtype).eps / 2)
    if type(distribution).__name__ == "Bernoulli":
        logits = distribution.logits
        one = softplus(logits + noise.log()) - torch.log1p(-noise)
        zero = noise.log() - softplus(torch.log1p(-noise) - logits)
        return torch.sigmoid, logits, torch.where(value > 0, one, zero)
    logits = distribution.logits.log_softmax(-1)
    exponential = -noise.log()
    chosen = (value * exponential).sum(-1, keepdim=True)
    others = exponential * torch.exp(-logits) + chosen
    given = -torch.where(value > 0, exponential, others).log()
    return lambda z: torch.softmax(z, -1), logits, given


def _density(distribution: Any, leaf: Tensor) -> Tensor:
    """Log density of each dimension at relaxed values, linear in them.

    A OneHotCategorical's own would round them.
    """
    leaf_family = _leaf(distribution)
    logits: Tensor = leaf_family.logits
    if type(leaf_family).__name__ == "Bernoulli":
        return leaf * logsigmoid(logits) + (1 - leaf) * logsigmoid(-logits)
    return leaf * logits.log_softmax(-1)


def _leaf(distribution: Any) -> Any:
    while isinstance(distribution, torch.distributions.Independent):
        distribution = distribution.base_dist
    return distribution


def rebar(temperature: float = 0.5, strength: float = 1.0) -> Rebar:
    """The score function with the relaxed ELBO as control variate (Tucker et al. 2017)."""
    return Rebar(temperature, strength)
