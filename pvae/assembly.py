"""A derived guide's parts: encoders, heads, and for each site the recipe of its context."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pvae.encoders import ImageEncoder, Scaled, SequenceEncoder, SetEncoder, VectorEncoder
from pvae.errors import OptionError, ProgramError, did_you_mean
from pvae.factors import Factor, factorise
from pvae.guide_source import Call
from pvae.head_choice import families_of, head_call, num_features
from pvae.particles import arguments
from pvae.placement import Entry, Where
from pvae.structure import Latent, Structure, read

__all__ = [
    "ENCODERS",
    "Assembly",
    "Piece",
    "Recipe",
    "assemble",
    "input_name",
    "module_name",
]

ENCODERS = ("image", "sequence", "set", "vector")


@dataclass(frozen=True)
class Piece:
    """A part of a context.

    Attributes:
        kind: ``"entry"`` (features of the data), ``"site"`` (another latent) or ``"absent"`` (a
            slot that other sites of the loop fill).
        key: Entry or site.
        size: Number of features, the flag included.
        dims: Batch dimension of each axis of an entry's features.
        step: The step of a sequence.
        over: Axes of an entry, or batch dimensions of a site, over which features are averaged.
        head: Module name of a site's head.
        depth: Batch dimensions of a global site that become features.
        flagged: Whether a one says that the slot is filled.
    """

    kind: str
    key: Any
    size: int
    dims: tuple[int, ...] = ()
    step: int | None = None
    over: tuple[int, ...] = ()
    head: str = ""
    depth: int = 0
    flagged: bool = False


@dataclass(frozen=True)
class Recipe:
    """One statement of the guide: a site, its head and the parts of its context.

    ``depth`` is the number of batch dimensions that the site's plates take.
    """

    site: Latent
    factor: Factor
    head: str
    family: str
    pieces: tuple[Piece, ...]
    depth: int


@dataclass
class Assembly:
    """All that a derived guide is made of."""

    structure: Structure
    recipes: list[Recipe]
    forms: dict[frozenset[Any], dict[str, Where]]
    encoders: dict[str, nn.Module]
    heads: dict[str, nn.Module]
    calls: dict[str, dict[str, Call]]
    names: dict[Any, str]
    notes: list[str]
    picks_rows: bool
    device: torch.device
    dtype: torch.dtype


def assemble(
    model: Any,
    example: Any,
    *,
    also: Sequence[Any],
    family: str | Mapping[str, str],
    encoder: str | None,
    hidden: Sequence[int],
    activation: str,
    rank: int,
    moments: tuple[Tensor | None, Tensor | None],
    image_shape: Sequence[int] | None,
) -> Assembly:
    """Read the model and build the parts of its guide; arguments as those of the guide."""
    if encoder is not None and encoder not in ENCODERS:
        raise OptionError(f"no encoder is called {encoder!r}: {did_you_mean(encoder, ENCODERS)}")
    batches = [example, *also]
    structures = [read(model, batch) for batch in batches]
    main = max(structures, key=lambda s: len(s.latents))
    batch = batches[structures.index(main)]
    forms = {frozenset(s.entries): _given(main, s) for s in structures}
    early = {name for given in forms.values() for name in given}
    families = families_of(main, family)
    factors = factorise(main, early=early)
    builder = _Builder(main, families, encoder, tuple(hidden), activation, rank, image_shape)
    tensors = _tensors(batch, main)
    used = dict.fromkeys(key for factor in factors for key in factor.entries)
    for key in used:
        builder.add_encoder(main.entries[key], tensors[key], moments if len(used) == 1 else None)
    recipes = [builder.recipe(factor) for factor in factors]
    floating = [t for t in tensors.values() if t.is_floating_point()]
    dtype = floating[0].dtype if floating else torch.get_default_dtype()
    device = next(iter(tensors.values())).device
    rows = main.plates[main.data]
    return Assembly(
        structure=main, recipes=recipes, forms=forms, encoders=builder.encoders,
        heads=builder.heads, calls=builder.calls,
        names={key: input_name(key) for key in main.entries}, notes=builder.notes,
        picks_rows=rows.size != len(next(iter(tensors.values()))), device=device, dtype=dtype,
    )  # fmt: skip


def _tensors(batch: Any, structure: Structure) -> dict[Any, Tensor]:
    args, kwargs = arguments(batch)
    return {k: v for k, v in [*enumerate(args), *kwargs.items()] if k in structure.entries}


def _given(main: Structure, other: Structure) -> dict[str, Where]:
    """Latent sites whose values are in a batch of another form, and where."""
    extra = [n for n in other.latents if n not in main.latents]
    if extra:
        raise ProgramError(
            f"site {extra[0]!r} is latent for one batch and missing for another, so one guide "
            "cannot serve both: derive a guide from each"
        )
    given = {}
    for name in main.latents:
        if name in other.latents:
            continue
        where = other.observed[name].where if name in other.observed else None
        if where is None:
            raise ProgramError(
                f"site {name!r} is latent for one batch and its value for another is not a tensor "
                "of that batch: pass the value as a part of the batch"
            )
        given[name] = where
    return given


class _Builder:
    """Encoders and heads, made one after the other."""

    def __init__(
        self,
        structure: Structure,
        families: Mapping[str, str],
        encoder: str | None,
        hidden: tuple[int, ...],
        activation: str,
        rank: int,
        image_shape: Sequence[int] | None,
    ) -> None:
        self.structure, self.families, self.encoder = structure, families, encoder
        self.hidden, self.activation, self.rank = hidden, activation, rank
        self.image_shape = image_shape
        self.encoders: dict[str, nn.Module] = {}
        self.heads: dict[str, nn.Module] = {}
        self.calls: dict[str, dict[str, Call]] = {"encoders": {}, "heads": {}}
        self.names: dict[str, str] = {}
        self.notes: list[str] = []
        self.depth = max(-plate.dim for plate in structure.plates.values())

    # encoders

    def add_encoder(
        self, entry: Entry, x: Tensor, moments: tuple[Tensor | None, Tensor | None] | None
    ) -> None:
        """Choose the encoder of an entry by its shape, and standardise it."""
        kind, shape = self.kind(entry), entry.shape
        axes = {"set": len(entry.plates) or 1, "sequence": 1}.get(kind, 0)
        options: dict[str, Any] = {"hidden": self.hidden, "activation": self.activation}
        what: Any = VectorEncoder
        extra: tuple[Any, ...] = ()
        if kind == "image":
            flat = len(shape) == 1 and self.image_shape
            what, extra = ImageEncoder, (tuple(self.image_shape or ()) if flat else shape,)
            options = {"width": (*self.hidden, 200)[0], "activation": self.activation}
        elif kind == "sequence":
            what, extra = SequenceEncoder, (shape[0],)
            options = {"width": min(self.hidden[-1], 64), "activation": self.activation}
        elif kind == "set":
            what, extra = SetEncoder, (axes,)
        known = {"counts": entry.is_count, "categories": entry.categories or 0,
                 "missing": entry.has_missing}  # fmt: skip
        inner = Call(Scaled, ((1,) * axes + shape[axes:],), {k: v for k, v in known.items() if v})
        call = Call(what, (inner, *extra), options)
        made = call.build()
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        scaled = made.scaled.to(x.device, dtype)
        mean, scale = moments or (None, None)
        if mean is not None and scale is not None and axes == 0 and kind != "image":
            scaled.set(mean.to(x.device), scale.to(x.device))
        else:
            pooled = range(x.dim()) if kind == "image" else range(1 + axes)
            scaled.fit(x, pooled=tuple(pooled))
        name = input_name(entry.key)
        self.encoders[name], self.calls["encoders"][name] = made, call

    def kind(self, entry: Entry) -> str:
        """vector, image, sequence or set."""
        shape = entry.shape
        if self.encoder is not None and (entry.is_observed or len(self.structure.entries) == 1):
            fits = {"image": bool(self.image_shape) or len(shape) > 1, "vector": True}
            if not fits.get(self.encoder, bool(shape)):
                raise OptionError(
                    f"encoder {self.encoder!r} does not fit data of shape {shape}: leave it out"
                )
            return self.encoder
        if entry.plates and set(entry.plates) == set(range(len(entry.plates))):
            return "set"
        if not self.hidden or not shape:
            return "vector"
        loop = any(len(_loop(self.structure, n)) > 1 for n in self.structure.latents)
        if entry.has_steps or (loop and len(shape) == 2):
            return "sequence"
        if len(shape) == 3:
            return "image"
        if len(shape) == 2:
            square = min(shape) >= 8 and max(shape) <= 4 * min(shape)
            return "image" if square else "sequence"
        return "vector"

    # recipes

    def recipe(self, factor: Factor) -> Recipe:
        """The context of a site, and its head if it is the first of its loop."""
        pieces = [piece for key in factor.entries for piece in self._of_entry(factor, key)]
        for slot, filler in enumerate(factor.fillers):
            pieces.append(self._of_site(factor, slot, filler))
        context = sum(piece.size for piece in pieces)
        name = self.names.get(f"head {factor.head}")
        if name is None:
            name = module_name(factor.head, self.heads)
            self.names[f"head {factor.head}"] = name
            self._head(name, factor, context, pieces)
        self.names[factor.site.name] = name
        family = self.families[factor.site.name]
        depth = max((-self.structure.plates[p].dim for p in factor.site.plates), default=0)
        return Recipe(factor.site, factor, name, family, tuple(pieces), depth)

    def _of_entry(self, factor: Factor, key: Any) -> list[Piece]:
        entry, kind = self.structure.entries[key], self.kind(self.structure.entries[key])
        made: Any = self.encoders[input_name(key)]
        data = (self.structure.plates[self.structure.data].dim,)
        if kind == "sequence":
            step = _step(factor, entry, self.structure)
            return [Piece("entry", key, made.size, data, step=step,
                          over=(1,) if step is None else ())]  # fmt: skip
        if kind != "set":
            return [Piece("entry", key, made.size, data)]
        inner = entry.plates or {0: ""}
        axes = {axis + 1: self.structure.plates[n].dim for axis, n in inner.items() if n}
        own = [a for a, n in inner.items() if n in factor.site.plates]
        over = tuple(a + 1 for a in inner if a not in own)
        whole = Piece("entry", key, made.size, data, over=tuple(a + 1 for a in inner))
        if not own:
            return [whole]
        dims = data + tuple(axes[a + 1] for a in own)
        return [Piece("entry", key, made.size, dims, over=over), whole]

    def _of_site(self, factor: Factor, slot: int, filler: str) -> Piece:
        name, flagged = factor.given[slot], factor.optional[slot]
        site = self.structure.latents[filler]
        size = num_features(site)
        depth = 0
        if site.is_global:
            depth = self.depth
            size *= math.prod(self.structure.plates[p].size for p in site.plates)
        size += flagged
        if name is None:
            return Piece("absent", filler, size)
        beside = [p for p in site.plates if p not in factor.site.plates and not site.is_global]
        over = tuple(self.structure.plates[p].dim for p in beside)
        if over:
            self.notes.append(
                f"{factor.site.name} sees {name} as its mean over plate {', '.join(beside)}"
            )
        return Piece("site", name, size, over=over, head=self.names[name], depth=depth,
                     flagged=flagged)  # fmt: skip

    def _head(self, name: str, factor: Factor, context: int, pieces: Sequence[Piece]) -> nn.Module:
        site = factor.site
        family = self.families[site.name]
        options: dict[str, Any] = {}
        if context and (factor.given or any(p.over or len(p.dims) > 1 for p in pieces)):
            options["hidden"] = self.hidden[-1] if self.hidden else 0
        if site.is_global:
            options["batch"] = self._batch(site)
        if family == "low_rank":
            options["rank"] = self.rank
        call = head_call(site, family, context, options)
        try:
            made = call.build()
        except NotImplementedError:
            raise ProgramError(
                f"site {site.name!r} ({site.family}) takes values in {site.support}, onto which "
                "there is no map from free real numbers: write its guide by hand"
            ) from None
        getattr(made, "space", made).fit(site.draws.to("cpu"))
        self.heads[name], self.calls["heads"][name] = made, call
        return made  # type: ignore[no-any-return]

    def _batch(self, site: Latent) -> tuple[int, ...]:
        """Batch shape of a global site: its plates, where they are."""
        dims = {self.structure.plates[p].dim: self.structure.plates[p].size for p in site.plates}
        return tuple(dims.get(dim, 1) for dim in range(min(dims, default=0), 0))


def _step(factor: Factor, entry: Entry, structure: Structure) -> int | None:
    """The step of a sequence that a site of a loop belongs to; the first for one before it."""
    if factor.step is None:
        return None
    length = len(_loop(structure, factor.site.name))
    late = length - entry.shape[0]
    return max(factor.step - late, 0) if late in (0, 1) else None


def _loop(structure: Structure, name: str) -> list[str]:
    """Latent sites that are called alike but for their number."""
    stem = re.sub(r"\d+(\D*)$", r"*\1", name)
    return [n for n in structure.latents if "*" in stem and re.sub(r"\d+(\D*)$", r"*\1", n) == stem]


def module_name(name: str, taken: Mapping[str, Any]) -> str:
    """A name that a ModuleDict takes, for a site or a loop of sites."""
    safe = re.sub(r"\W", "_", name.replace("*", "each")) or "site"
    while safe in taken or hasattr(nn.ModuleDict, safe) or safe == "training":
        safe += "_"
    return safe


def input_name(key: Any) -> str:
    """The module name of an entry's encoder."""
    return f"input_{key}" if isinstance(key, int) else module_name(key, {})
