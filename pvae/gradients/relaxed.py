"""Control variates for discrete draws from their continuous relaxation: REBAR and RELAX."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from pvae import particles as waist
from pvae.bounds import RenyiBound
from pvae.errors import ObjectiveError, OptionError
from pvae.gradients.protocol import Beta, Bound, Gradient, Terms
from pvae.networks import MLP, join
from pvae.particles import Gate, LatentSite, Layout, Particles, Relaxed

__all__ = ["Rebar", "Relax", "rebar", "relax"]

_FAMILIES = ("Bernoulli", "OneHotCategorical")


@dataclass(frozen=True)
class Rebar(Gradient):
    r"""The score function with the relaxed ELBO as control variate, for one discrete guide site.

    A discrete draw is ``b = H(u)`` of a relaxed one, ``u`` logistic or Gumbel noise plus logits;
    ``v`` is u given b. With ``f = log w``, ``s_t`` a sigmoid or softmax of temperature t, and
    ``c = strength f(s_t(.))``, the gradient in the logits is, for each datum::

        g = (f(b) - c(v)) dlog q(b) + d c(u) - d c(v)

    unbiased for any smooth c (Tucker et al. 2017). Draws are coupled so that ``u = v`` and only
    their derivatives differ: the model is run once more and not twice. With several particles the
    mean of the others' ``f - c`` is taken off besides; where that alone explains the reward, as for
    a single Bernoulli, ``score_function`` is quieter.

    ``learned`` moves temperature and strength down the slope of ``E |g|^2``, in the same step and
    with the same optimiser: that of the variance of g, whose mean does not depend on them. It takes
    the model's second derivative in its latents. One estimator then serves one pair at a time, and
    begins anew whenever a run does.

    Attributes:
        temperature: t.
        strength: Of the control variate; 0 is the plain score function.
        learned: Whether these are where both begin, and not where they stay.
    """

    temperature: float = 0.5
    strength: float = 1.0
    learned: bool = False
    _control: dict[str, nn.Module] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    has_path: ClassVar[bool] = False
    weighs: ClassVar[bool] = True
    _name: ClassVar[str] = "rebar"

    def __post_init__(self) -> None:
        if not (0 < self.temperature < math.inf and 0 <= self.strength < math.inf):
            raise OptionError(
                f"{self._name} takes a temperature above 0 and a strength of 0 or more, got "
                f"temperature={self.temperature}, strength={self.strength}: try 0.5 and 1"
            )

    @property
    def learns(self) -> bool:
        """Whether temperature and strength move."""
        return self.learned

    def check(self, bound: Bound, num_particles: int) -> None:
        """For the ELBO, whose reward is each particle's own."""
        if not (isinstance(bound, RenyiBound) and bound.additive):
            raise ObjectiveError(
                f"{self!r} holds for bound=elbo, got {bound!r}: use gradient=score_function"
            )

    def check_pair(self, layout: Layout) -> None:
        """One guide site, of a family with a relaxation."""
        check_one_site(self, layout, _FAMILIES)

    def start(self, sites: Mapping[str, LatentSite]) -> None:
        """What is learned, as it begins, of the draws' size and type."""
        value = next(iter(sites.values())).value
        control = _Control(self.temperature, self.strength, self._network(value[0, 0].numel()))
        self._control["control_variate"] = control.to(device=value.device, dtype=value.dtype)

    def _network(self, size: int) -> MLP | None:
        """REBAR has none."""
        return None

    def networks(self) -> dict[str, nn.Module]:
        """Temperature, strength and network, where they are learned."""
        return dict(self._control)

    def draw(
        self, model: Any, guide: Any, batch: Any, num_particles: int, **options: Any
    ) -> Particles:
        """Discrete draws, weighed once more at their relaxation."""
        options = {"detach": True, "sites": True, "relax": self.relax, **options}
        return waist.draw(model, guide, batch, num_particles, **options)

    def relax(self, distribution: Any, value: Tensor) -> tuple[Tensor, Tensor, Any]:
        """A relaxed draw held fixed, a zero with the derivative of u less v, and the density."""
        temperature = self._settings[0]
        squash, logits, given = _coupled(leaf_of(distribution), value)
        free = logits + (given - logits).detach()
        path = squash(free / temperature) - squash(given / temperature)
        leaf = squash(given.detach() / temperature)
        return leaf if leaf.requires_grad else leaf.requires_grad_(), path, _density

    @property
    def _settings(self) -> tuple[Any, Any]:
        """Temperature and strength."""
        control: Any = self._control.get("control_variate")
        if control is None:
            return self.temperature, self.strength
        return control.log_temperature.exp(), control.strength

    def score_sites(self, layout: Layout) -> frozenset[str]:
        """The one."""
        return frozenset(layout.event_dims)

    def surrogate(self, bound: Bound, terms: Terms, beta: Beta, gate: Gate | None) -> Tensor:
        """The ELBO, and the logits times their gradient; less the slope of its square."""
        log_weights = terms.log_joint - beta * terms.log_q
        value = bound(log_weights)
        if terms.relaxed is None or terms.sites is None:  # no gradients are taken
            return value
        site = terms.sites[terms.relaxed.name]
        logits: Tensor = leaf_of(site.posterior).logits
        control, slope = self.control(terms.relaxed, logits.detach(), beta)
        if not logits.requires_grad:  # the guide is held
            return value
        reward = log_weights.detach() - control
        if len(reward) > 1:
            reward = reward - (reward.sum(0) - reward) / (len(reward) - 1)
        gradient = self.in_logits(reward, slope, site, terms.relaxed.path)
        rewarded = (gradient.detach() * logits).reshape(*reward.shape, -1).sum(-1)
        surrogate: Tensor = value + (beta * terms.score + rewarded).mean(0)
        return surrogate - self._variance(gradient) if self._control else surrogate

    def control(self, relaxed: Relaxed, logits: Tensor, beta: Beta) -> tuple[Tensor, Tensor]:
        """The variate at the relaxed draws, ``(K, B)``, and its slope there."""
        keep = bool(self._control)
        value = relaxed.likelihood - beta * relaxed.kl
        slope = _slope(relaxed.likelihood, relaxed, keep) - beta * _slope(relaxed.kl, relaxed, keep)
        strength = self._settings[1]
        value, slope = strength * value, strength * slope
        return (value, slope) if keep else (value.detach(), slope.detach())

    def in_logits(self, reward: Tensor, slope: Tensor, site: LatentSite, path: Tensor) -> Tensor:
        """Each particle's gradient in the site's logits, of the draws' shape."""
        leaf = leaf_of(site.posterior)
        reward = reward.reshape(reward.shape + (1,) * (site.value.dim() - reward.dim()))
        (moved,) = torch.autograd.grad(
            path, leaf.logits, slope, retain_graph=True, create_graph=bool(self._control)
        )
        found: Tensor = reward * (site.value - leaf.probs).detach() + moved
        return found

    def _variance(self, gradient: Tensor) -> Tensor:
        """A scalar whose derivative is that of ``E |g|^2`` in what is learned, and no other."""
        parameters = list(self._control["control_variate"].parameters())
        square = gradient.mean(0).square().sum() / gradient.shape[1]
        slopes = torch.autograd.grad(square, parameters, retain_graph=True)
        total: Tensor = torch.stack(
            [(p * slope.detach()).sum() for p, slope in zip(parameters, slopes, strict=True)]
        ).sum()
        return total

    def __repr__(self) -> str:
        learned = ", learned" if self.learned else ""
        return f"rebar({self.temperature:g}, {self.strength:g}{learned})"


@dataclass(frozen=True)
class Relax(Rebar):
    r"""REBAR with a network beside the relaxed ELBO, all of it learned.

    ``c = strength f(s_t(.)) + r(s_t(.), logits)``, r a small network that knows the datum by the
    guide's logits for it (held fixed), and is zero at first. Network, strength and temperature
    follow the slope of the gradient's own variance, as with ``rebar(learned=True)``. Grathwohl,
    Choi, Wu, Roeder & Duvenaud (2018), Backpropagation through the void.

    Attributes:
        hidden: Widths of the network's hidden layers.
    """

    learned: bool = True
    hidden: tuple[int, ...] = (32, 32)
    _name: ClassVar[str] = "relax"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.hidden or not self.learned or min(self.hidden) < 1:
            raise OptionError(
                f"relax learns a network with hidden layers, got hidden={self.hidden!r}: try "
                "(32, 32), or rebar(learned=True), which has none"
            )

    def _network(self, size: int) -> MLP | None:
        return MLP(2 * size, 1, self.hidden)

    def control(self, relaxed: Relaxed, logits: Tensor, beta: Beta) -> tuple[Tensor, Tensor]:
        """That of REBAR and the network's."""
        value, slope = super().control(relaxed, logits, beta)
        network: Any = self._control["control_variate"]
        shape = (*value.shape, -1)
        inputs = join(relaxed.leaf.reshape(shape), logits.reshape(shape))
        beside = network.network(inputs).squeeze(-1)
        (steep,) = torch.autograd.grad(beside.sum(), relaxed.leaf, create_graph=True)
        return value + beside, slope + steep

    def __repr__(self) -> str:
        return f"relax({self.temperature:g}, {self.strength:g}, {self.hidden})"


class _Control(nn.Module):
    """What is learned: the logarithm of the temperature, the strength, and RELAX's network."""

    def __init__(self, temperature: float, strength: float, network: MLP | None) -> None:
        super().__init__()
        exact = torch.float64
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature), dtype=exact))
        self.strength = nn.Parameter(torch.tensor(strength, dtype=exact))
        self.network = network
        if network is not None:
            nn.init.zeros_(network[-1].weight)  # type: ignore[arg-type]


def _slope(value: Tensor, relaxed: Relaxed, create_graph: bool) -> Tensor:  # noqa: FBT001
    slope = None
    if value.requires_grad:
        (slope,) = torch.autograd.grad(
            value.sum(), relaxed.leaf,
            retain_graph=True, create_graph=create_graph, allow_unused=True,
        )  # fmt: skip
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
    leaf_family = leaf_of(distribution)
    logits: Tensor = leaf_family.logits
    if type(leaf_family).__name__ == "Bernoulli":
        return leaf * logsigmoid(logits) + (1 - leaf) * logsigmoid(-logits)
    return leaf * logits.log_softmax(-1)


def leaf_of(distribution: Any) -> Any:
    """The distribution of one dimension, whose logits the site has."""
    while isinstance(distribution, torch.distributions.Independent):
        distribution = distribution.base_dist
    return distribution


def check_one_site(gradient: Gradient, layout: Layout, families: tuple[str, ...]) -> None:
    """Refuse all but a guide of one site, of one of these families, an event of each datum.

    Raises:
        ObjectiveError: the pair is another.
    """
    sites = {name: layout.score_sites.get(name, "continuous") for name in layout.event_dims}
    if len(sites) != 1 or next(iter(sites.values())) not in families:
        found = ", ".join(f"{name!r} ({family})" for name, family in sites.items())
        raise ObjectiveError(
            f"{gradient!r} takes a guide of one site, {' or '.join(families)}, got "
            f"{found}: use gradient=score_function or mixed"
        )
    if layout.particle_dim != -2 or not layout.vectorize:
        raise ObjectiveError(
            f"{gradient!r} takes a site that is one event of each datum, with all particles at "
            "once: add .to_event(n) for its own dimensions, or use gradient=score_function"
        )


def rebar(temperature: float = 0.5, strength: float = 1.0, *, learned: bool = False) -> Rebar:
    """The score function with the relaxed ELBO as control variate (Tucker et al. 2017)."""
    return Rebar(temperature, strength, learned)


def relax(
    temperature: float = 0.5, strength: float = 1.0, hidden: tuple[int, ...] = (32, 32)
) -> Relax:
    """REBAR with a network beside the relaxed ELBO, learned (Grathwohl et al. 2018)."""
    return Relax(temperature, strength, hidden=tuple(hidden))
