"""What the waist's functions take and give: particles, layout, gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Batch",
    "Chosen",
    "Gate",
    "LatentSite",
    "Layout",
    "Particles",
    "Program",
    "Relaxed",
    "Scale",
    "by_datum",
    "by_program",
    "sum_terms",
]

Program = Callable[..., Any]
Batch = Any  # a tensor, a tuple of tensors or a dict of tensors
Scale = Any  # a number or a tensor that broadcasts against (B,)


@dataclass(frozen=True)
class Particles:
    """K draws from the guide for each of B data, weighed by model and guide.

    Attributes:
        values: Latent site -> draws, ``(K, B, ...)``; outside the data plate ``(K, 1, ...)``.
        log_p: Model site, latent or observed -> log density ``(K, B)``, unscaled.
        log_q: Guide site -> log density ``(K, B)``, unscaled, differentiable in every way.
        observed: Names of the observed sites.
        score: Guide site -> log density ``(K, B)`` at the draws held fixed, so differentiable in
            the guide's parameters alone. Only with ``draw(score=True)``.
        kl: Latent site -> ``KL(q || p)``, ``(K, B)``, in closed form where it is known, else
            ``log_q - log_p``. Only with ``draw(analytic_kl=True)``.
        dreams: ``log q(z' | x')`` of latents and data that the model drew itself, one for each
            datum of the batch: ``(1, B)``, differentiable in the guide's parameters alone. Only
            with ``draw(dream=True)``.
        global_log_p: Model sites outside the data plate -> ``(K,)``.
        global_log_q: Guide sites outside the data plate -> ``(K,)``.
        global_scale: Terms outside the data plate that have a factor -> that factor.
        scale: Common factor of all terms, from plates (N/B) and ``poutine.scale``.
        plate_scale: The part of ``scale`` that is due to a subsampled data plate.
        relative_scale: Terms whose factor differs from the common one -> that ratio.
        inner_scale: Terms in a subsampled plate within a datum -> its N/B, a part of that ratio.
        gate: Scales the gradient that flows from the model into the draws, where one was asked for.
        sites: Local latent site -> its draws, posterior and prior. Only with ``draw(sites=True)``.
        relaxed: The model weighed once more, at relaxed draws. Only with ``draw(relax=...)``.
        chosen: A few particles of each datum; those above have no gradients then. Only with
            ``draw(choose=...)``.
    """

    values: dict[str, Tensor]
    log_p: dict[str, Tensor]
    log_q: dict[str, Tensor]
    observed: tuple[str, ...]
    score: dict[str, Tensor] | None = None
    kl: dict[str, Tensor] | None = None
    dreams: Tensor | None = None
    global_log_p: dict[str, Tensor] = field(default_factory=dict)
    global_log_q: dict[str, Tensor] = field(default_factory=dict)
    global_scale: dict[tuple[str, str], Scale] = field(default_factory=dict)
    scale: Scale = 1.0
    plate_scale: float = 1.0
    relative_scale: dict[tuple[str, str], Scale] = field(default_factory=dict)
    inner_scale: dict[tuple[str, str], float] = field(default_factory=dict)
    gate: Gate | None = None
    sites: dict[str, LatentSite] | None = None
    relaxed: Relaxed | None = None
    chosen: Chosen | None = None

    @property
    def log_weights(self) -> Tensor:
        """``log p(x, z) - log q(z | x)`` of each particle and datum, ``(K, B)``, nats, unscaled."""
        return sum_terms(self.log_p) - sum_terms(self.log_q)

    @property
    def likelihood(self) -> dict[str, Tensor]:
        """Observed site inside the data plate -> log density ``(K, B)``, unscaled."""
        return {n: v for n, v in self.log_p.items() if n in self.observed}

    @property
    def prior(self) -> dict[str, Tensor]:
        """Latent site inside the data plate -> log density under the model ``(K, B)``, unscaled."""
        return {n: v for n, v in self.log_p.items() if n not in self.observed}

    @property
    def log_likelihood(self) -> Tensor:
        """``log p(x | z)``, summed over the observed sites, ``(K, B)``, nats."""
        return sum_terms(self.likelihood)

    @property
    def log_prior(self) -> Tensor:
        """``log p(z)``, summed over the latent sites, ``(K, B)``, nats."""
        return sum_terms(self.prior)

    @property
    def shape(self) -> tuple[int, int]:
        """``(K, B)``."""
        num_particles, num_data = next(iter(self.log_p.values())).shape
        return num_particles, num_data


@dataclass(frozen=True)
class Chosen:
    """n of each datum's K particles, weighed once more with their gradients.

    Attributes:
        log_p: As :attr:`Particles.log_p`, ``(n, B)``.
        log_q: As :attr:`Particles.log_q`, ``(n, B)``.
        score: As :attr:`Particles.score`, ``(n, B)``.
        weight: Share of each in the weights of all K, ``(n, B)``, held fixed.
    """

    log_p: dict[str, Tensor]
    log_q: dict[str, Tensor]
    score: dict[str, Tensor] | None
    weight: Tensor


@dataclass(frozen=True)
class Relaxed:
    """A discrete site's draws made continuous, and what model and guide say of them.

    Attributes:
        name: The site.
        leaf: Relaxed draws, held fixed, ``(K, B, event)``.
        path: Zeros of that shape whose derivative is the control variate's.
        likelihood: ``log p(x | leaf)``, ``(K, B)``, differentiable in ``leaf``.
        kl: ``log q(leaf | x) - log p(leaf)``, both made linear in ``leaf``, likewise.
    """

    name: str
    leaf: Tensor
    path: Tensor
    likelihood: Tensor
    kl: Tensor


class LatentSite(NamedTuple):
    """A latent site as guide and model see it; batch shapes begin with K where it was drawn."""

    value: Tensor
    posterior: Any
    prior: Any


def sum_terms(terms: Mapping[str, Tensor]) -> Tensor:
    """Sum of the ``(K, B)`` terms; a scalar zero when there is none."""
    return sum(terms.values(), start=torch.zeros(()))


@dataclass(frozen=True)
class Layout:
    """Where particles and data lie in a pair's tensors, found once by :func:`inspect`.

    Attributes:
        particle_dim: Batch dimension of the particle plate, left of every other.
        data_dim: Batch dimension of the data plate, usually -1.
        data_plates: Its names; a global site may have a plate of its own at the same dimension.
        latents: Latent sites inside the data plate, in the model's order.
        globals: Latent sites outside it, and sites of the guide's own there (a joint autoguide's).
        observed: Observed sites.
        outside: The globals, and observed sites (a penalty, say) that have no row for each datum.
        entries: Observed site -> key of the batch's tensor that it observes, where it is one.
        score_sites: Guide sites without a pathwise derivative (discrete ones), name -> family.
        supports: Observed site -> (key of the batch's tensor, support), where the site's value is
            that tensor itself.
        in_order: Whether guide and model draw the latent sites in the same order.
        vectorize: Whether the programs take all particles at once.
        event_dims: Guide site -> number of event dimensions.
    """

    particle_dim: int
    data_dim: int
    data_plates: frozenset[str]
    latents: tuple[str, ...]
    globals: tuple[str, ...]
    observed: tuple[str, ...]
    outside: frozenset[str]
    entries: Mapping[str, Any]
    score_sites: Mapping[str, str]
    supports: Mapping[str, tuple[Any, Any]]
    in_order: bool
    vectorize: bool
    event_dims: Mapping[str, int]


def by_datum(value: Tensor, layout: Layout, name: str) -> Tensor:
    """A site's draws ``(K, inner plates, B, inner plates, event)`` with the data second."""
    data_dim = value.dim() - layout.event_dims[name] + layout.data_dim
    return value.movedim(data_dim, 1)


def by_program(value: Tensor, layout: Layout, name: str) -> Tensor:
    """The reverse of :func:`by_datum`: draws ``(K, B, ...)`` as the programs hold them."""
    data_dim = value.dim() - layout.event_dims[name] + layout.data_dim
    return value.movedim(1, data_dim)


class Gate:
    """Identity on draws whose backward pass multiplies by ``coefficient`` ``(K, B)``, set later."""

    def __init__(self) -> None:
        self.coefficient: Tensor | None = None
        self._parts: list[Gate] = []

    def part(self) -> Gate:
        """A gate of the next particle's own, where particles are run one by one."""
        self._parts.append(Gate())
        return self._parts[-1]

    def open(self, coefficient: Tensor) -> None:
        """Set the coefficient ``(K, B)``, before the backward pass."""
        self.coefficient = coefficient
        for index, part in enumerate(self._parts):
            part.coefficient = coefficient[index : index + 1]

    def __call__(self, value: Tensor, layout: Layout, event_dim: int) -> Tensor:
        """Pass draws ``(K, B, ...)`` of a site with ``event_dim`` event dimensions through."""
        gated = value.view_as(value)
        if gated.requires_grad:
            gated.register_hook(  # type: ignore[no-untyped-call]
                lambda grad: self._multiply(grad, layout, event_dim)
            )
        return gated

    def _multiply(self, grad: Tensor, layout: Layout, event_dim: int) -> Tensor:
        if self.coefficient is None:
            return grad
        num_particles, num_data = self.coefficient.shape
        shape = [1] * -layout.particle_dim
        shape[0], shape[layout.data_dim] = num_particles, num_data
        factor = self.coefficient.reshape(shape + [1] * event_dim)
        return grad * factor.reshape(factor.shape[factor.dim() - grad.dim() :])
