"""Paths through latent space: interpolation between data, and one dimension at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pvae.data import as_batch, num_rows, take
from pvae.errors import OptionError, ProgramError, did_you_mean
from pvae.families import marginals
from pvae.latents import Codes, decode, encode, is_discrete, opened
from pvae.particles import LatentSite, Layout, by_datum, latent_sites, prior_of, sample_guide

__all__ = ["PATHS", "Traversal", "between", "interpolate", "traverse"]

PATHS = ("linear", "spherical")

_PRIOR_DRAWS = 4096  # by which quantiles are taken where a prior has no inverse distribution
_PARALLEL = 1e-6  # sine of an angle below which an arc is a straight line


class Traversal(NamedTuple):
    """What each latent dimension does to the data, one at a time.

    Attributes:
        dimensions: L pairs of site and index (row-major).
        quantiles: ``(T,)`` of the prior.
        values: ``(L, T, N)`` what the dimension was set to.
        decoded: Observed site -> ``(L, T, N, ...)`` means.
    """

    dimensions: tuple[tuple[str, int], ...]
    quantiles: Tensor
    values: Tensor
    decoded: dict[str, Tensor]


def interpolate(
    model: Any,
    guide: Any,
    start: Any,
    end: Any,
    *,
    steps: int = 9,
    path: str = "linear",
    max_pairs: int | None = None,
    seed: int = 0,
    data_plate: str | None = None,
) -> dict[str, Tensor]:
    """Observed site -> ``(T, N, ...)``: means along paths between posterior means of pairs of data.

    The first and the last step are the reconstructions of ``start`` and ``end``.

    Args:
        model: The generative program.
        guide: The inference program.
        start: Data, N rows; what the model does not observe of them (labels, say) stays along a
            path.
        end: As many rows.
        steps: T, both ends included.
        path: As :func:`between` takes it.
        max_pairs: Cap on rows held at once.
        seed: Seed of the draws, where means need draws.
        data_plate: Name of the plate that indexes the data, where several could.

    Raises:
        ProgramError: As :func:`encode` and :func:`decode`, or a latent site is discrete.
        OptionError: ``steps`` is below two, there is no such path, or the rows do not pair up.
    """
    rows, others = num_rows(as_batch(start)), num_rows(as_batch(end))
    if rows != others:
        raise OptionError(f"start and end must have equally many rows, got {rows} and {others}")
    options: dict[str, Any] = {"max_pairs": max_pairs, "seed": seed, "data_plate": data_plate}
    first, last = (encode(model, guide, x, **options) for x in (start, end))
    for name in first.discrete:
        raise ProgramError(f"site {name!r} is discrete: there is nothing between its values")
    latents = {
        name: between(value, last.mean[name], steps, path=path).flatten(0, 1)
        for name, value in first.mean.items()
    }
    index = torch.arange(rows).repeat(steps)
    decoded = decode(model, latents, take(as_batch(start, device="cpu"), index), **options)
    return {name: value.reshape(steps, rows, *value.shape[1:]) for name, value in decoded.items()}


def between(a: Tensor, b: Tensor, steps: int, *, path: str = "linear") -> Tensor:
    r"""``(T, N, ...)`` points from ``a`` to ``b``, both ``(N, ...)``.

    Linear: ``(1 - t) a + t b``. Spherical: ``[sin((1 - t) w) a + sin(t w) b] / sin w`` with w the
    angle between them (Shoemake 1985; White 2016, Sampling generative networks), which keeps the
    norm that points of a standard normal have; a straight line where they are parallel.

    Raises:
        OptionError: ``steps`` is below two, or there is no such path.
    """
    if steps < 2:
        raise OptionError(f"steps must be at least 2, the two ends, got {steps}")
    if path not in PATHS:
        raise OptionError(f"no path is called {path!r}: {did_you_mean(path, PATHS)}")
    t = torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device).reshape(-1, 1, 1)
    first, last = a.reshape(len(a), -1), b.reshape(len(b), -1)
    left, right = 1 - t, t
    if path == "spherical":
        cosine = torch.nn.functional.cosine_similarity(first, last, dim=1)[:, None]
        angle = cosine.clamp(-1, 1).acos()
        sine = angle.sin()
        curved = sine > _PARALLEL
        over = sine.where(curved, sine.new_ones(()))
        left = torch.where(curved, ((1 - t) * angle).sin() / over, left)
        right = torch.where(curved, (t * angle).sin() / over, right)
    return (left * first + right * last).reshape(steps, *a.shape)


def traverse(
    model: Any,
    guide: Any,
    x: Any,
    *,
    steps: int = 9,
    extent: float = 0.95,
    site: str | None = None,
    dimensions: Sequence[int] | None = None,
    max_pairs: int | None = None,
    seed: int = 0,
    data_plate: str | None = None,
) -> Traversal:
    """Decode each datum with one latent dimension after another moved over the prior's quantiles.

    All other dimensions stay at the posterior mean. The quantiles are evenly spaced from
    ``(1 - extent) / 2`` to ``(1 + extent) / 2``, of the dimension's own prior: exact where it has
    an inverse distribution function and follows from nothing else, else those of 4096 draws.

    Args:
        model: The generative program.
        guide: The inference program.
        x: Data, N rows to start from.
        steps: T.
        extent: Share of the prior's mass that is covered.
        site: Only this latent site.
        dimensions: Only these dimensions (row-major) of each site.
        max_pairs: Cap on rows held at once.
        seed: Seed of the draws, where there are any.
        data_plate: Name of the plate that indexes the data, where several could.

    Raises:
        ProgramError: As :func:`encode` and :func:`decode`, or the latent sites are discrete.
        OptionError: A number out of its range, or there is no such site or dimension.
    """
    if steps < 2 or not 0 < extent < 1:
        raise OptionError(
            f"steps must be at least 2 and extent between 0 and 1, got {steps} and {extent}"
        )
    options: dict[str, Any] = {"max_pairs": max_pairs, "seed": seed, "data_plate": data_plate}
    codes = encode(model, guide, x, **options)
    chosen = _chosen(codes, site, dimensions)
    quantiles = torch.linspace((1 - extent) / 2, (1 + extent) / 2, steps, dtype=torch.float64)
    ranges = _prior_quantiles(model, guide, x, quantiles, seed, data_plate)
    size = len(codes)
    moved, values = [], []
    for name, index in chosen:
        settings = ranges[name][:, :, index]  # (T, N)
        base = codes.mean[name].reshape(size, -1).repeat(steps, 1)
        base[:, index] = settings.flatten()
        latents = {n: v.repeat(steps, *[1] * (v.dim() - 1)) for n, v in codes.mean.items()}
        latents[name] = base.reshape(latents[name].shape)
        moved.append(latents)
        values.append(settings)
    joined = {name: torch.cat([latents[name] for latents in moved]) for name in codes.mean}
    row = torch.arange(size).repeat(steps * len(chosen))
    decoded = decode(model, joined, take(as_batch(x, device="cpu"), row), **options)
    shaped = {n: v.reshape(len(chosen), steps, size, *v.shape[1:]) for n, v in decoded.items()}
    return Traversal(tuple(chosen), quantiles, torch.stack(values), shaped)


def _chosen(
    codes: Codes, site: str | None, dimensions: Sequence[int] | None
) -> list[tuple[str, int]]:
    real = {n: v[0].numel() for n, v in codes.mean.items() if n not in codes.discrete}
    if not real:
        raise ProgramError(
            f"the latent sites ({', '.join(codes.mean)}) are discrete: only real ones can be "
            "traversed"
        )
    if site is not None and site not in real:
        raise OptionError(f"no real latent site is called {site!r}: {did_you_mean(site, real)}")
    chosen = []
    for name in real if site is None else [site]:
        for index in range(real[name]) if dimensions is None else dimensions:
            if not 0 <= index < real[name]:
                raise OptionError(
                    f"site {name!r} has dimensions 0 to {real[name] - 1}, got {index}"
                )
            chosen.append((name, index))
    return chosen


def _prior_quantiles(
    model: Any, guide: Any, x: Any, quantiles: Tensor, seed: int, data_plate: str | None
) -> dict[str, Tensor]:
    """Site -> ``(T, N, D)`` quantiles of each dimension's prior."""
    found: dict[str, list[Tensor]] = {}
    with opened(model, guide, x, _PRIOR_DRAWS, 2**16, seed, data_plate, vectorize=True) as work:
        for rows in work:
            exact = latent_sites(model, prior_of(model), rows, 2, work.layout)
            empirical: dict[str, Tensor] = {}
            for name, each in exact.items():
                if is_discrete(each.prior):
                    continue
                table = _exact_quantiles(name, each, quantiles, work.layout)
                if table is None:
                    if not empirical:
                        drawn, _ = sample_guide(prior_of(model), rows, _PRIOR_DRAWS, work.layout)
                        empirical = {n: by_datum(drawn[n], work.layout, n) for n in exact}
                    values = empirical[name].reshape(*empirical[name].shape[:2], -1)
                    table = torch.quantile(values, quantiles.to(values), dim=0)
                found.setdefault(name, []).append(table.cpu())
    return {name: torch.cat(tables, 1) for name, tables in found.items()}


def _exact_quantiles(
    name: str, site: LatentSite, quantiles: Tensor, layout: Layout
) -> Tensor | None:
    """``None`` where the prior has no inverse, or follows from other draws."""
    prior = marginals(site.prior)
    rows = []
    try:
        for quantile in quantiles.to(site.value):
            rows.append(prior.icdf(quantile).expand(site.value.shape))
    except (AttributeError, NotImplementedError):
        return None
    placed = torch.stack([by_datum(row, layout, name) for row in rows])
    table = placed.reshape(*placed.shape[:3], -1)  # (T, 2, N, D)
    return table[:, 0] if torch.equal(table[:, 0], table[:, 1]) else None
