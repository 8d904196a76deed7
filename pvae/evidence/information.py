r"""What a latent carries about the data: KL, mutual information, active units, collapse.

For a data set of N data, with the aggregate posterior ``q(z) = 1/N sum_n q(z | x_n)``::

    mean_n KL(q(z | x_n) || p(z)) = I(n; z) + KL(q(z) || p(z))

Hoffman & Johnson (2016), ELBO surgery. The mutual information cannot exceed ``log N``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.data import as_batch, num_rows, take
from pvae.errors import OptionError, ProgramError
from pvae.evidence.importance import evaluation
from pvae.families import marginals
from pvae.particles import (
    LatentSite,
    Layout,
    Particles,
    by_datum,
    draw,
    inspect,
    log_guide,
    module_of,
    sum_terms,
)

__all__ = ["Dimension", "Information", "information"]

_ACTIVE = 1e-2  # Burda et al. (2016): variance over the data of the posterior mean
_COLLAPSED = 0.05  # nats of KL below which a dimension that is not active is its prior
_STREAM = 102 * 10**7  # apart from that of data simulated with the same small seed
_MAX_PAIRS = 2**22  # numbers held at once by the aggregate posterior


@dataclass(frozen=True)
class Dimension:
    """One dimension of a latent site; nats, means over the data.

    Attributes:
        site: Its site.
        index: Its place among the site's dimensions, in row-major order.
        kl: Mean of ``KL(q(z_j | x) || p(z_j))``, given the latents that either follows from.
        kl_stderr: Its standard error over the data.
        mutual_information: ``kl - marginal_kl``; ``None`` where the marginals are not known.
        mutual_information_stderr: Its standard error over data and draws.
        marginal_kl: ``KL(q(z_j) || p(z_j))`` of the aggregate posterior.
        marginal_kl_stderr: Its standard error over the draws.
        activity: Variance over the data of the posterior mean; ``None`` where there is no mean.
        active: Whether the activity exceeds 0.01 (the KL, where there is none).
        collapsed: Whether it is its prior for all data: not active, and KL below 0.05 nat.
    """

    site: str
    index: int
    kl: float
    kl_stderr: float
    mutual_information: float | None
    mutual_information_stderr: float | None
    marginal_kl: float | None
    marginal_kl_stderr: float | None
    activity: float | None
    active: bool
    collapsed: bool


@dataclass(frozen=True)
class Information:
    """What the latents of N data carry, per dimension and in all; nats.

    Attributes:
        dimensions: Every dimension of every local site whose density falls into dimensions.
        kl: Mean of ``KL(q(z | x) || p(z))`` over all sites, from the draws.
        kl_stderr: Its standard error over the data.
        mutual_information: ``I(n; z)`` of all sites, ``kl - marginal_kl``.
        marginal_kl: ``KL(q(z) || p(z))``.
        marginal_kl_stderr: Standard error of both over data and draws.
        num_data: N, of which ``log N`` bounds the mutual information.
        undivided: Sites whose density does not fall into dimensions.
    """

    dimensions: tuple[Dimension, ...]
    kl: float
    kl_stderr: float
    mutual_information: float
    marginal_kl: float
    marginal_kl_stderr: float
    num_data: int
    undivided: tuple[str, ...] = ()

    @property
    def active_units(self) -> int:
        """Dimensions whose posterior mean varies over the data by more than 0.01."""
        return sum(each.active for each in self.dimensions)

    @property
    def collapsed(self) -> dict[str, tuple[int, ...]]:
        """Site -> its dimensions that are their prior whatever the data; empty in health."""
        found: dict[str, tuple[int, ...]] = {}
        for each in self.dimensions:
            if each.collapsed:
                found[each.site] = (*found.get(each.site, ()), each.index)
        return found

    @property
    def saturated(self) -> bool:
        """Whether the mutual information is within one nat of its ceiling ``log N``."""
        return self.mutual_information > math.log(self.num_data) - 1

    def rows(self) -> list[dict[str, Any]]:
        """One row per dimension."""
        return [dict(vars(each)) for each in self.dimensions]

    def report(self) -> str:
        """The table and its meaning in words."""
        return "\n".join([*_table(self), *_conclusions(self)])

    __str__ = report


def information(
    model: Any,
    guide: Any,
    x: Any,
    *,
    num_draws: int = 4,
    max_data: int = 2000,
    seed: int = 0,
) -> Information:
    r"""KL and mutual information of every latent dimension, and of all of them together.

    The KL of a dimension is in closed form where torch knows it. The aggregate posterior is the
    mixture of all N posteriors, evaluated in full: N x N densities for each draw.

    Args:
        model: The generative program.
        guide: The inference program.
        x: Data: an array, tensor, tuple or dict of them.
        num_draws: Draws per datum.
        max_data: Take at most so many data, the first ones.
        seed: Seed of the draws; the caller's random stream is untouched.

    Raises:
        ProgramError: The programs do not fit each other, no latent site is inside the plate, or one
            is masked out for some of the data.
        OptionError: ``num_draws`` or ``max_data`` is too small.
    """
    if num_draws < 1 or max_data < 2:
        raise OptionError(
            f"num_draws must be at least 1 and max_data 2, got {num_draws} and {max_data}"
        )
    modules = [m for m in (module_of(model), module_of(guide)) if m is not None]
    device = next((p.device for m in modules for p in m.parameters()), torch.device("cpu"))
    batch = as_batch(x, device=device, model=model)
    total = min(num_rows(batch), max_data)
    if total < 2:
        raise OptionError("the information that latents carry needs at least two data, got one")
    rows = take(batch, torch.arange(total, device=device))
    with evaluation(model, guide, seed=_STREAM + seed, device=device):
        layout = inspect(model, guide, rows)
        if layout.globals:
            raise ProgramError(
                f"site {layout.globals[0]!r} is shared by all data: move it inside the data plate, "
                "or condition on it"
            )
        drawn = draw(model, guide, rows, num_draws, layout=layout, sites=True)
        sites = _present(drawn, layout)
        dimensions, undivided = [], []
        for name, site in sites.items():
            found = _dimensions(name, site, layout)
            dimensions += found
            undivided += [] if found else [name]
        kl, marginal = _joint(guide, rows, drawn, layout)
    per_datum = kl.mean(0)
    return Information(
        dimensions=tuple(dimensions),
        kl=float(per_datum.mean()),
        kl_stderr=_stderr(per_datum),
        mutual_information=float((kl - marginal).mean()),
        marginal_kl=float(marginal.mean()),
        marginal_kl_stderr=_stderr(marginal.mean(0)),
        num_data=total,
        undivided=tuple(undivided),
    )


def _present(drawn: Particles, layout: Layout) -> dict[str, LatentSite]:
    """The latent sites without those that are masked out for all data."""
    found: dict[str, LatentSite] = {}
    for name, site in (drawn.sites or {}).items():
        term = site.prior.log_prob(site.value)
        shape = site.value.shape[: site.value.dim() - layout.event_dims[name]]
        full = by_datum(term.expand(shape), _without_events(layout), name)
        whole = full.flatten(2).sum(2) if full.dim() > 2 else full
        if torch.allclose(drawn.log_p[name], whole, rtol=1e-4, atol=1e-4):
            found[name] = site
        elif bool(drawn.log_p[name].any()):
            raise ProgramError(
                f"site {name!r} is masked out for some of the data or within them, so they have no "
                "posterior in common: take data that all have it whole"
            )
    return found


def _stderr(per_datum: Tensor) -> float:
    return float(per_datum.std() / math.sqrt(len(per_datum)))


# --- per dimension -------------------------------------------------------------------------------


def _dimensions(name: str, site: LatentSite, layout: Layout) -> list[Dimension]:
    posterior, prior = marginals(site.posterior), marginals(site.prior)
    if posterior is None or prior is None:
        return []

    def flat(terms: Tensor) -> Tensor:
        """``(K, B, D)`` of a term per dimension."""
        full = by_datum(terms.expand(site.value.shape), layout, name).double()
        return full.reshape(*full.shape[:2], -1)

    kl = flat(_kl(posterior, prior, site.value)).mean(0)
    activity = _activity(posterior, site, flat)
    aggregate = _aggregate(posterior, prior, site, layout, flat)
    rows = []
    for j in range(kl.shape[1]):
        spread = None if activity is None else float(activity[j])
        mean_kl = float(kl[:, j].mean())
        active = spread > _ACTIVE if spread is not None else mean_kl > _ACTIVE
        marginal = None if aggregate is None else aggregate[:, j]
        rows.append(
            Dimension(
                site=name,
                index=j,
                kl=mean_kl,
                kl_stderr=_stderr(kl[:, j]),
                mutual_information=None if marginal is None else mean_kl - float(marginal.mean()),
                mutual_information_stderr=None
                if marginal is None
                else _stderr(kl[:, j] - marginal),
                marginal_kl=None if marginal is None else float(marginal.mean()),
                marginal_kl_stderr=None if marginal is None else _stderr(marginal),
                activity=spread,
                active=active,
                collapsed=not active and mean_kl < _COLLAPSED,
            )
        )
    return rows


def _kl(posterior: Any, prior: Any, value: Tensor) -> Tensor:
    try:
        closed: Tensor = torch.distributions.kl_divergence(posterior, prior)
    except NotImplementedError:
        closed = posterior.log_prob(value) - prior.log_prob(value)
    return closed


def _activity(posterior: Any, site: LatentSite, flat: Any) -> Tensor | None:
    """``Var_x E_q[z_j | x]``, ``(D,)``, free of the variance of the K draws behind a mean."""
    try:
        mean: Tensor = flat(posterior.mean)
    except (NotImplementedError, AttributeError):
        mean = flat(site.value)
    if not bool(mean.isfinite().all()):
        return None
    num_draws = len(mean)
    spread: Tensor = mean.mean(0).var(0)
    if num_draws > 1:
        spread = spread - mean.var(0).mean(0) / num_draws
    elif not hasattr(posterior, "mean"):
        return None
    return spread.clamp(min=0)


def _aggregate(
    posterior: Any, prior: Any, site: LatentSite, layout: Layout, flat: Any
) -> Tensor | None:
    """``log q(z_j) - log p(z_j)`` of each datum's draws, mean over the draws: ``(B, D)``.

    ``None`` where the marginals are not those of one datum: a posterior that follows earlier
    draws, a prior that follows latents or data, inner plates.
    """
    if layout.particle_dim != -2:
        return None
    one = site.value[:1, :1]
    if _varies(posterior, one, 0, site) or _varies(prior, one, None, site):
        return None
    log_p = flat(prior.log_prob(site.value))
    num_draws, num_data = site.value.shape[:2]
    points = site.value.reshape(num_draws * num_data, 1, *site.value.shape[2:])
    first = _density_under_all(posterior, num_data, site)
    chunk = max(1, _MAX_PAIRS // max(1, first(points[:1]).numel()))
    pieces = [
        first(points[k : k + chunk]).double().logsumexp(1) for k in range(0, len(points), chunk)
    ]
    log_q = (torch.cat(pieces) - math.log(num_data)).reshape(num_draws, num_data, -1)
    difference: Tensor = log_q - log_p
    return difference.mean(0)


def _varies(distribution: Any, one: Tensor, over: int | None, site: LatentSite) -> bool:
    """Whether the density of one value differs between draws (``over=0``) or at all (``None``)."""
    terms = distribution.log_prob(one.expand_as(site.value)).expand(site.value.shape)
    reference = terms[:1] if over == 0 else terms[:1, :1]
    return not torch.allclose(terms, reference.expand_as(terms), rtol=1e-4, atol=1e-5)


def _density_under_all(
    posterior: Any, num_data: int, site: LatentSite
) -> Callable[[Tensor], Tensor]:
    """Log density per dimension of points ``(M, 1, ...)`` under each posterior: ``(M, B, D)``."""
    num_draws, event = site.value.shape[0], tuple(site.value.shape[2:])
    full = (num_draws, num_data, *event)
    if set(posterior.arg_constraints) == {"loc", "scale"}:
        loc, scale = (getattr(posterior, n).expand(full)[:1] for n in ("loc", "scale"))
        single = type(posterior)(loc, scale)
        return lambda points: single.log_prob(points).reshape(len(points), num_data, -1)

    def one_by_one(points: Tensor) -> Tensor:
        """A distribution of any other class takes points of its own batch shape."""
        terms = [posterior.log_prob(p.expand(full)).expand(full)[:1] for p in points]
        return torch.cat(terms).reshape(len(points), num_data, -1)

    return one_by_one


# --- all sites together --------------------------------------------------------------------------


def _joint(guide: Any, rows: Any, drawn: Particles, layout: Layout) -> tuple[Tensor, Tensor]:
    """``log q(z|x) - log p(z)`` and ``log q(z) - log p(z)`` of every draw, each ``(K, B)``."""
    num_draws, num_data = drawn.shape
    log_q = sum_terms(drawn.log_q).double()
    log_p = sum_terms({name: drawn.log_p[name].double() for name in layout.latents})
    points = {n: by_datum(drawn.values[n], layout, n).flatten(0, 1) for n in layout.latents}
    width = sum(point[0].numel() for point in points.values())
    chunk = max(1, _MAX_PAIRS // (num_data * width))
    pieces = []
    for start in range(0, num_draws * num_data, chunk):
        part = {n: _for_all_data(p[start : start + chunk], layout, n) for n, p in points.items()}
        count = len(next(iter(part.values())))
        pieces.append(log_guide(guide, rows, part, count, layout).double().logsumexp(1))
    aggregate = (torch.cat(pieces) - math.log(num_data)).reshape(num_draws, num_data)
    return log_q - log_p, aggregate - log_p


def _without_events(layout: Layout) -> Layout:
    import dataclasses

    return dataclasses.replace(layout, event_dims=dict.fromkeys(layout.event_dims, 0))


def _for_all_data(points: Tensor, layout: Layout, name: str) -> Tensor:
    """``(M, inner plates, event)`` to ``(M, inner plates, 1, inner plates, event)``."""
    value = points.unsqueeze(1)
    return value.movedim(1, value.dim() - layout.event_dims[name] + layout.data_dim)


# --- in words ------------------------------------------------------------------------------------


def _table(found: Information) -> list[str]:
    lines = [
        f"{'dimension':<14}{'KL':>9}{'information':>13}{'aggregate KL':>14}{'activity':>10}  state"
    ]
    for each in found.dimensions:
        state = "collapsed" if each.collapsed else "active" if each.active else "not active"
        lines.append(
            f"{f'{each.site}[{each.index}]':<14}{each.kl:>9.3f}"
            f"{_number(each.mutual_information):>13}{_number(each.marginal_kl):>14}"
            f"{_number(each.activity):>10}  {state}"
        )
    lines.append(
        f"{'all together':<14}{found.kl:>9.3f}{found.mutual_information:>13.3f}"
        f"{found.marginal_kl:>14.3f}  (SE {found.marginal_kl_stderr:.3f}, {found.num_data} data)"
    )
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _conclusions(found: Information) -> list[str]:
    lines = [f"{found.active_units} of {len(found.dimensions)} dimensions are active."]
    for site, indices in found.collapsed.items():
        size = sum(each.site == site for each in found.dimensions)
        which = "all its dimensions" if len(indices) == size else (
            f"{len(indices)} of {size} dimensions ({', '.join(map(str, indices[:12]))}"
            f"{', …' if len(indices) > 12 else ''})"
        )  # fmt: skip
        lines.append(
            f"Posterior collapse: site {site!r}, {which}: q(z|x) is the prior whatever x is. Try "
            "a KL weight that rises from 0 (beta=pvae.schedules.linear), free bits, more "
            "particles (iwae), or a weaker decoder; if the evidence is good, fewer dimensions."
        )
    wasted = [
        f"{each.site}[{each.index}]" for each in found.dimensions
        if not each.active and not each.collapsed
    ]  # fmt: skip
    if wasted:
        lines.append(
            f"{', '.join(wasted[:12])} cost KL but do not vary with the data: the guide ignores x "
            "there and misses the prior; train longer."
        )
    if found.saturated:
        lines.append(
            f"The information is near its ceiling log N = {math.log(found.num_data):.2f}: with N = "
            f"{found.num_data} it may be larger, and the aggregate KL smaller; take more data "
            "(max_data)."
        )
    if found.undivided:
        lines.append(f"{', '.join(found.undivided)}: counted in the sum, not by dimension.")
    return lines
