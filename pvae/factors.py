"""The factorisation of a derived guide: what each latent site is conditioned on, and whose network.

A :class:`Factor` is one statement of the guide. Sites of a loop (``z_1, z_2, ...``) that are
conditioned alike, relative to their own place in it, share one head.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pvae.inversion import inverse
from pvae.structure import Latent, Structure

__all__ = ["Factor", "factorise"]

_NUMBERED = re.compile(r"^(.*?)(\d+)(\D*)$")
_FEWEST = 3  # sites of a loop from which they share a head
_LARGEST_GLOBAL = 64  # numbers of a global site that data are conditioned on


@dataclass(frozen=True)
class Factor:
    """``q(site | given sites, entries)``.

    Attributes:
        site: The latent site.
        head: Name of its head, which sites of a loop share.
        given: Latent sites that it is conditioned on, slot by slot; ``None`` for a slot that is
            empty here and filled for other sites of the loop.
        fillers: For each slot a site that fills it, here or elsewhere in the loop.
        optional: Whether a slot is empty for some site of the loop.
        entries: Tensors of the batch that it is conditioned on.
        step: Its place in the loop, where the loop goes along a sequence.
        observed: Observed sites that its posterior depends on.
        left_out: Global sites that it depends on but which are too large to be conditioned on.
    """

    site: Latent
    head: str
    given: tuple[str | None, ...]
    fillers: tuple[str, ...]
    optional: tuple[bool, ...]
    entries: tuple[Any, ...]
    step: int | None
    observed: tuple[str, ...]
    left_out: tuple[str, ...]


def factorise(structure: Structure, *, early: Collection[str] = ()) -> list[Factor]:
    """The faithful inverse of a model, in the order in which the guide draws its sites.

    Args:
        structure: What the model is made of.
        early: Local sites to be drawn before others of their plate, because they are given in
            batches of another form.
    """
    batch = {key: f"tensor {key!r} of the batch" for key in structure.entries}
    graph: dict[str, Collection[str]] = {node: () for node in batch.values()}
    for name, above in structure.parents.items():
        graph[name] = (*above, *(batch[key] for key in structure.reads[name]))
    level = {n: _level(site, early) for n, site in structure.latents.items()}
    found = inverse(graph, {*structure.observed, *batch.values()}, level)
    nodes = {node: key for key, node in batch.items()}
    return _shared([_factor(structure, name, around, nodes) for name, around in found.items()])


def _level(site: Latent, early: Collection[str]) -> int:
    """Global sites first, then those of the data plate, then those of the plates within."""
    if site.is_global:
        return 0
    return 2 * len(site.plates) + (0 if site.name in early else 1)


def _factor(
    structure: Structure, name: str, around: tuple[str, ...], nodes: Mapping[str, Any]
) -> Factor:
    site = structure.latents[name]
    observed = tuple(n for n in around if n in structure.observed)
    if site.is_global:
        return Factor(site, name, (), (), (), (), None, observed, ())
    above = [n for n in around if n in structure.latents]
    large = [n for n in above if _is_large(structure, structure.latents[n])]
    given = tuple(n for n in above if n not in large)
    keys = {nodes[n] for n in around if n in nodes}
    keys.update(*(structure.reads[n] for n in observed))
    entries = tuple(key for key in structure.entries if key in keys)
    optional = (False,) * len(given)
    return Factor(site, name, given, given, optional, entries, None, observed, tuple(large))


def _is_large(structure: Structure, site: Latent) -> bool:
    if not site.is_global:
        return False
    sizes = [structure.plates[p].size for p in site.plates]
    return math.prod([*site.event_shape, *sizes]) > _LARGEST_GLOBAL


# --- loops ---------------------------------------------------------------------------------------


def _shared(factors: list[Factor]) -> list[Factor]:
    groups: dict[str, list[tuple[int, Factor]]] = {}
    for factor in factors:
        found = _NUMBERED.match(factor.site.name)
        if found and not factor.site.is_global:
            groups.setdefault(f"{found[1]}*{found[3]}", []).append((int(found[2]), factor))
    places: dict[str, tuple[str, int]] = {}
    for stem, members in groups.items():
        members.sort(key=lambda member: member[0])
        if len(members) >= _FEWEST and _is_alike([factor for _, factor in members]):
            places |= {f.site.name: (stem, i) for i, (_, f) in enumerate(members)}
    changed: dict[str, Factor] = {}
    for stem in dict.fromkeys(stem for stem, _ in places.values()):
        changed |= _share(stem, [f for f in factors if places.get(f.site.name, ("",))[0] == stem],
                          places)  # fmt: skip
    return [changed.get(f.site.name, f) for f in factors]


def _is_alike(factors: list[Factor]) -> bool:
    first = factors[0]
    return all(
        (f.site.event_shape, f.site.family, f.site.plates, f.site.categories, str(f.site.support))
        == (first.site.event_shape, first.site.family, first.site.plates, first.site.categories,
            str(first.site.support))
        for f in factors
    )  # fmt: skip


def _share(
    stem: str, factors: list[Factor], places: Mapping[str, tuple[str, int]]
) -> dict[str, Factor]:
    """One head for the sites of a loop, if the fullest of them has every slot of the others."""
    tokens = {f.site.name: _tokens(f, places) for f in factors}
    slots = max(tokens.values(), key=len)
    if any(not set(own) <= set(slots) for own in tokens.values()):
        return {}
    entries = tuple(dict.fromkeys(k for f in factors for k in f.entries))
    optional = tuple(any(slot not in own for own in tokens.values()) for slot in slots)
    return {
        f.site.name: replace(
            f, head=stem, given=tuple(tokens[f.site.name].get(slot) for slot in slots),
            fillers=tuple(slots.values()), optional=optional, entries=entries,
            step=places[f.site.name][1],
        )
        for f in factors
    }  # fmt: skip


def _tokens(factor: Factor, places: Mapping[str, tuple[str, int]]) -> dict[tuple[str, int], str]:
    """What a site is given, relative to its own place in the loop."""
    own = places[factor.site.name][1]
    found = {}
    for name in factor.given:
        assert name is not None
        stem, index = places.get(name, (f"{name} itself", own))
        found[stem, index - own] = name
    return found
