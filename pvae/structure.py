"""What a model is made of: sites, supports, plates and dependencies, read from its own traces.

The model is run a few times on one batch. What has to be the same at each run (which sites there
are, their shapes, supports and plates) is compared; what depends on what is found in two ways that
miss different things: by labels that travel with the tensors, and by drawing one site anew and
seeing which densities move.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.errors import ProgramError
from pvae.particles import ModelSite, base_family, read_dependencies, read_model, support_of
from pvae.placement import (
    Entry,
    Plate,
    Where,
    categories_of,
    describe,
    entries_of,
    fill_axes,
    find,
    find_mask,
    mask_of,
    plates_of,
    unit_of,
    with_axis,
)  # fmt: skip

__all__ = ["Latent", "Observed", "Structure", "read"]

Sites = dict[str, ModelSite]

_NUM_RUNS = 6
_MOST_MOVED = 24  # latents up to which each is drawn anew
_NUM_DRAWS = 64  # of each site's conditional prior, per run


@dataclass(frozen=True)
class Latent:
    """A site that the guide has to draw.

    Attributes:
        name: Its name.
        family: Name of its distribution's class.
        support: Its support, ``event_shape`` included.
        event_shape: Shape of one draw.
        plates: Names of its plates, data plate included, from the outermost in.
        is_global: Whether it is outside the data plate.
        enumerate: What the model says of its enumeration.
        mask: Where in the batch its mask is found.
        draws: Values of its conditional prior, ``(S, *event_shape)``.
        categories: Number of values of a categorical site.
    """

    name: str
    family: str
    support: Any
    event_shape: tuple[int, ...]
    plates: tuple[str, ...]
    is_global: bool
    enumerate: str | None
    mask: Where | None
    draws: Tensor
    categories: int | None


@dataclass(frozen=True)
class Observed:
    """A site whose value is given.

    Attributes:
        name: Its name.
        where: Where in the batch the value is found, if it is there.
        support: Its support, or ``None``.
        family: Name of its distribution's class.
        plates: Names of its plates.
        categories: Number of values of a categorical site.
    """

    name: str
    where: Where | None
    support: Any
    family: str
    plates: tuple[str, ...]
    categories: int | None


@dataclass(frozen=True)
class Structure:
    """A model on batches of one form.

    Attributes:
        latents: In the model's order.
        observed: In the model's order.
        parents: Site -> latent sites that its density depends on.
        reads: Site -> tensors of the batch that its density depends on, its own value included.
        plates: By name; those that a latent or observed site is in.
        data: Name of the plate that indexes the data.
        entries: The batch's tensors.
    """

    latents: dict[str, Latent]
    observed: dict[str, Observed]
    parents: dict[str, frozenset[str]]
    reads: dict[str, frozenset[Any]]
    plates: dict[str, Plate]
    data: str
    entries: dict[Any, Entry]


def read(model: Callable[..., Any], batch: Any) -> Structure:
    """Read a model's structure off its traces on an example batch.

    Args:
        model: A Pyro callable with latent and observed sites.
        batch: What it is called with, a few rows are enough; two at least.

    Raises:
        ProgramError: The model's sites, shapes or supports are random, a site has no place in a
            plate, or its support depends on other sites; the message names site and remedy.
    """
    runs = [read_model(model, batch, seed=seed) for seed in range(_NUM_RUNS)]
    first, data_dim, data_names = runs[0]
    _check_same_sites([sites for sites, _, _ in runs])
    drawn = {n: s for n, s in first.items() if not s.is_observed}
    if not drawn:
        raise ProgramError(
            "the model has no latent site: give it at least one pyro.sample without obs"
        )
    tensors = entries_of(batch)
    if max(map(len, tensors.values()), default=0) < 2:
        raise ProgramError(
            "the example batch must hold tensors with a row for each of at least 2 data, so that "
            "their shape shows what a datum is"
        )
    labels = _labels(model, batch, first)
    parents = _parents(model, batch, first, labels)
    observed = {n: s for n, s in first.items() if s.is_observed}
    found = {n: find(s.value, s, data_dim, tensors) for n, s in observed.items()}
    entries = {k: describe(k, tensors, observed, found, data_dim) for k in tensors}
    plates = plates_of(first, data_dim, data_names, entries)
    data = next(n for n in plates if n in data_names)
    fill_axes(entries, plates, data)
    plates = {n: with_axis(p, entries) for n, p in plates.items()}
    return Structure(
        latents={n: _latent(n, [sites[n] for sites, _, _ in runs], data_names, tensors, place)
                 for n, place in _places(drawn).items()},
        observed={n: _observed(n, s, found[n], plates) for n, s in observed.items()},
        parents=parents,
        reads=_reads(first, labels, found, tensors),
        plates=plates,
        data=data,
        entries=entries,
    )  # fmt: skip


# --- what has to be the same at every run --------------------------------------------------------


def _check_same_sites(runs: list[Sites]) -> None:
    first = runs[0]
    for other in runs[1:]:
        for name in [*first, *other]:
            if name not in first or name not in other:
                raise ProgramError(_random_support(name))
            one, two = first[name], other[name]
            shapes = [tuple(s.distribution.shape()) for s in (one, two)]
            if shapes[0] != shapes[1]:
                raise ProgramError(
                    f"site {name!r} has shape {shapes[0]} at one run of the model and {shapes[1]} "
                    "at another: give it one size, and mask what is not used"
                )


def _random_support(name: str) -> str:
    return (
        f"site {name!r} is drawn at some runs of the model and not at others, so no guide can be "
        "derived: draw it at every run, and mask it (poutine.mask) where it is not used"
    )


# --- what depends on what ------------------------------------------------------------------------


def _labels(model: Callable[..., Any], batch: Any, sites: Sites) -> dict[str, Any] | None:
    labels = read_dependencies(model, batch)
    if labels is not None and labels.keys() == sites.keys():
        return labels
    latents = [n for n, s in sites.items() if not s.is_observed]
    if len(latents) > _MOST_MOVED:
        raise ProgramError(
            f"the model's {len(latents)} latent sites cannot be followed through its operations "
            f"(the first is {latents[0]!r}): keep to torch operations on whole tensors"
        )
    return None


def _parents(
    model: Callable[..., Any], batch: Any, sites: Sites, labels: Mapping[str, Any] | None
) -> dict[str, frozenset[str]]:
    latents = [n for n, s in sites.items() if not s.is_observed]
    found = {n: set((labels or {}).get(n, ())) for n in sites}
    if len(latents) <= _MOST_MOVED:
        for name in latents:
            for moved in _moved(model, batch, sites, name):
                found[moved].add(name)
    position = {n: i for i, n in enumerate(sites)}
    return {
        n: frozenset(u for u in latents if u in above and position[u] < position[n])
        for n, above in found.items()
    }


def _reads(
    sites: Sites,
    labels: Mapping[str, Any] | None,
    found: Mapping[str, Where | None],
    tensors: Mapping[Any, Tensor],
) -> dict[str, frozenset[Any]]:
    """Site -> entries of the batch that enter its density or mask; all where it is not known."""
    every = frozenset(tensors)
    if labels is None:
        return dict.fromkeys(sites, every)
    values = {n: every if w is None else frozenset({w.entry}) for n, w in found.items()}
    reads = {}
    for name in sites:
        keys = {label[1] for label in labels[name] if isinstance(label, tuple)} & every
        for other in labels[name]:
            keys |= values.get(other, frozenset())
        mask = find_mask(sites[name].mask, tensors) if sites[name].mask is not None else None
        keys |= {mask.entry} if mask is not None else set()
        reads[name] = frozenset(keys) | values.get(name, frozenset())
    return reads


def _moved(model: Callable[..., Any], batch: Any, sites: Sites, name: str) -> list[str]:
    """Sites whose density changes when one latent takes another value and all others stay."""
    values = {n: s.value for n, s in sites.items() if not s.is_observed}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        values[name] = sites[name].distribution.sample()
    other, _, _ = read_model(model, batch, values=values)
    for missing in sites.keys() ^ other.keys():
        raise ProgramError(_random_support(missing))
    return [
        n for n, s in other.items()
        if n != name and not torch.equal(s.log_prob.nan_to_num(), sites[n].log_prob.nan_to_num())
    ]  # fmt: skip


# --- sites ---------------------------------------------------------------------------------------


def _places(names: Iterable[str]) -> dict[str, int]:
    """How many sites before each are called like it, but for their number."""
    seen: dict[str, int] = {}
    places = {}
    for name in names:
        stem = re.sub(r"\d+(\D*)$", r"*\1", name)
        places[name] = seen.get(stem, 0)
        seen[stem] = places[name] + 1
    return places


def _latent(
    name: str,
    runs: list[ModelSite],
    data_names: frozenset[str],
    tensors: Mapping[Any, Tensor],
    place: int,
) -> Latent:
    site = runs[0]
    frames = [f for f in site.plates if f.vectorized]
    return Latent(
        name=name,
        family=type(base_family(site.distribution)).__name__,
        support=_static_support(name, runs),
        event_shape=tuple(site.distribution.event_shape),
        plates=tuple(f.name for f in sorted(frames, key=lambda f: int(f.dim))),
        is_global=not any(f.name in data_names for f in frames),
        enumerate=site.enumerate,
        mask=mask_of(name, site, tensors, place),
        draws=_prior_draws(runs),
        categories=categories_of(site.distribution),
    )


def _observed(
    name: str, site: ModelSite, where: Where | None, plates: Mapping[str, Plate]
) -> Observed:
    frames = [f for f in site.plates if f.vectorized]
    return Observed(
        name=name,
        where=where,
        support=support_of(site.distribution),
        family=type(base_family(site.distribution)).__name__,
        plates=tuple(f.name for f in sorted(frames, key=lambda f: int(f.dim))),
        categories=categories_of(site.distribution),
    )


def _static_support(name: str, runs: list[ModelSite]) -> Any:
    """The site's support, its bounds plain numbers; refused where they move."""
    supports = [support_of(site.distribution) for site in runs]
    if supports[0] is None:
        raise ProgramError(
            f"site {name!r} ({type(base_family(runs[0].distribution)).__name__}) does not say what "
            "its support is: give its distribution a 'support', or write the guide by hand"
        )
    bounds = [_bounds(unit_of(s)) for s in supports]
    for key in bounds[0]:
        values = torch.cat([torch.as_tensor(b[key]).reshape(-1).double() for b in bounds])
        if bool((values != values[0]).any()):
            raise ProgramError(
                f"site {name!r} has a support that is not the same for all data and draws "
                f"({key} from {float(values.min()):g} to {float(values.max()):g}): draw a "
                "unit-interval or positive site and scale it in the model"
            )
    return _with_bounds(supports[0], {k: float(torch.as_tensor(v).reshape(-1)[0])
                                      for k, v in bounds[0].items()})  # fmt: skip


def _bounds(unit: Any) -> dict[str, Any]:
    return {k: getattr(unit, k) for k in ("lower_bound", "upper_bound") if hasattr(unit, k)}


def _with_bounds(support: Any, bounds: Mapping[str, float]) -> Any:
    if isinstance(support, torch.distributions.constraints.MixtureSameFamilyConstraint):
        support = support.base_constraint
    if isinstance(support, torch.distributions.constraints.independent):
        inner = _with_bounds(support.base_constraint, bounds)
        dims = support.reinterpreted_batch_ndims
        return torch.distributions.constraints.independent(inner, dims)  # type: ignore[no-untyped-call]
    return type(support)(**bounds) if bounds and not isinstance(support, type) else support


def _prior_draws(runs: list[ModelSite]) -> Tensor:
    rows = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(2)
        for site in runs:
            drawn = site.distribution.sample((_NUM_DRAWS,)).detach()
            flat = drawn.reshape(-1, *site.distribution.event_shape)
            rows.append(flat[torch.randperm(len(flat), device=flat.device)[:_NUM_DRAWS]])
    return torch.cat(rows)
