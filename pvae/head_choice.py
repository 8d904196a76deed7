"""Which head a latent site gets: by its support, and by the family that was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.distributions import constraints

from pvae import heads
from pvae.errors import OptionError, ProgramError, did_you_mean
from pvae.guide_source import Call
from pvae.spaces import Space
from pvae.structure import Latent, Structure

__all__ = ["FAMILIES", "families_of", "head_call", "num_features"]

FAMILIES: Mapping[str, Any] = {
    "diagonal": heads.DiagonalHead,
    "flow": heads.FlowHead,
    "full": heads.FullHead,
    "low_rank": heads.LowRankHead,
}
_MOST_CATEGORIES = 1024
_OFF_THE_LINE = ("VonMises", "SineSkewed", "ProjectedNormal")  # densities on a circle or sphere


def families_of(structure: Structure, family: str | Mapping[str, str]) -> dict[str, str]:
    """Site -> the name of its family."""
    by_name = {} if isinstance(family, str) else dict(family)
    for name in [family] if isinstance(family, str) else by_name.values():
        if name not in FAMILIES:
            raise OptionError(f"no family is called {name!r}: {did_you_mean(name, FAMILIES)}")
    for name in by_name:
        if name not in structure.latents:
            hint = did_you_mean(name, structure.latents)
            raise OptionError(f"family names site {name!r}, which is not latent: {hint}")
    found = {}
    for name, site in structure.latents.items():
        wished = family if isinstance(family, str) else by_name.get(name, "diagonal")
        found[name] = _family(site, wished, insist=name in by_name)
    if isinstance(family, str) and family != "diagonal" and family not in found.values():
        site = next(iter(structure.latents.values()))
        raise ProgramError(_unfit(site, family))
    return found


def _family(site: Latent, wished: str, *, insist: bool) -> str:
    if _is_discrete(site):
        if insist and wished != "diagonal":
            raise ProgramError(_unfit(site, wished))
        return "discrete"
    if site.is_global and wished == "flow":
        if insist:
            raise ProgramError(
                f"site {site.name!r} is shared by all data and has no context for a flow: take "
                "family 'full' or 'low_rank' for it"
            )
        return "diagonal"
    return wished


def _unfit(site: Latent, family: str) -> str:
    kind = f"discrete ({site.family})" if _is_discrete(site) else "shared by all data"
    return (
        f"family {family!r} does not fit site {site.name!r}, which is {kind}: leave its family out"
    )


def _is_discrete(site: Latent) -> bool:
    return bool(getattr(site.support, "is_discrete", False))


def _unit(site: Latent) -> Any:
    unit = site.support
    while isinstance(unit, constraints.independent):
        unit = unit.base_constraint
    return unit


def head_call(site: Latent, family: str, context: int, options: Mapping[str, Any]) -> Call:
    """The head of a site, as a call."""
    if family != "discrete":
        _check_continuous(site)
        return Call(FAMILIES[family], (context, site.event_shape, site.support), options)
    unit = _unit(site)
    if unit is constraints.boolean:
        return Call(heads.BernoulliHead, (context, site.event_shape), options)
    if unit is constraints.one_hot:
        size = site.event_shape[-1]
        one_hot = {"one_hot": True, **options}
        return Call(heads.CategoricalHead, (context, site.event_shape, size), one_hot)
    lower, upper = getattr(unit, "lower_bound", None), getattr(unit, "upper_bound", None)
    if lower != 0 or upper is None or upper >= _MOST_CATEGORIES:
        raise ProgramError(
            f"site {site.name!r} ({site.family}) is discrete and cannot be enumerated (its values "
            f"are {site.support}): cut it off as a Categorical over 0..n, or sum it out of the "
            "model"
        )
    numbers = (context, site.event_shape, int(upper) + 1)
    return Call(heads.CategoricalHead, numbers, options)


def _check_continuous(site: Latent) -> None:
    if site.family == "Delta":
        raise ProgramError(
            f"site {site.name!r} is a Delta, which has no density to infer: use "
            "pyro.deterministic for it"
        )
    if site.family.startswith(_OFF_THE_LINE):
        raise ProgramError(
            f"site {site.name!r} ({site.family}) lives on a circle, which is not the real line: "
            "draw a pair of real numbers and take their angle"
        )


def num_features(site: Latent) -> int:
    """Number of features of a site's value."""
    if _is_discrete(site):
        size: int = head_call(site, "discrete", 0, {}).build().size
        return size
    return int(Space(site.event_shape, site.support).size)
