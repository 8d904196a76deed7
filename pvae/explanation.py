"""A derived guide in words: what was derived and why."""

from __future__ import annotations

from typing import Any

__all__ = ["explanation"]

_FAMILIES = {
    "diagonal": "Normal with a diagonal covariance, in unconstrained space",
    "discrete": "probabilities of its values",
    "flow": "neural spline flow, in unconstrained space",
    "full": "Normal with a full covariance, in unconstrained space",
    "low_rank": "Normal with a covariance of low rank plus diagonal, in unconstrained space",
}


def explanation(guide: Any) -> str:
    """A paragraph for each site, see :meth:`pvae.guides.derived.Auto.explain`."""
    structure = guide.structure
    data = structure.plates[structure.data]
    factors = " ".join(_factor(recipe) for recipe in guide.recipes)
    lines = [
        f"q = {factors}",
        f"Data plate {data.name!r} (dim {data.dim}); observed {_names(structure.observed)}.",
        "",
    ]
    for key, entry in structure.entries.items():
        lines.append(_entry(guide, key, entry))
    shown: dict[str, list[str]] = {}
    for recipe in guide.recipes:
        alike = shown.setdefault(recipe.head, [])
        alike.append(recipe.site.name)
        if len(alike) < 3:
            lines += ["", *_site(guide, recipe)]
    for alike in shown.values():
        if len(alike) > 2:
            lines += ["", f"{_names(alike[2:])}: as {alike[1]}, each at its own place"]
    if guide.notes:
        lines += ["", "Approximations:", *(f"  {note}" for note in dict.fromkeys(guide.notes))]
    return "\n".join(lines)


def _factor(recipe: Any) -> str:
    given = [str(name) for name in recipe.factor.given if name is not None]
    given += [_input(key) for key in recipe.factor.entries]
    return f"q({recipe.site.name}{' | ' + ', '.join(given) if given else ''})"


def _input(key: Any) -> str:
    return f"input {key}" if isinstance(key, int) else str(key)


def _names(names: Any) -> str:
    return ", ".join(map(str, names)) or "nothing"


def _entry(guide: Any, key: Any, entry: Any) -> str:
    name = guide.names[key]
    if name not in guide.encoders:
        return f"{_input(key)}: shape {entry.shape}; no site depends on it"
    shape = f"{_input(key)}: shape {entry.shape} per datum"
    marks = [
        f"{entry.categories} categories, one-hot" if entry.categories else "",
        "counts, as log(1 + x)" if entry.is_count else "",
        "missing values marked" if entry.has_missing else "",
        f"elements of plate {_names(entry.plates.values())}" if entry.plates else "",
        "scored step by step" if entry.has_steps else "",
    ]
    encoder = guide.encoders[name]
    return "; ".join([shape, *filter(None, marks),
                      f"{type(encoder).__name__} to {encoder.size} features"])  # fmt: skip


def _site(guide: Any, recipe: Any) -> list[str]:
    site, factor = recipe.site, recipe.factor
    head = guide.heads[recipe.head]
    lines = [
        f"{site.name} ~ {site.family}, {_support(site)}",
        f"  plates   {_names(site.plates)}",
        f"  given    {_given(recipe)}",
        f"  why      {_why(guide, factor, site)}",
        f"  head     {type(head).__name__}: {_FAMILIES[recipe.family]}",
    ]
    if recipe.head != site.name and "*" in factor.head:
        lines.append(f"  shared   with the other sites {factor.head} of the loop")
    if site.mask is not None:
        lines.append(f"  mask     that of the model, found in {_input(site.mask.entry)}")
    if factor.left_out:
        lines.append(f"  not given {_names(factor.left_out)}: too large to be conditioned on")
    return lines


def _support(site: Any) -> str:
    """``"4 positive numbers"``, say."""
    unit = site.support
    while hasattr(unit, "base_constraint"):
        unit = unit.base_constraint
    words = str(unit).removesuffix("()").lower()
    lower, upper = getattr(unit, "lower_bound", None), getattr(unit, "upper_bound", None)
    if getattr(unit, "is_discrete", False) and upper is not None:
        words = f"one of {int(upper - lower) + 1} values"
    elif upper is not None:
        words = f"between {lower:g} and {upper:g}"
    elif lower is not None:
        words = "positive" if lower == 0 else f"above {lower:g}"
    shape = f", shape {tuple(site.event_shape)}" if site.event_shape else ""
    return f"{words}{shape}"


def _given(recipe: Any) -> str:
    if recipe.site.is_global:
        return "nothing: it is outside the data plate, so its numbers are parameters"
    given = [_input(key) for key in recipe.factor.entries]
    given += [name for name in recipe.factor.given if name is not None]
    context = sum(piece.size for piece in recipe.pieces)
    return f"{_names(given)} ({context} features)"


def _why(guide: Any, factor: Any, site: Any) -> str:
    children = [n for n, above in guide.structure.parents.items() if site.name in above]
    why = [f"it enters {_names(children)}"] if children else ["nothing depends on it"]
    above = guide.structure.parents[site.name]
    if above:
        why.append(f"it is drawn given {_names(sorted(above))}")
    spouses = [n for n in factor.given if n is not None and n not in above and n not in children]
    if spouses:
        why.append(f"{_names(spouses)} {'is' if len(spouses) == 1 else 'are'} tied to it by what "
                   "both enter, once the data are known")  # fmt: skip
    return "; ".join(why)
