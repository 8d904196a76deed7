"""The waist: a model and a guide, run on a batch, become log importance weights ``(K, B)``.

Everything above this module is a pure function of :class:`Particles`; this module alone knows
Pyro's handlers. Plate and ``poutine.scale`` factors are kept apart, so that they multiply a
datum's bound and never enter a logarithm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.poutine.messenger import Messenger, unwrap
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn

from pvae.errors import DataError, ProgramError

__all__ = [
    "Gate",
    "LatentSite",
    "Layout",
    "ModelSite",
    "Particles",
    "Relaxed",
    "by_datum",
    "by_program",
    "check_continuous",
    "check_dreams",
    "draw",
    "generate",
    "glance",
    "inspect",
    "latent_sites",
    "log_guide",
    "log_joint",
    "named_tensors",
    "observed_sites",
    "observed_families",
    "parameters",
    "owned",
    "path_ends",
    "plate_scale",
    "prior_of",
    "read_dependencies",
    "read_model",
    "rewritten",
    "sample_guide",
    "sample_observed",
    "simulate",
    "site_priors",
    "sum_terms",
    "unconstrain",
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
        gate: Scales the gradient that flows from the model into the draws, where one was asked for.
        sites: Local latent site -> its draws, posterior and prior. Only with ``draw(sites=True)``.
        relaxed: The model weighed once more, at relaxed draws. Only with ``draw(relax=...)``.
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
    gate: Gate | None = None
    sites: dict[str, LatentSite] | None = None
    relaxed: Relaxed | None = None

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
        globals: Latent sites outside it.
        observed: Observed sites.
        entries: Observed site -> key of the batch's tensor that it observes, where it is one.
        score_sites: Guide sites without a pathwise derivative (discrete ones), name -> family.
        supports: Observed site -> (key of the batch's tensor, support), where the site's value is
            that tensor itself.
        in_order: Whether guide and model draw the latent sites in the same order.
        vectorize: Whether the programs take all particles at once.
        event_dims: Latent site -> number of event dimensions.
    """

    particle_dim: int
    data_dim: int
    data_plates: frozenset[str]
    latents: tuple[str, ...]
    globals: tuple[str, ...]
    observed: tuple[str, ...]
    entries: Mapping[str, Any]
    score_sites: Mapping[str, str]
    supports: Mapping[str, tuple[Any, Any]]
    in_order: bool
    vectorize: bool
    event_dims: Mapping[str, int]


class _Substitute(Messenger):  # type: ignore[misc]
    """Gives latent sites (and subsampled plates) the values that the guide drew."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class _SameRows(Messenger):  # type: ignore[misc]
    """Subsampled plates pick their rows once, however often the programs are run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample) and msg["name"] in self.rows:
            msg["value"], msg["done"] = self.rows[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            self.rows[msg["name"]] = msg["value"]


class _Detach(Messenger):  # type: ignore[misc]
    """Cuts the path from each draw back to the parameters it was drawn with."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and isinstance(msg["value"], Tensor):
            msg["value"] = msg["value"].detach()


class _Rewrite(Messenger):  # type: ignore[misc]
    """Gives latent sites other distributions."""

    def __init__(self, change: Callable[[str, Any], Any]) -> None:
        super().__init__()
        self.change = change

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not isinstance(msg["fn"], _Subsample):
            msg["fn"] = self.change(msg["name"], msg["fn"])


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


def draw(
    model: Program,
    guide: Program,
    batch: Batch,
    num_particles: int = 1,
    *,
    score: bool = False,
    detach: bool = False,
    analytic_kl: bool = False,
    dream: bool = False,
    sites: bool = False,
    relax: Callable[[Any, Tensor], tuple[Tensor, Tensor, Any]] | None = None,
    gate: Gate | None = None,
    layout: Layout | None = None,
    data_plate: str | None = None,
    vectorize: bool = True,
) -> Particles:
    r"""Run guide and model on a batch and weigh K particles for each of its B data.

    ``log w[k, b] = log p(x[b], z[k, b]) - log q(z[k, b] | x[b])``. With the exact posterior as
    guide it is constant over k and equal to ``log p(x[b])``.

    Args:
        model: A Pyro callable with latent sites and observed sites.
        guide: A Pyro callable that samples the same latent sites.
        batch: What both are called with: a tensor ``(B, ...)``, a tuple (positional arguments) or
            a dict (keyword arguments).
        num_particles: K.
        score: Also weigh the draws held fixed (see :attr:`Particles.score`).
        detach: Cut the pathwise derivative of every draw (for score-function gradients).
        analytic_kl: Also give each latent site's KL in closed form where it is known.
        dream: Also weigh by the guide what the model draws itself (see :attr:`Particles.dreams`).
        sites: Also give each local latent site's distributions (see :attr:`Particles.sites`).
        relax: Gets the distribution and the draws of a guide's only site and gives the relaxed
            draws held fixed, the path to their parameters, and a function of a distribution and
            them, its log density made continuous (see :class:`Relaxed`).
        gate: Passed through on the way from the draws into the model (see :class:`Gate`).
        layout: What :func:`inspect` found for this pair; spares looking, and the checks.
        data_plate: Name of the plate that indexes the data, where several could.
        vectorize: Run all particles at once (an outermost plate); ``False`` runs them one by one.

    Returns:
        The particles, differentiable in the parameters of both programs.

    Raises:
        ProgramError: The programs do not fit each other, or cannot be run; the message names the
            site and the remedy.
    """
    if num_particles < 1:
        raise ProgramError(f"num_particles must be at least 1, got {num_particles}")
    if layout is None:
        layout = inspect(model, guide, batch, data_plate=data_plate, vectorize=vectorize)
    one_pass = functools.partial(
        _draw, model, guide, batch, layout,
        score=score, detach=detach, analytic_kl=analytic_kl, sites=sites, relax=relax,
    )  # fmt: skip
    if layout.vectorize:
        particles = one_pass(num_particles, gate=gate)
    else:
        with _SameRows():
            parts = [
                one_pass(1, gate=None if gate is None else gate.part())
                for _ in range(num_particles)
            ]
        particles = dataclasses.replace(_stack(parts), gate=gate)
    if dream:
        particles = dataclasses.replace(particles, dreams=_dream(model, guide, batch, layout))
    return particles


def _draw(
    model: Program,
    guide: Program,
    batch: Batch,
    layout: Layout,
    num_particles: int,
    *,
    score: bool,
    detach: bool,
    analytic_kl: bool,
    sites: bool,
    relax: Callable[[Any, Tensor], tuple[Tensor, Tensor, Any]] | None,
    gate: Gate | None,
) -> Particles:
    """One pass through both programs; without a particle dimension if not ``layout.vectorize``."""
    guide_trace = _run_guide(guide, batch, num_particles, layout, detach=detach)
    values = _site_values(guide_trace)
    replayed = values
    if gate is not None:
        replayed = {n: _gated(gate, n, v, layout) for n, v in values.items()}
    model_trace = _run_model(model, batch, replayed, num_particles, layout)
    particles = _weigh(model_trace, guide_trace, layout, num_particles, batch)
    particles = dataclasses.replace(particles, gate=gate)
    if score:
        particles = dataclasses.replace(
            particles, score=_score(guide, batch, guide_trace, layout, num_particles)
        )
    if analytic_kl:
        kl = _closed_form_kl(model_trace, guide_trace, particles, layout, num_particles)
        particles = dataclasses.replace(particles, kl=kl)
    if sites:
        local = _latent_sites(guide_trace, model_trace, layout)
        particles = dataclasses.replace(particles, sites=local)
    if relax is not None and torch.is_grad_enabled():
        relaxed = _relaxed(model, batch, guide_trace, layout, num_particles, relax)
        particles = dataclasses.replace(particles, relaxed=relaxed)
    return particles


def _relaxed(
    model: Program,
    batch: Batch,
    guide_trace: Any,
    layout: Layout,
    num_particles: int,
    relax: Callable[[Any, Tensor], tuple[Tensor, Tensor, Any]],
) -> Relaxed:
    """The model at relaxed values of the guide's only site, which no support would admit."""
    ((name, node),) = _latents(guide_trace).items()
    leaf, path, density = relax(node["fn"], node["value"])
    values = {**_site_values(guide_trace), name: leaf}
    try:
        with pyro.validation_enabled(False):
            trace = _run_model(model, batch, values, num_particles, layout)
            num_data = _num_data(trace, layout, batch)
            terms = _terms(_sites(trace), layout, num_particles, num_data)
    except Exception as error:
        raise ProgramError(
            f"the model does not run at relaxed values of site {name!r} ({_reason(error)}): let it "
            "take numbers between 0 and 1 there, or use gradient=pvae.gradients.score_function"
        ) from error
    local = {n: t for n, t in terms.items() if t.dim() == 2}
    likelihood = sum_terms({n: t for n, t in local.items() if n in layout.observed})
    kl = density(node["fn"], leaf) - density(trace.nodes[name]["fn"], leaf)
    kl = kl.reshape(num_particles, num_data, -1).sum(-1)
    return Relaxed(name, leaf, path, likelihood, kl)


def sample_guide(
    guide: Program, batch: Batch, num_particles: int, layout: Layout
) -> tuple[dict[str, Any], Tensor]:
    """The guide alone: draws per site, and their ``log q`` summed over sites, ``(K, B)``.

    The encoder is run once, whatever K is. The draws can be weighed later, in pieces, by
    :func:`log_joint`.
    """
    trace = _run_guide(guide, batch, num_particles, layout, detach=False)
    terms = _terms(_sites(trace), layout, num_particles, _num_data(trace, layout, batch))
    return _site_values(trace), sum_terms({n: t for n, t in terms.items() if t.dim() == 2})


def log_joint(
    model: Program, batch: Batch, values: Mapping[str, Any], num_particles: int, layout: Layout
) -> Tensor:
    """``log p(x, z)`` of given draws, unscaled: ``(K, B)``, nats."""
    trace = _run_model(model, batch, values, num_particles, layout)
    terms = _terms(_sites(trace), layout, num_particles, _num_data(trace, layout, batch))
    return sum_terms({n: t for n, t in terms.items() if t.dim() == 2})


class LatentSite(NamedTuple):
    """A latent site as guide and model see it; batch shapes begin with K where it was drawn."""

    value: Tensor
    posterior: Any
    prior: Any


def latent_sites(
    model: Program, guide: Program, batch: Batch, num_particles: int, layout: Layout
) -> dict[str, LatentSite]:
    """Draws of the guide with ``q(site | ...)`` and ``p(site | ...)`` of each local latent site."""
    guide_trace = _run_guide(guide, batch, num_particles, layout, detach=False)
    model_trace = _run_model(model, batch, _site_values(guide_trace), num_particles, layout)
    return _latent_sites(guide_trace, model_trace, layout)


def glance(model: Program, guide: Program, batch: Batch, layout: Layout) -> dict[str, LatentSite]:
    """One particle's :func:`latent_sites`, without gradients; random streams stay as they were."""
    with _quiet(batch):
        return latent_sites(model, guide, batch, 1, layout)


def _latent_sites(guide_trace: Any, model_trace: Any, layout: Layout) -> dict[str, LatentSite]:
    return {
        name: LatentSite(
            guide_trace.nodes[name]["value"],
            guide_trace.nodes[name]["fn"],
            model_trace.nodes[name]["fn"],
        )
        for name in layout.latents
    }


def observed_sites(
    model: Program, batch: Batch, values: Mapping[str, Any], num_particles: int, layout: Layout
) -> dict[str, Any]:
    """``p(site | z)`` of each observed site, given latents ``(K, B, ...)``; batch ``(K, B)``."""
    trace = _run_model(model, batch, values, num_particles, layout)
    return {name: trace.nodes[name]["fn"] for name in layout.observed}


def rewritten(program: Program, change: Callable[[str, Any], Any]) -> Program:
    """The program with other distributions at its latent sites.

    Args:
        program: A model or a guide.
        change: Gets a site's name and distribution, batch shape ``(B,)``, and returns another.
    """
    return _Rewrite(change)(program)  # type: ignore[no-any-return]


def by_datum(value: Tensor, layout: Layout, name: str) -> Tensor:
    """A site's draws ``(K, inner plates, B, inner plates, event)`` with the data second."""
    data_dim = value.dim() - layout.event_dims[name] + layout.data_dim
    return value.movedim(data_dim, 1)


def by_program(value: Tensor, layout: Layout, name: str) -> Tensor:
    """The reverse of :func:`by_datum`: draws ``(K, B, ...)`` as the programs hold them."""
    data_dim = value.dim() - layout.event_dims[name] + layout.data_dim
    return value.movedim(1, data_dim)


def simulate(
    model: Program, batch: Batch, *, guide: Program | None = None, check: bool = True
) -> tuple[dict[str, Tensor], Batch]:
    """Draw latents from the model, and data given them, in the form of a batch.

    Args:
        model: The generative program.
        batch: A template of B rows. What the model observes of it is replaced; the rest (labels,
            lengths, masks) is passed on and stays as it is.
        guide: Draws the latents given the batch instead of the model's prior, so that the data
            are draws of the posterior predictive.
        check: Make sure that the model does not read what it is to draw.

    Returns:
        Latent site -> values ``(B, ...)``, and the batch with what the model drew.

    Raises:
        ProgramError: An observed site is no tensor of the batch, or the model reads what it is to
            draw (as an autoregressive decoder does).
    """
    args, kwargs = arguments(batch)
    with _quiet(batch):
        observed = _observed_entries(model, batch)
        if check:
            _refuse_reading(model, batch, observed)
    drawn = {}
    if guide is not None:
        with torch.no_grad(), poutine.block():
            drawn = _site_values(poutine.trace(guide).get_trace(*args, **kwargs))
    return _simulate(model, batch, observed, drawn)


def _simulate(
    model: Program, batch: Batch, observed: Mapping[str, Any], drawn: Mapping[str, Any]
) -> tuple[dict[str, Tensor], Batch]:
    """As :func:`simulate`, once it is known which tensors of the batch are observed."""
    args, kwargs = arguments(batch)
    with torch.no_grad(), poutine.block():
        trace = poutine.trace(_generator(model, drawn)).get_trace(*args, **kwargs)
    latents = {
        n: node["value"] for n, node in _latents(trace).items()
        if n not in observed and not node["infer"].get("was_observed")
    }  # fmt: skip
    made = {key: trace.nodes[name]["value"] for name, key in observed.items()}
    return latents, _with_entries(batch, made)


def _dream(model: Program, guide: Program, batch: Batch, layout: Layout) -> Tensor:
    """``log q(z' | x')`` where the model drew ``z'`` and then ``x'``: ``(1, B)``, nats."""
    latents, dreamt = _simulate(model, batch, layout.entries, {})
    return log_guide(guide, dreamt, latents, 1, layout)


def check_dreams(model: Program, batch: Batch) -> None:
    """Refuse a model whose own draws could not be told from data of the batch's form.

    Raises:
        ProgramError: An observed site is no tensor of the batch, or the model reads what it is to
            draw.
    """
    with _quiet(batch):
        _refuse_reading(model, batch, _observed_entries(model, batch))


def sample_observed(
    model: Program, batch: Batch, values: Mapping[str, Any], num_particles: int, layout: Layout
) -> dict[str, Tensor]:
    """Observed site -> draws ``(K, B, ...)`` of ``p(x | z)``, given latents ``(K, B, ...)``."""
    args, kwargs = arguments(batch)
    program = _generator(_plated(model, num_particles, layout), values)
    trace = poutine.trace(program).get_trace(*args, **kwargs)
    return {name: trace.nodes[name]["value"] for name in layout.observed}


def observed_families(
    model: Program, batch: Batch, values: Mapping[str, Any], num_particles: int, layout: Layout
) -> dict[Any, Any]:
    """Key of the batch's tensor -> ``p(x | z)`` of latents ``(K, B, ...)``, batch shape (K, B)."""
    trace = _run_model(model, batch, values, num_particles, layout)
    return {key: trace.nodes[name]["fn"] for name, key in layout.entries.items()}


def _generator(model: Program, values: Mapping[str, Any]) -> Program:
    return _Substitute(values)(poutine.uncondition(model))  # type: ignore[no-any-return]


def _observed_entries(model: Program, batch: Batch) -> dict[str, Any]:
    """Observed site -> key of the batch's tensor that it observes."""
    args, kwargs = arguments(batch)
    trace = _attempt("model", poutine.trace(model), args, kwargs)
    observed = {name: node for name, node in _sites(trace).items() if node["is_observed"]}
    found = _entries(observed, batch)
    for name in observed:
        if name not in found:
            raise ProgramError(
                f"observed site {name!r} is not a tensor of the batch itself (it is computed from "
                "the batch), so data cannot be simulated in the batch's form: prepare the data "
                "before they are passed, or pass simulator="
            )
    return found


def _entries(observed: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
    """Observed site -> key of the batch's tensor that it observes, for those that observe one."""
    args, kwargs = arguments(batch)
    entries = [*enumerate(args), *kwargs.items()]
    found: dict[str, Any] = {}
    for name, node in observed.items():
        for key, entry in entries:
            if name not in found and _is_same(node["value"], entry):
                found[name] = key
    return found


def _is_same(value: Any, entry: Any) -> bool:
    """Whether a site's value is an entry of the batch, or a view of it of another shape."""
    if not (isinstance(value, Tensor) and isinstance(entry, Tensor)):
        return False
    return value is entry or (
        value.data_ptr() == entry.data_ptr()
        and value.numel() == entry.numel()
        and value.dtype == entry.dtype
        and value.is_contiguous()
        and entry.is_contiguous()
    )


def _with_entries(batch: Batch, made: Mapping[Any, Tensor]) -> Batch:
    def entry(key: Any, old: Any) -> Any:
        return made[key].reshape(old.shape).to(old.dtype) if key in made else old

    if isinstance(batch, Mapping):
        return {key: entry(key, old) for key, old in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(entry(key, old) for key, old in enumerate(batch))
    return entry(0, batch)


def _refuse_reading(model: Program, batch: Batch, observed: Mapping[str, Any]) -> None:
    """Other data in the template must give the same draws."""
    args, kwargs = arguments(batch)
    entries = dict([*enumerate(args), *kwargs.items()])
    other = {
        key: torch.zeros_like(entries[key]) if bool(entries[key].any()) else entries[key] + 1
        for key in observed.values()
    }
    drawn = []
    for template in (batch, _with_entries(batch, other)):
        args, kwargs = arguments(template)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            trace = _attempt("model", poutine.trace(_generator(model, {})), args, kwargs)
        drawn.append({name: trace.nodes[name]["value"] for name in observed})
    for name in observed:
        if not torch.equal(drawn[0][name], drawn[1][name]):
            raise ProgramError(
                f"the model reads its data while it draws site {name!r} (as an autoregressive "
                "decoder does), so what it draws is no sample: pass simulator="
            )


def log_guide(
    guide: Program, batch: Batch, values: Mapping[str, Any], num_particles: int, layout: Layout
) -> Tensor:
    """``log q(z | x)`` of given latents, unscaled: ``(K, B)``, nats.

    Latents may have one row for all data, ``(K, 1, ...)``: each is then weighed under every datum.

    Raises:
        ProgramError: The guide draws a site of its own, over which it would have to be integrated.
    """
    args, kwargs = arguments(batch)
    given = _Substitute(values)(_plated(guide, num_particles, layout))
    trace = poutine.trace(given).get_trace(*args, **kwargs)
    own = [name for name in _latents(trace) if name not in values]
    if own:
        raise ProgramError(
            f"the guide draws {_names(own)}, which the model lacks, so its density at given "
            "latents is not known: use a guide without it, or start='prior'"
        )
    terms = _terms(_sites(trace), layout, num_particles, _num_data(trace, layout, batch))
    return sum_terms({n: t for n, t in terms.items() if t.dim() == 2})


def parameters(model: Program, guide: Program, batch: Batch) -> dict[str, nn.Parameter | Tensor]:
    """All trainable tensors of a pair, by a stable name, each once.

    They come from ``parameters()`` where a program is (a method of) a module, and from the
    parameter statements of its trace (``pyro.param``, ``pyro.module``).

    Raises:
        ProgramError: There is none.
    """
    found: dict[int, tuple[str, Tensor]] = {}
    for role, program in (("model", model), ("guide", guide)):
        owner = module_of(program)
        if owner is not None:
            for name, value in owner.named_parameters():
                found.setdefault(id(value), (f"{role}.{name}", value))
    with _quiet(batch):
        trace = poutine.trace(_call_both(model, guide, batch), param_only=True).get_trace()
    for name, node in trace.nodes.items():
        if node["type"] == "param":
            leaf = node["value"].unconstrained()
            found.setdefault(id(leaf), (f"store.{name}", leaf))
    return {name: value for name, value in found.values() if value.requires_grad}


def owned(
    model: Program, guide: Program, batch: Batch, weights: Mapping[str, Tensor]
) -> tuple[set[str], set[str]]:
    """Names of the parameters that the model's density and the guide's draws and density reach.

    It is found by differentiation, so that it does not matter where a parameter lives; one that
    both programs use (tied weights, everything under ``guides.Exact``) is in both sets.
    """
    args, kwargs = arguments(batch)
    devices = sorted({t.device.index or 0 for t in _tensors(batch) if t.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), poutine.block():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        drawn = _site_values(guide_trace)
        fixed = {n: v.detach() if isinstance(v, Tensor) else v for n, v in drawn.items()}
        model_trace = poutine.trace(_Substitute(fixed)(model)).get_trace(*args, **kwargs)
        ends = [
            [_log_prob(node).sum() for node in _sites(trace).values()]
            for trace in (model_trace, guide_trace)
        ]
    ends[1] += [v.sum() for v in drawn.values() if isinstance(v, Tensor)]
    of_model, of_guide = (_reached(scalars, weights) for scalars in ends)
    return of_model, of_guide


def _reached(scalars: list[Tensor], weights: Mapping[str, Tensor]) -> set[str]:
    """Names of the parameters on which any of the scalars depends."""
    live = [scalar for scalar in scalars if scalar.requires_grad]
    if not live:
        return set()
    gradients = torch.autograd.grad(live, list(weights.values()), allow_unused=True)
    return {name for name, g in zip(weights, gradients, strict=True) if g is not None}


def named_tensors(model: Program, guide: Program) -> dict[str, Tensor]:
    """Parameters and buffers of the modules of a pair, as ``role.name``, each once."""
    own: dict[int, tuple[str, Tensor]] = {}
    for role, program in (("model", model), ("guide", guide)):
        module = module_of(program)
        for name, tensor in module.state_dict(keep_vars=True).items() if module else ():
            own.setdefault(id(tensor), (f"{role}.{name}", tensor))
    return dict(own.values())


def module_of(program: Program) -> nn.Module | None:
    """The module that a program is, or is a method of; ``None`` for a plain function.

    Pyro's handlers (``poutine.scale(model, scale=0.1)``) and ``functools.partial`` are looked
    through.
    """
    program = unwrap(program)
    while isinstance(program, functools.partial):
        program = program.func
    owner = getattr(program, "__self__", program)
    return owner if isinstance(owner, nn.Module) else None


def plate_scale(model: Program, batch: Batch) -> float:
    """N/B of a model whose data plate is subsampled to B of N data by the caller; one otherwise.

    A plate that picks its rows itself, out of a batch of all N, counts as one.
    """
    args, kwargs = arguments(batch)
    with _quiet(batch):
        trace = _attempt("model", poutine.trace(model), args, kwargs)
    rows = leading_size(batch)
    for node in _sites(trace).values():
        for frame in _frames(node):
            if node["is_observed"] and frame.full_size and frame.size == rows:
                return float(frame.full_size / frame.size)
    return 1.0


def arguments(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as positional and keyword arguments of a program."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


# --- looking at a pair, once -------------------------------------------------------------------


def inspect(
    model: Program,
    guide: Program,
    batch: Batch,
    *,
    data_plate: str | None = None,
    vectorize: bool = True,
) -> Layout:
    """Run a pair once to find its plates and sites, and refuse what cannot work.

    Draws from a copy of the random state: the caller's stream is left where it was.

    Raises:
        ProgramError: The programs do not fit each other; the message names site and remedy.
        DataError: Observed data outside the support of their likelihood.
    """
    args, kwargs = arguments(batch)
    with _quiet(batch):
        guide_trace = _attempt("guide", poutine.trace(guide), args, kwargs)
        prior_trace = _attempt_prior(model, args, kwargs)
        _check_sites(prior_trace, guide_trace)
        _check_shapes(prior_trace, guide_trace)
        substituted = _Substitute(_site_values(guide_trace))(model)
        try:
            model_trace = _attempt("model", poutine.trace(substituted), args, kwargs)
        except ProgramError:
            _check_latent_supports(prior_trace, guide_trace)  # where it is the cause, it is said
            raise
        _check_latent_supports(model_trace, guide_trace)
        layout = _find_layout(model_trace, guide_trace, batch, data_plate, vectorize=vectorize)
        _check_supports(model_trace)
        _check_vectorized(model, guide, batch, layout)
    return layout


@contextlib.contextmanager
def _quiet(batch: Batch) -> Iterator[None]:
    """No gradients and no trace left in the random streams or in an outer handler."""
    devices = sorted({t.device.index or 0 for t in _tensors(batch) if t.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.no_grad(), poutine.block():
        yield


def _attempt(role: str, traced: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return traced.get_trace(*args, **kwargs)
    except ProgramError:
        raise
    except Exception as error:
        raise ProgramError(f"the {role} failed on the batch: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _attempt_prior(model: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A trace of the model on its own draws: what it expects of each latent site."""
    return _attempt("model", poutine.trace(model), args, kwargs)


def _is_random(node: Any) -> bool:
    if node["type"] != "sample" or node["infer"].get("_deterministic"):
        return False
    return not isinstance(node["fn"], _Subsample)


def _sites(trace: Any) -> dict[str, Any]:
    return {name: node for name, node in trace.nodes.items() if _is_random(node)}


def _latents(trace: Any) -> dict[str, Any]:
    return {name: node for name, node in _sites(trace).items() if not node["is_observed"]}


def _site_values(guide_trace: Any) -> dict[str, Any]:
    """Values to replay: latent draws, and the indices that subsampled plates took."""
    return {
        name: node["value"]
        for name, node in guide_trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"]
    }


def _check_sites(model_trace: Any, guide_trace: Any) -> None:
    latents, drawn = _latents(model_trace), _latents(guide_trace)
    if not latents:
        raise ProgramError(
            "the model has no latent site: give it at least one pyro.sample without obs"
        )
    if len(latents) == len(_sites(model_trace)):
        raise ProgramError("the model has no observed site: pass obs=x to one of its pyro.sample")
    auxiliary = {n for n, node in drawn.items() if node["infer"].get("is_auxiliary")}
    missing = [n for n in latents if n not in drawn]
    extra = [n for n in drawn if n not in latents and n not in auxiliary]
    if missing and all(latents[n]["infer"].get("enumerate") for n in missing):
        raise ProgramError(
            f"the guide does not draw {_names(missing)}, which the model enumerates: train with "
            "objective=pyro.infer.TraceEnum_ELBO(), or draw them in the guide"
        )
    if missing:
        raise ProgramError(
            f"guide draws sites {_names(drawn)} but the model has latents {_names(latents)}: add "
            f"{', '.join(map(repr, missing))} to the guide or pass latents=model.latents"
        )
    if extra:
        raise ProgramError(
            f"guide draws {_names(extra)}, which the model (latents {_names(latents)}) lacks: "
            "remove it from the guide or mark it infer={'is_auxiliary': True}"
        )


def _names(names: Any) -> str:
    return "{" + ", ".join(map(repr, names)) + "}"


def _check_shapes(model_trace: Any, guide_trace: Any) -> None:
    for name, node in _latents(model_trace).items():
        expected, came = tuple(node["value"].shape), tuple(guide_trace.nodes[name]["value"].shape)
        if expected != came:
            raise ProgramError(
                f"site {name!r}: the model expects values of shape {expected}, the guide draws "
                f"{came}: give both the same size (and the same plates)"
            )
        event_dim = node["fn"].event_dim
        guide_dim = guide_trace.nodes[name]["fn"].event_dim
        if event_dim != guide_dim:
            raise ProgramError(
                f"site {name!r}: the model treats its last {event_dim} dimensions as one event, "
                f"the guide its last {guide_dim}: add .to_event({event_dim}) in the guide"
            )


def _check_latent_supports(model_trace: Any, guide_trace: Any) -> None:
    for name, node in _latents(model_trace).items():
        _check_latent_support(name, node["fn"], guide_trace.nodes[name])


def _check_latent_support(name: str, prior: Any, drawn: Any) -> None:
    """The guide's draws must be possible under the model: integers, positive numbers, ..."""
    try:
        support = prior.support
    except NotImplementedError:
        return
    families = type(_base(prior)).__name__, type(_base(drawn["fn"])).__name__
    own = _support(drawn["fn"])
    if support is None or bool(support.check(drawn["value"]).all()):
        if support in _SURFACES or getattr(support, "is_discrete", False) or own not in _SURFACES:
            return
        raise ProgramError(
            f"site {name!r}: the guide ({families[1]}) draws on {_in_words(own)}, a surface in the "
            f"space of the model's {families[0]}, so their densities cannot be compared: use a "
            "guide of the model's support, or a prior of the guide's"
        )
    raise ProgramError(
        f"site {name!r}: the model ({families[0]}) takes values in {_in_words(support)}, the guide "
        f"({families[1]}) draws values outside it: use a guide of that support"
    )


_SURFACES = (constraints.sphere, constraints.simplex)  # of no volume in the space around them


def _frames(node: Any) -> list[Any]:
    return [frame for frame in node["cond_indep_stack"] if frame.vectorized]


def _find_layout(
    model_trace: Any, guide_trace: Any, batch: Batch, data_plate: str | None, *, vectorize: bool
) -> Layout:
    data_dim, data_plates = _find_data_plates(model_trace, batch, data_plate)
    nodes = [*_sites(model_trace).values(), *_sites(guide_trace).values()]
    depth = max(
        [-data_dim]
        + [-frame.dim for node in nodes for frame in _frames(node)]
        + [len(node["fn"].batch_shape) for node in nodes]
    )
    latents = _latents(model_trace)
    local = [n for n, node in latents.items() if any(f.name in data_plates for f in _frames(node))]
    drawn = [n for n in _latents(guide_trace) if n in latents]
    score_sites = {
        n: type(_base(node["fn"])).__name__
        for n, node in _latents(guide_trace).items()
        if not node["fn"].has_rsample
    }
    observed = {n: node for n, node in _sites(model_trace).items() if node["is_observed"]}
    return Layout(
        particle_dim=-1 - depth,
        data_dim=data_dim,
        data_plates=data_plates,
        latents=tuple(local),
        globals=tuple(n for n in latents if n not in local),
        observed=tuple(observed),
        entries=_entries(observed, batch),
        score_sites=score_sites,
        supports=_supports(observed, batch),
        in_order=drawn == list(latents),
        vectorize=vectorize,
        event_dims={n: node["fn"].event_dim for n, node in _latents(guide_trace).items()},
    )


def _base(distribution: Any) -> Any:
    while hasattr(distribution, "base_dist") and not hasattr(distribution, "transforms"):
        distribution = distribution.base_dist
    return distribution


def _find_data_plates(
    model_trace: Any, batch: Batch, data_plate: str | None
) -> tuple[int, frozenset[str]]:
    """The data plate's dimension, and the names it goes by there."""
    rows = leading_size(batch)
    observed = {n: node for n, node in _sites(model_trace).items() if node["is_observed"]}
    frames = [frame for node in observed.values() for frame in _frames(node)]
    wanted = data_plate if data_plate is not None else "data"
    named = {frame.dim: frame for frame in frames if frame.name == wanted}
    if data_plate is not None and not named:
        raise ProgramError(
            f"no observed site is inside a plate called {data_plate!r}: the plates there are "
            f"{_names(sorted({frame.name for frame in frames}))}"
        )
    fitting = {f.dim: f for f in frames if f.size == rows or f.full_size not in (None, f.size)}
    found = named or fitting
    if not found:
        raise ProgramError(
            f"the model has no data plate: put observed sites {_names(observed)} inside "
            f'`with pyro.plate("data", {rows}, dim=-1)`, its size the number of rows of the batch'
        )
    if len(found) > 1:
        either = " and ".join(f"{f.name!r} (dim {f.dim})" for f in found.values())
        raise ProgramError(
            f"the model has two data plates, {either}, each as long as the batch: call one of them "
            '"data" or pass data_plate='
        )
    data_dim = int(next(iter(found)))
    return data_dim, frozenset(frame.name for frame in frames if frame.dim == data_dim)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        yield from _tensors(list(batch.values()))
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from _tensors(value)


def leading_size(batch: Batch) -> int:
    """Rows of the first tensor in a batch."""
    for value in _tensors(batch):
        if value.dim() > 0:
            return value.shape[0]
    raise ProgramError("a batch must hold at least one tensor with a row for each datum")


def _supports(observed: Mapping[str, Any], batch: Batch) -> dict[str, tuple[Any, Any]]:
    args, kwargs = arguments(batch)
    entries = [*enumerate(args), *kwargs.items()]
    return {
        name: (key, support)
        for name, node in observed.items()
        for key, value in entries
        if node["value"] is value and (support := _checkable_support(node)) is not None
    }


def _checkable_support(node: Any) -> Any:
    """A site's support; ``None`` where some of its data are masked out, or none is declared."""
    return None if _masks(node) else _support(node["fn"])


def _check_supports(model_trace: Any) -> None:
    for name, node in _sites(model_trace).items():
        support = _checkable_support(node) if node["is_observed"] else None
        if support is not None:
            check_support(name, support, torch.as_tensor(node["value"]), _base(node["fn"]))


def check_support(name: str, support: Any, value: Tensor, family: Any = None) -> None:
    """Refuse observed values outside the support of their likelihood.

    Raises:
        DataError: names the site, the first offending row and value, and what would help.
    """
    inside = support.check(value)
    if bool(inside.all()):
        return
    row = int((~inside).nonzero()[0][0])
    cells = value[row].reshape(-1)
    unit = _unit(support)
    outside = cells[~unit.check(cells).reshape(-1)] if cells.numel() else cells
    worst = f"{float(outside[0]):g}" if outside.numel() else "a value outside it"
    likelihood = f"the {type(family).__name__} likelihood of " if family is not None else ""
    hint = "; binarise the data (binarize='dynamic') or use continuous_bernoulli or gaussian"
    is_binary = str(unit).startswith("Boolean")
    raise DataError(
        f"{likelihood}site {name!r} takes values in {_in_words(support)}, row {row} of the "
        f"data has {worst}{hint if is_binary else ': transform the data or change the likelihood'}"
    )


def _unit(support: Any) -> Any:
    """A constraint on single numbers, from within ``independent``."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def _in_words(support: Any) -> str:
    unit = _unit(support)
    words = str(unit).removesuffix("()")
    return words if len(words) < 60 else type(unit).__name__  # bounds that differ between data


def _check_vectorized(model: Program, guide: Program, batch: Batch, layout: Layout) -> None:
    """Two particles at once: the shapes must come out as ``(2, B)`` at every site."""
    num_particles = 2 if layout.vectorize else 1
    remedy = "write it so that a leading particle dimension passes through, or pass vectorize=False"
    try:
        guide_trace = _run_guide(guide, batch, num_particles, layout, detach=False)
        values = _site_values(guide_trace)
        model_trace = _run_model(model, batch, values, num_particles, layout)
    except Exception as error:
        raise ProgramError(
            f"the programs do not run with {num_particles} particles at once "
            f"({_reason(error)}): {remedy}"
        ) from error
    for role, trace in (("model", model_trace), ("guide", guide_trace)):
        _check_terms(role, trace, layout, num_particles, _num_data(model_trace, layout, batch))


def _check_terms(role: str, trace: Any, layout: Layout, num_particles: int, rows: int) -> None:
    for name, node in _sites(trace).items():
        if name in layout.globals:
            continue
        shape = tuple(_log_prob(node).shape)
        excess = len(shape) + layout.particle_dim
        at_data = shape[layout.data_dim] if len(shape) >= -layout.data_dim else 1
        if excess > 0 or at_data not in (1, rows):
            raise ProgramError(
                f"{role} site {name!r} has a log density of shape {shape}, which does not end in "
                f"the data dimension of size {rows}: add .to_event(n) for its own dimensions, or a "
                "plate"
            )
        if name in layout.latents and at_data != rows:
            raise ProgramError(
                f"{role} site {name!r} is one value for all {rows} data: draw it inside the "
                '"data" plate, one per datum'
            )


# --- reading a model alone -----------------------------------------------------------------------


class ModelSite(NamedTuple):
    """One random statement of a model, as it came out on a batch.

    Attributes:
        distribution: Its distribution, batch shape as the plates made it.
        value: Its value.
        is_observed: Whether the value is given.
        plates: Its plates, with name, dim (``None`` for a sequential one), size and full_size.
        enumerate: What ``infer`` says of enumeration.
        mask: Tensor of ``poutine.mask``, or ``None``.
        log_prob: Log density of the value, batch shape.
    """

    distribution: Any
    value: Any
    is_observed: bool
    plates: tuple[Any, ...]
    enumerate: str | None
    mask: Any
    log_prob: Tensor


class _Bounded(Messenger):  # type: ignore[misc]
    """Stops a program that never ends, and remembers the last site it drew."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.seen, self.last = most, 0, ""

    def _pyro_sample(self, msg: Any) -> None:
        self.seen, self.last = self.seen + 1, msg["name"]
        if self.seen > self.most:
            raise ProgramError(self.refusal())

    def refusal(self) -> str:
        return (
            f"site {self.last!r} comes after {self.seen} sites and the model still goes on: bound "
            "its recursion, or draw the sites of a loop as one site with an event dimension"
        )


def read_model(
    model: Program,
    batch: Batch,
    *,
    values: Mapping[str, Any] | None = None,
    seed: int = 0,
    most: int = 4000,
) -> tuple[dict[str, ModelSite], int, frozenset[str]]:
    """Run a model once on its own draws and tell what it did.

    Args:
        model: The generative program.
        batch: B data.
        values: Latent site -> value to take instead of a draw, within its support or not.
        seed: Seed of the draws; the caller's random streams are left where they are.
        most: Number of sites after which the program counts as endless.

    Returns:
        Every random site in the order of the program, the dimension of the data plate and its
        names.

    Raises:
        ProgramError: The model fails on the batch, does not end, or has no data plate.
        DataError: Observed data outside the support of their likelihood.
    """
    args, kwargs = arguments(batch)
    bounded = _Bounded(most)
    checked = contextlib.nullcontext() if values is None else pyro.validation_enabled(False)
    with _quiet(batch), checked:
        torch.manual_seed(seed)
        try:
            program = bounded(_Substitute(values or {})(model))
            trace = _attempt("model", poutine.trace(program), args, kwargs)
        except ProgramError as error:
            if bounded.seen > most or isinstance(error.__cause__, RecursionError):
                raise ProgramError(bounded.refusal()) from error
            raise
        data_dim, data_plates = _find_data_plates(trace, batch, None)
        if values is None:
            _check_supports(trace)
        return {n: _model_site(node) for n, node in _sites(trace).items()}, data_dim, data_plates


def _model_site(node: Any) -> ModelSite:
    found = node["infer"].get("enumerate")
    return ModelSite(
        distribution=node["fn"],
        value=node["value"],
        is_observed=bool(node["is_observed"]),
        plates=tuple(node["cond_indep_stack"]),
        enumerate=found if isinstance(found, str) else None,
        mask=node["mask"] if isinstance(node["mask"], Tensor) else None,
        log_prob=_log_prob(node),
    )


def read_dependencies(
    model: Program, batch: Batch, *, seed: int = 0
) -> dict[str, frozenset[Any]] | None:
    """Site -> what its density is computed from, by labels that travel with the tensors.

    A label is the name of another site, or ``("batch", key)`` for a tensor of the batch. ``None``
    where a program does what labels cannot follow.
    """
    from pyro.infer.inspect import TrackProvenance
    from pyro.ops.provenance import ProvenanceTensor, get_provenance

    def labelled(key: Any, value: Any) -> Any:
        fits = isinstance(value, Tensor) and value.dim() > 0
        return ProvenanceTensor(value, frozenset({("batch", key)})) if fits else value

    args, kwargs = arguments(batch)
    args = tuple(labelled(key, value) for key, value in enumerate(args))
    kwargs = {key: labelled(key, value) for key, value in kwargs.items()}
    with _quiet(batch), pyro.validation_enabled(False):
        torch.manual_seed(seed)
        try:
            trace = poutine.trace(TrackProvenance()(model)).get_trace(*args, **kwargs)
            return {
                name: frozenset(get_provenance(node["fn"].log_prob(node["value"])))
                for name, node in _sites(trace).items()
            }
        except Exception:  # whatever it is, the model ran without labels
            return None


# --- running a pair, every step ----------------------------------------------------------------


def _plated(program: Program, num_particles: int, layout: Layout) -> Program:
    if not layout.vectorize:
        return program
    return pyro.plate("particles", num_particles, dim=layout.particle_dim)(program)  # type: ignore[no-any-return]


def _run_guide(
    guide: Program, batch: Batch, num_particles: int, layout: Layout, *, detach: bool
) -> Any:
    args, kwargs = arguments(batch)
    traced = poutine.trace(_plated(guide, num_particles, layout)).get_trace
    if detach:
        traced = _Detach()(traced)  # outermost, so that the trace records what it left
    return traced(*args, **kwargs)


def _run_model(
    model: Program, batch: Batch, values: Mapping[str, Any], num_particles: int, layout: Layout
) -> Any:
    args, kwargs = arguments(batch)
    program = _Substitute(values)(_plated(model, num_particles, layout))
    return poutine.trace(program).get_trace(*args, **kwargs)


def _call_both(model: Program, guide: Program, batch: Batch) -> Callable[[], None]:
    def run() -> None:
        args, kwargs = arguments(batch)
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
        _Substitute(_site_values(trace))(model)(*args, **kwargs)

    return run


def _gated(gate: Gate, name: str, value: Any, layout: Layout) -> Any:
    if name not in layout.latents:
        return value
    return gate(value, layout, layout.event_dims[name])


def _log_prob(node: Any, value: Tensor | None = None) -> Tensor:
    """Unscaled log density of a site, zero where it is masked out."""
    value = _filled(node) if value is None else value
    log_prob: Tensor = node["fn"].log_prob(value, *node["args"], **node["kwargs"])
    mask = node["mask"]
    if mask is None or mask is True:
        return log_prob
    if mask is False:
        return torch.zeros_like(log_prob)
    return torch.where(mask, log_prob, log_prob.new_zeros(()))


def _support(distribution: Any) -> Any:
    try:
        return distribution.support
    except NotImplementedError:  # a user's own distribution need not declare one
        return None


def _masks(node: Any) -> list[tuple[Any, int]]:
    """Masks on a site, by ``poutine.mask`` or ``dist.mask``: each with its event dimensions."""
    distribution = node["fn"]
    masks = [(node["mask"], distribution.event_dim)]
    while hasattr(distribution, "base_dist") and not hasattr(distribution, "transforms"):
        masks.append((getattr(distribution, "_mask", None), distribution.event_dim))
        distribution = distribution.base_dist
    return [(mask, event_dim) for mask, event_dim in masks if mask is not None]


def _filled(node: Any) -> Any:
    """A site's value; data that are masked out give way to a value inside the support.

    A NaN there would survive the mask in the gradient, zero times NaN being NaN.
    """
    value = node["value"]
    if not node["is_observed"]:
        return value
    for mask, event_dim in _masks(node):
        if isinstance(mask, Tensor):
            inside = _inside(_support(node["fn"]), value)
            value = torch.where(mask.reshape(mask.shape + (1,) * event_dim), value, inside)
    return value


def _inside(support: Any, value: Tensor) -> Tensor:
    """Values inside a support, of the shape of ``value``; ``value`` itself where none is known."""
    unit = _unit(support)
    if getattr(unit, "is_discrete", False):
        return torch.zeros_like(value) + getattr(unit, "lower_bound", 0)
    try:
        inside: Tensor = torch.distributions.transform_to(support)(torch.zeros_like(value))
    except (NotImplementedError, AttributeError):
        return value
    return inside


def _num_data(trace: Any, layout: Layout, batch: Batch) -> int:
    """B: the size of the data plate, which a subsampled plate makes smaller than the batch."""
    for name, node in _sites(trace).items():
        for frame in _frames(node):
            if frame.dim == layout.data_dim and name not in layout.globals:
                return int(frame.size)
    return leading_size(batch)


def _reduce(log_prob: Tensor, layout: Layout, num_particles: int, num_data: int) -> Tensor:
    """Sum a site over its inner plates: batch shape -> ``(K, B)``."""
    padded = log_prob.reshape((1,) * (-layout.particle_dim - log_prob.dim()) + log_prob.shape)
    data_dim = padded.dim() + layout.data_dim
    inner = [d for d in range(1, padded.dim()) if d != data_dim]
    summed = padded.sum(inner) if inner else padded
    return summed.expand(num_particles, num_data)


def _is_local(name: str, node: Any, log_prob: Tensor, layout: Layout, num_data: int) -> bool:
    if name in layout.globals:
        return False
    if any(frame.dim == layout.data_dim for frame in _frames(node)):
        return True
    return log_prob.dim() >= -layout.data_dim and log_prob.shape[layout.data_dim] == num_data > 1


def _term(
    name: str,
    node: Any,
    layout: Layout,
    num_particles: int,
    num_data: int,
    value: Tensor | None = None,
) -> Tensor:
    """A site's log density: ``(K, B)`` inside the data plate, ``(K,)`` outside."""
    log_prob = _log_prob(node, value)
    if _is_local(name, node, log_prob, layout, num_data):
        return _reduce(log_prob, layout, num_particles, num_data)
    at_particles = log_prob.dim() == -layout.particle_dim
    return (log_prob.flatten(1).sum(1) if at_particles else log_prob.sum()).expand(num_particles)


def _terms(
    sites: Mapping[str, Any], layout: Layout, num_particles: int, num_data: int
) -> dict[str, Tensor]:
    return {
        name: _term(name, node, layout, num_particles, num_data) for name, node in sites.items()
    }


def _weigh(
    model_trace: Any, guide_trace: Any, layout: Layout, num_particles: int, batch: Batch
) -> Particles:
    num_data = _num_data(model_trace, layout, batch)
    model_sites, guide_sites = _sites(model_trace), _sites(guide_trace)
    log_p = _terms(model_sites, layout, num_particles, num_data)
    log_q = _terms(guide_sites, layout, num_particles, num_data)
    local = {("p", n) for n, t in log_p.items() if t.dim() == 2}
    local |= {("q", n) for n, t in log_q.items() if t.dim() == 2}
    scale, plate_scale, relative, shared = _scales(model_sites, guide_sites, layout, local)
    return Particles(
        values={n: node["value"] for n, node in _latents(guide_trace).items()},
        log_p={n: t for n, t in log_p.items() if t.dim() == 2},
        log_q={n: t for n, t in log_q.items() if t.dim() == 2},
        observed=tuple(n for n, node in model_sites.items() if node["is_observed"]),
        global_log_p={n: t for n, t in log_p.items() if t.dim() == 1},
        global_log_q={n: t for n, t in log_q.items() if t.dim() == 1},
        global_scale=shared,
        scale=scale,
        plate_scale=plate_scale,
        relative_scale=relative,
    )


def _scales(
    model_sites: Mapping[str, Any],
    guide_sites: Mapping[str, Any],
    layout: Layout,
    local: set[tuple[str, str]],
) -> tuple[Scale, float, dict[tuple[str, str], Scale], dict[tuple[str, str], Scale]]:
    """The first observed site's factor as the common one; who differs from it, and by what.

    Sites outside the data plate (not in ``local``) come last, with their whole factor.
    """
    reference = next(model_sites[n] for n in layout.observed if ("p", n) in local)
    common = reference["scale"]
    plate_scale = 1.0
    for frame in _frames(reference):
        if frame.dim == layout.data_dim and frame.full_size is not None:
            plate_scale = frame.full_size / frame.size
    relative: dict[tuple[str, str], Scale] = {}
    shared: dict[tuple[str, str], Scale] = {}
    for role, sites in (("p", model_sites), ("q", guide_sites)):
        for name, node in sites.items():
            if (role, name) not in local:
                shared[role, name] = node["scale"]
                continue
            if _same(node["scale"], common):
                continue
            plated = any(frame.dim != layout.particle_dim for frame in _frames(node))
            if role == "q" and not plated and _same(node["scale"], 1.0):
                continue  # a guide without plates follows the model
            relative[role, name] = node["scale"] / common
    return common, plate_scale, relative, shared


def _same(a: Scale, b: Scale) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    return abs(float(a) - float(b)) <= 1e-9 * abs(float(b))


def _score(
    guide: Program, batch: Batch, guide_trace: Any, layout: Layout, num_particles: int
) -> dict[str, Tensor]:
    """``log q`` at the draws held fixed, differentiable in the guide's parameters alone.

    A lower site's density depends on a higher site's value: with several sites the guide is run
    again on the fixed values, so that no path through a draw is left in it.
    """
    sites = _latents(guide_trace)
    num_data = _num_data(guide_trace, layout, batch)
    fixed = {
        n: v.detach() if isinstance(v, Tensor) else v for n, v in _site_values(guide_trace).items()
    }
    if len(sites) > 1:
        args, kwargs = arguments(batch)
        program = _Substitute(fixed)(_plated(guide, num_particles, layout))
        sites = _latents(poutine.trace(program).get_trace(*args, **kwargs))
    return {n: _term(n, s, layout, num_particles, num_data, fixed[n]) for n, s in sites.items()}


def _closed_form_kl(
    model_trace: Any, guide_trace: Any, particles: Particles, layout: Layout, num_particles: int
) -> dict[str, Tensor]:
    if not layout.in_order:
        raise ProgramError(
            "a closed-form KL needs guide and model to draw their latent sites in the same order: "
            "reorder the guide or use analytic_kl=False"
        )
    num_data = particles.shape[1]
    kl = {}
    for name in layout.latents:
        prior, posterior = model_trace.nodes[name], guide_trace.nodes[name]
        try:
            term = torch.distributions.kl_divergence(posterior["fn"], prior["fn"])
        except NotImplementedError:
            kl[name] = particles.log_q[name] - particles.log_p[name]
            continue
        mask = prior["mask"]
        if isinstance(mask, Tensor):
            term = torch.where(mask, term, term.new_zeros(()))
        kl[name] = _reduce(term, layout, num_particles, num_data)
    auxiliary = {n: t for n, t in particles.log_q.items() if n not in kl}
    return {**kl, **auxiliary}


def _stack(parts: list[Particles]) -> Particles:
    """Particles that were run one by one, joined along K."""

    def join(name: str) -> Any:
        first = getattr(parts[0], name)
        if first is None:
            return None
        return {key: torch.cat([getattr(part, name)[key] for part in parts]) for key in first}

    values = {k: torch.stack([part.values[k] for part in parts]) for k in parts[0].values}
    names = ("log_p", "log_q", "score", "kl", "global_log_p", "global_log_q")
    return dataclasses.replace(parts[0], values=values, **{name: join(name) for name in names})


# --- the latent sites as one flat, unconstrained vector ------------------------------------------


def prior_of(model: Program) -> Program:
    """``p(z)`` as a guide: the model with its observed sites out of sight."""
    hidden: Program = poutine.block(model, hide_fn=lambda msg: bool(msg.get("is_observed")))
    return hidden


def site_priors(model: Any, sites: Iterable[str]) -> dict[str, Any]:
    """Site -> its distribution in one run of ``model(size=1)``, batch shape ``(1,)`` or ``()``.

    Args:
        model: A model that generates by itself.
        sites: Names of its latent sites.

    Raises:
        ProgramError: it does not generate so, or has no such site.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), poutine.block():
            trace = poutine.trace(model).get_trace(size=1)
        return {name: trace.nodes[name]["fn"] for name in sites}
    except Exception as error:
        raise ProgramError(
            f"model(size=1) does not show the supports of its latent sites "
            f"({type(error).__name__}: {error}): let the model generate so, or use another guide"
        ) from error


class _Unconstrained(Messenger):  # type: ignore[misc]
    """Gives the local latent sites their values from a flat vector ``(K, B, L)``, in order.

    Each piece goes through the bijection onto its site's support, which may depend on the sites
    above it; ``log_jacobian`` collects ``log |dz/du|`` of each site, ``(K, B)``.
    """

    def __init__(self, flat: Tensor, layout: Layout) -> None:
        super().__init__()
        self.flat, self.layout = flat, layout
        self.used = 0
        self.log_jacobian: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name, family = msg["name"], msg["fn"]
        if name not in self.layout.latents or msg["is_observed"]:
            return
        bijection, batch_dims = _bijection(name, family), len(family.batch_shape)
        shape = tuple(bijection.inverse_shape(family.shape()))
        num_particles, num_data = self.flat.shape[:2]
        size = math.prod(shape) // (num_data * (num_particles if self.layout.vectorize else 1))
        piece = self.flat[..., self.used : self.used + size]
        self.used += size
        free = _from_rows(piece, shape, batch_dims, self.layout)
        value = bijection(free)
        log_jacobian = bijection.log_abs_det_jacobian(free, value)
        log_jacobian = log_jacobian.reshape(free.shape[:batch_dims] + (-1,)).sum(-1)
        self.log_jacobian[name] = _reduce(log_jacobian, self.layout, num_particles, num_data)
        msg["value"], msg["done"] = value, True


def path_ends(
    model: Program, guide: Program | None, batch: Batch, flat: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    """``log q(z|x) |dz/du|`` and ``log p(x, z) |dz/du|`` at flat latents ``u``, each ``(K, B)``.

    Args:
        model: The generative program.
        guide: The inference program; ``None`` for the prior ``p(z)`` in its place.
        batch: B data.
        flat: ``(K, B, L)``, as :func:`unconstrain` gives it.
        layout: What :func:`inspect` found.
    """
    if not layout.vectorize and len(flat) > 1:
        ends = [path_ends(model, guide, batch, one, layout) for one in torch.split(flat, 1)]
        return torch.cat([end[0] for end in ends]), torch.cat([end[1] for end in ends])
    num_particles, num_data = flat.shape[:2]
    args, kwargs = arguments(batch)
    placed = _Unconstrained(flat, layout)
    program = placed(_plated(model, num_particles, layout))
    trace = poutine.trace(program).get_trace(*args, **kwargs)
    terms = _terms(_sites(trace), layout, num_particles, num_data)
    log_jacobian = sum_terms(placed.log_jacobian)
    if guide is None:
        log_q = sum_terms({name: terms[name] for name in layout.latents})
    else:
        log_q = log_guide(guide, batch, _site_values(trace), num_particles, layout)
    return log_q + log_jacobian, sum_terms(terms) + log_jacobian


def unconstrain(
    model: Program, batch: Batch, values: Mapping[str, Any], num_particles: int, layout: Layout
) -> Tensor:
    """Latent draws as one flat vector of free real numbers, ``(K, B, L)``.

    Args:
        model: The generative program, whose supports and order of sites count.
        batch: B data.
        values: Latent site -> draws, as :func:`sample_guide` gives them.
        num_particles: K.
        layout: What :func:`inspect` found.
    """
    trace = _run_model(model, batch, values, num_particles, layout)
    rows = []
    for name, node in _latents(trace).items():
        if name in layout.latents:
            free = _bijection(name, node["fn"]).inv(node["value"])
            rows.append(_as_rows(free, len(node["fn"].batch_shape), layout))
    return torch.cat(rows, -1)


def check_continuous(
    model: Program, guide: Program, batch: Batch, layout: Layout, num_draws: int = 16
) -> None:
    """Refuse a pair whose latents cannot be moved along a path of densities from q to p.

    Raises:
        ProgramError: A latent site is shared by all data, discrete, without a bijection, or drawn
            by the guide on a part of its support only; the guide has sites of its own; or the
            data plate picks its own rows.
    """
    if layout.globals:
        raise ProgramError(
            f"site {layout.globals[0]!r} is shared by all data, so there is no evidence of one "
            "datum: move it inside the data plate, or condition on it"
        )
    draws = num_draws if layout.vectorize else 1
    prior_trace = _run_guide(prior_of(model), batch, draws, layout, detach=False)
    rows, total = _num_data(prior_trace, layout, batch), leading_size(batch)
    if rows != total:
        raise ProgramError(
            f"the data plate picks {rows} of {total} rows by itself: pass the rows to be judged "
            "and let the plate span them"
        )
    for name, node in _latents(prior_trace).items():
        if name in layout.latents:
            _bijection(name, node["fn"])
    values = _site_values(prior_trace)
    args, kwargs = arguments(batch)
    log_guide(guide, batch, values, draws, layout)
    given = _Substitute(values)(_plated(guide, draws, layout))
    for name, node in _latents(poutine.trace(given).get_trace(*args, **kwargs)).items():
        support = _support(node["fn"])
        if support is not None and not bool(support.check(node["value"]).all()):
            raise ProgramError(
                f"site {name!r}: the guide ({type(_base(node['fn'])).__name__}) draws on "
                f"{_in_words(support)}, only a part of the model's support, so the evidence would "
                "come out too low: use a guide of the model's support, or start='prior'"
            )


def generate(
    model: Program,
    guide: Program,
    num_data: int,
    example: Batch | None = None,
    *,
    data_plate: str | None = None,
    vectorize: bool = True,
) -> tuple[Batch, dict[str, Tensor], Layout]:
    """Data that a model draws, with their latents: one exact posterior draw for each datum.

    Args:
        model: The generative program. Without an example it is called as ``model(size=num_data)``
            and returns the data; with one it is called on it, its observed sites drawn instead.
        guide: The inference program, by which the latent sites are told.
        num_data: B.
        example: B data whose observed tensors are replaced; what else is in the batch (covariates,
            say) stays.
        data_plate: Name of the plate that indexes the data, where several could.
        vectorize: Whether the programs take all particles at once.

    Returns:
        The batch, latent site -> value with one particle, and the layout of the pair.

    Raises:
        ProgramError: The model does not generate that way, or what it returns is not what it drew.
    """
    if example is None:
        trace, batch = _generated(model, num_data)
    else:
        args, kwargs = arguments(example)
        trace = _attempt("model", poutine.trace(poutine.uncondition(model)), args, kwargs)
        with _quiet(example):
            observed = _observed_entries(model, example)
        batch = _with_entries(example, {k: trace.nodes[n]["value"] for n, k in observed.items()})
    layout = inspect(model, guide, batch, data_plate=data_plate, vectorize=vectorize)
    sites, rows = _sites(trace), leading_size(batch)
    values = {n: _one_particle(sites[n], layout) for n in (*layout.latents, *layout.globals)}
    drawn = sum_terms({n: t for n, t in _terms(sites, layout, 1, rows).items() if t.dim() == 2})
    scored = log_joint(model, batch, values, 1, layout)
    if not torch.allclose(drawn, scored, rtol=1e-3, atol=1e-2):
        raise ProgramError(
            f"the model gives its own draw {float(drawn[0, 0]):.6g} nats when drawing and "
            f"{float(scored[0, 0]):.6g} when scoring it: let it return the values of its observed "
            "sites, and let no site depend on the data but through them"
        )
    return batch, values, layout


def _generated(model: Program, num_data: int) -> tuple[Any, Batch]:
    remedy = "let the model return simulated data when called so, or pass example data"
    try:
        trace = poutine.trace(model).get_trace(size=num_data)
    except Exception as error:
        raise ProgramError(
            f"model(size={num_data}) does not generate ({_reason(error)}): {remedy}"
        ) from error
    batch = trace.nodes["_RETURN"]["value"]
    if next(_tensors(batch), None) is None:
        raise ProgramError(
            f"model(size={num_data}) returns {type(batch).__name__}, not data: {remedy}"
        )
    return trace, batch


def _one_particle(node: Any, layout: Layout) -> Tensor:
    """A site's value with every batch dimension of the layout, the particle's of size one."""
    value: Tensor = node["value"]
    batch_dims = -layout.particle_dim - (0 if layout.vectorize else 1)
    return value.reshape((1,) * (batch_dims - len(node["fn"].batch_shape)) + value.shape)


def _bijection(name: str, family: Any) -> Any:
    """Free real numbers onto a latent site's support."""
    support = _support(family)
    if support is None or getattr(support, "is_discrete", False):
        raise ProgramError(
            f"site {name!r} ({type(_base(family)).__name__}) is discrete or of no known support: "
            "annealing moves continuous latents only, so use importance sampling, or sum the site "
            "out of the model"
        )
    if isinstance(support, torch.distributions.constraints.MixtureSameFamilyConstraint):
        support = support.base_constraint
    try:
        return torch.distributions.biject_to(support)
    except NotImplementedError:
        raise ProgramError(
            f"site {name!r} takes values in {_in_words(support)}, onto which torch has no "
            "bijection from free real numbers: use importance sampling"
        ) from None


def _as_rows(value: Tensor, batch_dims: int, layout: Layout) -> Tensor:
    """A site's values ``(K, ..., B, ...)`` as rows ``(K, B, n)``."""
    axis = batch_dims + layout.data_dim
    if not layout.vectorize:
        value, axis = value.unsqueeze(0), axis + 1
    moved = value.movedim(axis, 1)
    return moved.reshape(*moved.shape[:2], -1)


def _from_rows(rows: Tensor, shape: tuple[int, ...], batch_dims: int, layout: Layout) -> Tensor:
    """The reverse of :func:`_as_rows`, for values of a given shape."""
    axis = batch_dims + layout.data_dim
    if not layout.vectorize:
        shape, axis = (1, *shape), axis + 1
    others = [size for dim, size in enumerate(shape) if dim not in (0, axis)]
    value = rows.reshape(*rows.shape[:2], *others).movedim(1, axis)
    return value if layout.vectorize else value.squeeze(0)
