"""Where a model's values, plates and masks lie in the tensors of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.errors import ProgramError
from pvae.particles import ModelSite, arguments, base_family, support_of

__all__ = [
    "Entry", "Plate", "Where", "categories_of", "describe", "entries_of", "fill_axes", "find",
    "find_mask", "mask_of", "plates_of", "unit_of", "with_axis",
]  # fmt: skip

Sites = dict[str, ModelSite]


@dataclass(frozen=True)
class Where:
    """A tensor within the batch: an entry, or the slice of it at one step, or its negation."""

    entry: Any
    step: int | None = None
    negated: bool = False


@dataclass(frozen=True)
class Plate:
    """A plate of the model.

    Attributes:
        name: Its name.
        dim: Its batch dimension.
        size: Its size on the example.
        total: Its full size where it is subsampled, else ``None``.
        axis: (entry, axis) of the batch that is as long, so that its size follows the batch.
    """

    name: str
    dim: int
    size: int
    total: int | None
    axis: tuple[Any, int] | None


@dataclass(frozen=True)
class Entry:
    """A tensor of the batch with a row for each datum.

    Attributes:
        key: Position or name among the model's arguments.
        shape: Shape of one datum.
        plates: Axis of the datum's tensor -> name of the plate it belongs to.
        has_steps: Whether observed sites take it slice by slice along its first axis.
        is_count: Whether it holds counts.
        categories: Number of values, where it holds categories.
        is_observed: Whether a likelihood scores it.
        mask: Where in the batch it is said what of it is scored; the rest is kept from the encoder.
        has_missing: Whether some of it is NaN.
    """

    key: Any
    shape: tuple[int, ...]
    plates: Mapping[int, str]
    has_steps: bool
    is_count: bool
    categories: int | None
    is_observed: bool
    mask: Where | None
    has_missing: bool


# --- the batch -----------------------------------------------------------------------------------


def entries_of(batch: Any) -> dict[Any, Tensor]:
    """The tensors of a batch that have a row for each datum."""
    args, kwargs = arguments(batch)
    tensors = {k: v for k, v in [*enumerate(args), *kwargs.items()] if isinstance(v, Tensor)}
    rows = next((len(v) for v in tensors.values() if v.dim()), 0)
    return {k: v for k, v in tensors.items() if v.dim() and len(v) == rows}


def find(value: Any, site: ModelSite, data_dim: int, tensors: Mapping[Any, Tensor]) -> Where | None:
    """Where in the batch a value is found, the data moved to the front."""
    if not isinstance(value, Tensor):
        return None
    axis = value.dim() - site.distribution.event_dim + data_dim
    front = value.movedim(axis, 0) if 0 < axis < value.dim() else value
    for key, entry in tensors.items():
        if _equal(front, entry):
            return Where(key)
    for key, entry in tensors.items():
        if entry.dim() > 1 and entry.shape[:1] + entry.shape[2:] == front.shape:
            for step in range(entry.shape[1]):
                if _equal(front, entry[:, step]):
                    return Where(key, step)
    return None


def _equal(value: Tensor, entry: Tensor) -> bool:
    if value.numel() != entry.numel() or value.shape[:1] != entry.shape[:1]:
        return False
    both = value.reshape(entry.shape).double(), entry.double()
    return bool(torch.allclose(*both, rtol=0, atol=0, equal_nan=True))


def describe(
    key: Any,
    tensors: Mapping[Any, Tensor],
    observed: Sites,
    found: Mapping[str, Where | None],
    data_dim: int,
) -> Entry:
    """What an entry of the batch is to the model.

    Args:
        key: The entry.
        tensors: All entries.
        observed: The observed sites.
        found: Where in the batch their values are.
        data_dim: Batch dimension of the data plate.
    """
    tensor = tensors[key]
    users = {n: w for n, w in found.items() if w is not None and w.entry == key}
    steps = {where.step for where in users.values()} - {None}
    has_steps = len(steps) > 1  # one slice alone is a target beside its inputs
    scored = [n for n, w in users.items() if has_steps or w.step is None]
    site = observed[scored[0]] if scored else None
    unit = unit_of(support_of(site.distribution)) if site is not None else None
    plates: dict[int, str] = {}
    if site is not None and not has_steps:
        plates = _inner_axes(site, data_dim)
    return Entry(
        key=key,
        shape=tuple(tensor.shape[1:]),
        plates=plates,
        has_steps=has_steps,
        is_count=site is not None and _is_count(unit),
        categories=categories_of(site.distribution) if site is not None else None,
        is_observed=bool(users),
        mask=_mask_of_entry(site, tensors) if site is not None and not has_steps else None,
        has_missing=tensor.is_floating_point() and bool(tensor.isnan().any()),
    )


def _inner_axes(site: ModelSite, data_dim: int) -> dict[int, str]:
    """Axis of a datum's tensor -> inner plate, the data moved to the front."""
    batch_dims = len(site.distribution.batch_shape)
    front = batch_dims + data_dim
    axes = {}
    for frame in site.plates:
        if frame.vectorized and frame.dim != data_dim:
            axis = batch_dims + frame.dim
            axes[axis if axis < front else axis - 1] = frame.name
    return axes


def fill_axes(entries: dict[Any, Entry], plates: Mapping[str, Plate], data: str) -> None:
    """Give covariates that are as long as an inner plate to that plate."""
    inner = [p for p in plates.values() if p.name != data and p.dim != plates[data].dim]
    for key, entry in entries.items():
        if entry.plates or entry.has_steps or entry.is_observed or not entry.shape:
            continue
        fits = [p.name for p in inner if p.size == entry.shape[0]]
        if len(fits) == 1:
            entries[key] = Entry(**{**vars(entry), "plates": {0: fits[0]}})


# --- plates --------------------------------------------------------------------------------------


def plates_of(
    sites: Sites, data_dim: int, data_names: frozenset[str], entries: Mapping[Any, Entry]
) -> dict[str, Plate]:
    """All vectorised plates, by name.

    Raises:
        ProgramError: A latent is in a dimension of no plate, or in a plate that cannot be placed.
    """
    plates: dict[str, Plate] = {}
    first = next(iter(entries))
    for name, site in sites.items():
        if not site.is_observed:
            _check_placed(name, site)
        for f in (f for f in site.plates if f.vectorized):
            is_data = f.name in data_names and f.dim == data_dim
            total = f.full_size if f.full_size not in (None, f.size) else None
            if total is not None and not is_data:
                raise ProgramError(
                    f"site {name!r} is in plate {f.name!r}, which takes {f.size} of {total} "
                    "elements by itself, so the guide cannot tell which: let it span all of them"
                )
            plate = Plate(f.name, f.dim, f.size, total, (first, 0) if is_data else None)
            if plates.setdefault(f.name, plate) != plate:
                raise ProgramError(
                    f"site {name!r}: its plate {f.name!r} has another size or dimension than "
                    "before: give each plate a name of its own"
                )
    return plates


def _check_placed(name: str, site: ModelSite) -> None:
    dims = {f.dim: f for f in site.plates if f.vectorized}
    shape = tuple(site.distribution.batch_shape)
    for index, size in enumerate(shape):
        dim = index - len(shape)
        if size > 1 and dim not in dims:
            raise ProgramError(
                f"site {name!r} has a batch dimension of size {size} (dim {dim}) that is in no "
                "plate: add .to_event(n) for its own dimensions, or a pyro.plate"
            )


def with_axis(plate: Plate, entries: Mapping[Any, Entry]) -> Plate:
    """The plate with the batch's axis that it follows, if there is one."""
    if plate.axis is not None:
        return plate
    for key, entry in entries.items():
        for axis, name in entry.plates.items():
            if name == plate.name:
                return Plate(plate.name, plate.dim, plate.size, plate.total, (key, axis + 1))
    return plate


# --- masks ---------------------------------------------------------------------------------------


def mask_of(
    name: str, site: ModelSite, tensors: Mapping[Any, Tensor], place: int = 0
) -> Where | None:
    """Where in the batch a latent's mask is found; of equal columns that nearest to ``place``.

    Raises:
        ProgramError: It is not there, so that a guide could not mask the site too.
    """
    if site.mask is None or (site.mask.numel() == 1 and bool(site.mask)):
        return None
    where = find_mask(site.mask, tensors, place)
    if where is None:
        raise ProgramError(
            f"site {name!r} is masked by a tensor that is not in the batch (nor a column of one, "
            "nor its negation), so the guide cannot mask it too: pass the mask as a part of the "
            "batch"
        )
    return where


def _mask_of_entry(site: ModelSite, tensors: Mapping[Any, Tensor]) -> Where | None:
    """The mask of an observed site that covers whole rows of the batch."""
    if site.mask is None or site.mask.numel() != len(next(iter(tensors.values()))):
        return None
    return find_mask(site.mask, tensors, 0)


def find_mask(mask: Tensor, tensors: Mapping[Any, Tensor], near: int = 0) -> Where | None:
    """Where in the batch a mask is found: an entry, a column of one, or its negation."""
    for key, entry in tensors.items():
        if not bool(((entry == 0) | (entry == 1)).all()):
            continue
        for negated in (False, True):
            candidate = ~entry.bool() if negated else entry.bool()
            if _same_mask(mask, candidate):
                return Where(key, None, negated)
            steps = range(entry.shape[1]) if entry.dim() == 2 else ()
            for step in sorted(steps, key=lambda s: (abs(s - near), s)):
                if _same_mask(mask, candidate[:, step]):
                    return Where(key, step, negated)
    return None


def _same_mask(mask: Tensor, candidate: Tensor) -> bool:
    return mask.numel() == candidate.numel() and torch.equal(
        mask.reshape(-1), candidate.reshape(-1)
    )


# --- distributions -------------------------------------------------------------------------------


def unit_of(support: Any) -> Any:
    """The constraint on single numbers, from within ``independent``."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def categories_of(distribution: Any) -> int | None:
    """Number of values of a categorical distribution, ``None`` for any other."""
    inner = base_family(distribution)
    if "Categorical" in type(inner).__name__ and not hasattr(inner, "temperature"):
        return int(inner.logits.shape[-1])
    return None


def _is_count(unit: Any) -> bool:
    constraints = torch.distributions.constraints
    if unit is None:
        return False
    return unit is constraints.nonnegative_integer or isinstance(unit, constraints.multinomial)
