"""Uses of a trained pair: encode, decode, reconstruct.

Latents are dictionaries, site -> ``(N, ...)`` with the data first, on the CPU; data are batches as
everywhere. The work is done in blocks of rows on the pair's device, in evaluation mode, without
gradients, from a random stream of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.data import as_batch, num_rows, take
from pvae.errors import OptionError, ProgramError
from pvae.evidence.importance import evaluation
from pvae.evidence.sweep import tensors_of
from pvae.families import marginals
from pvae.particles import (
    LatentSite,
    Layout,
    by_datum,
    by_program,
    check_dreams,
    inspect,
    latent_sites,
    observed_sites,
    prior_of,
    sample_guide,
    sample_observed,
)

__all__ = [
    "Blocks",
    "Codes",
    "decode",
    "encode",
    "is_discrete",
    "opened",
    "reconstruct",
    "repeated",
]

_STREAM = 103 * 10**7  # apart from that of data simulated with the same small seed
_MAX_PAIRS = {"cpu": 2**12}  # particles x data held at once


@dataclass(frozen=True)
class Codes:
    """What the guide says of the latents of N data.

    Attributes:
        mean: Site -> ``(N, ...)`` posterior means. A site that follows from earlier draws has its
            conditional mean averaged over them; one without a known mean, that of its draws. A site
            of whole numbers has its most probable value, which a decoder can take.
        scale: Site -> ``(N, ...)`` posterior standard deviations; NaN where they are not known.
        draws: Site -> ``(S, N, ...)`` draws of the guide.
        discrete: Sites of whole numbers.
    """

    mean: dict[str, Tensor]
    scale: dict[str, Tensor]
    draws: dict[str, Tensor]
    discrete: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(next(iter(self.mean.values())))

    def matrix(self, *, draw: int | None = None) -> Tensor:
        """``(N, L)``: the means of all real sites side by side, or one draw of them.

        Raises:
            ProgramError: No site is real.
        """
        chosen = self.mean if draw is None else {n: d[draw] for n, d in self.draws.items()}
        columns = [v.reshape(len(v), -1) for n, v in chosen.items() if n not in self.discrete]
        if not columns:
            raise ProgramError(f"the latent sites {_listed(self.mean)} are discrete: none is real")
        return torch.cat(columns, 1)


def encode(
    model: Any,
    guide: Any,
    x: Any,
    *,
    num_draws: int = 1,
    max_pairs: int | None = None,
    seed: int = 0,
    data_plate: str | None = None,
    vectorize: bool = True,
) -> Codes:
    """Posterior means, standard deviations and draws of every latent site, ``q(z | x_n)``.

    Args:
        model: The generative program.
        guide: The inference program.
        x: Data, N rows.
        num_draws: S.
        max_pairs: Cap on draws x data held at once; 4096 on a CPU, 262144 elsewhere.
        seed: Seed of the draws; the caller's random stream is untouched.
        data_plate: Name of the plate that indexes the data, where several could.
        vectorize: Whether the programs take all particles at once.

    Raises:
        ProgramError: The programs do not fit each other, or a latent site is shared by all data.
        OptionError: ``num_draws`` or ``max_pairs`` is below one.
    """
    _at_least(num_draws=num_draws)
    pieces = []
    with opened(
        model, guide, x, num_draws, max_pairs, seed, data_plate, vectorize=vectorize
    ) as work:
        for rows in work:
            pieces.append(_encoded(model, guide, rows, num_draws, work.layout))
    mean, scale, draws = (
        {
            name: torch.cat([getattr(piece, part)[name] for piece in pieces], axis)
            for name in pieces[0].mean
        }
        for part, axis in (("mean", 0), ("scale", 0), ("draws", 1))
    )
    return Codes(mean, scale, draws, pieces[0].discrete)


def decode(
    model: Any,
    latents: Mapping[str, Any],
    like: Any,
    *,
    draw: bool = False,
    max_pairs: int | None = None,
    seed: int = 0,
    data_plate: str | None = None,
    vectorize: bool = True,
) -> dict[str, Tensor]:
    """Observed site -> ``(N, ...)``: the means of ``p(x | z_n)``, or one draw of each.

    Args:
        model: The generative program.
        latents: Site -> ``(N, ...)``, every latent site of the model.
        like: Data of the form that the model takes, N rows or one for all: what it observes of them
            is not looked at, the rest (labels, say) is passed on. A site that depends on another
            observed one has its mean at that one's value in ``like``.
        draw: Draw data instead.
        max_pairs: Cap on rows held at once.
        seed: Seed of the draws.
        data_plate: Name of the plate that indexes the data, where several could.
        vectorize: Whether the program takes all particles at once.

    Raises:
        ProgramError: Latents are missing or of another shape; the model reads its data while it
            draws them (as an autoregressive decoder does); or a likelihood has no mean.
        OptionError: ``like`` has neither one row nor N.
    """
    given = {name: torch.as_tensor(value) for name, value in latents.items()}
    total = _common_rows(given)
    rows = repeated(like, total)
    pieces = []
    with opened(
        model, prior_of(model), rows, 1, max_pairs, seed, data_plate, vectorize=vectorize
    ) as work:
        check_dreams(model, work.first())
        _check_latents(model, given, work)
        for start, block in work.numbered():
            values = {n: v[start : start + num_rows(block)][None] for n, v in given.items()}
            pieces.append(_decoded(model, values, block, work, draw=draw))
    return {name: torch.cat([piece[name][0] for piece in pieces]) for name in pieces[0]}


def reconstruct(
    model: Any,
    guide: Any,
    x: Any,
    *,
    num_draws: int | None = None,
    max_pairs: int | None = None,
    seed: int = 0,
    data_plate: str | None = None,
    vectorize: bool = True,
) -> dict[str, Tensor]:
    """Observed site -> ``(N, ...)``: ``E[x | z = E z]``, or ``E_q(z | x) E[x | z]`` over draws.

    Args:
        model: The generative program.
        guide: The inference program.
        x: Data, N rows.
        num_draws: Draws of the guide to average over; ``None`` decodes the posterior means.
        max_pairs: Cap on draws x data held at once.
        seed: Seed of the draws.
        data_plate: Name of the plate that indexes the data, where several could.
        vectorize: Whether the programs take all particles at once.

    Raises:
        ProgramError: As :func:`encode` and :func:`decode`.
        OptionError: ``num_draws`` or ``max_pairs`` is below one.
    """
    if num_draws is not None:
        _at_least(num_draws=num_draws)
    draws, pieces = num_draws or 1, []
    with opened(model, guide, x, draws, max_pairs, seed, data_plate, vectorize=vectorize) as work:
        check_dreams(model, work.first())
        for rows in work:
            codes = _encoded(model, guide, rows, draws, work.layout)
            means = {n: v[None] for n, v in codes.mean.items()}
            values = means if num_draws is None else codes.draws
            decoded = _decoded(model, values, rows, work, draw=False)
            pieces.append({name: value.mean(0) for name, value in decoded.items()})
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


# --- blocks of rows ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """Data in blocks of at most ``size`` rows, and the layout of the pair they are for."""

    batch: Any
    size: int
    layout: Layout

    def numbered(self) -> Iterator[tuple[int, Any]]:
        """Blocks of rows, each with the number of its first."""
        total = num_rows(self.batch)
        for start in range(0, total, self.size):
            yield start, self._rows(start, min(start + self.size, total))

    def __iter__(self) -> Iterator[Any]:
        return (rows for _, rows in self.numbered())

    def first(self) -> Any:
        """Two rows to look at."""
        return self._rows(0, min(2, num_rows(self.batch)))

    def _rows(self, start: int, stop: int) -> Any:
        device = next(iter(_leaves(self.batch))).device
        return take(self.batch, torch.arange(start, stop, device=device))


@contextlib.contextmanager
def opened(
    model: Any,
    guide: Any,
    x: Any,
    num_draws: int,
    max_pairs: int | None,
    seed: int,
    data_plate: str | None,
    *,
    vectorize: bool,
) -> Iterator[Blocks]:
    """The data on the pair's device, cut up; the programs in evaluation mode."""
    if max_pairs is not None:
        _at_least(max_pairs=max_pairs)
    device = next((t.device for t in tensors_of(model, guide)), torch.device("cpu"))
    batch = as_batch(x, device=device, model=model)
    cap = _MAX_PAIRS.get(device.type, 2**18) if max_pairs is None else max_pairs
    with evaluation(model, guide, seed=_STREAM + seed, device=device):
        size = max(1, cap // num_draws)
        first = take(batch, torch.arange(min(size, num_rows(batch)), device=device))
        layout = inspect(model, guide, first, data_plate=data_plate, vectorize=vectorize)
        if layout.globals:
            raise ProgramError(
                f"site {layout.globals[0]!r} is shared by all data, so no datum has a code of its "
                "own: move it inside the data plate, or condition on it"
            )
        yield Blocks(batch, size, layout)


def _encoded(model: Any, guide: Any, rows: Any, num_draws: int, layout: Layout) -> Codes:
    """The codes of one block."""
    at_once = num_draws if layout.vectorize else 1
    runs = [latent_sites(model, guide, rows, at_once, layout) for _ in range(num_draws // at_once)]
    discrete = frozenset(n for n in layout.latents if is_discrete(runs[0][n].posterior))
    mean, scale, draws = {}, {}, {}
    for name in layout.latents:
        parts = [_moments(name, run[name], layout) for run in runs]
        centre, spread, values = (torch.cat(column) for column in zip(*parts, strict=True))
        draws[name] = values.cpu()
        if name in discrete:
            mean[name] = centre.to(values.dtype).mode(0).values.cpu()
            scale[name] = spread.mean(0).cpu()
        elif torch.isnan(centre).any():
            mean[name] = values.mean(0).cpu()
            scale[name] = (values.std(0) if num_draws > 1 else torch.nan * values[0]).cpu()
        else:
            mean[name] = centre.mean(0).cpu()
            variance = spread.square().mean(0) + centre.var(0, correction=0)
            scale[name] = variance.sqrt().cpu()
    return Codes(mean, scale, draws, discrete)


def _moments(name: str, site: LatentSite, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Centre, standard deviation (NaN where not known) and draw, each ``(K, B, ...)``."""
    family = marginals(site.posterior)
    family = site.posterior if family is None else family
    unknown = torch.full_like(site.value, torch.nan, dtype=torch.get_default_dtype())
    discrete = is_discrete(site.posterior)
    try:
        centre = site.posterior.mode if discrete else family.mean
    except (AttributeError, NotImplementedError):
        centre = site.value if discrete else unknown.to(site.value)
    try:
        spread = family.variance.sqrt()
    except (AttributeError, NotImplementedError):
        spread = unknown

    def placed(value: Tensor) -> Tensor:
        value = value.expand(site.value.shape)
        return by_datum(value if layout.vectorize else value[None], layout, name)

    return placed(centre), placed(spread), placed(site.value)


def _decoded(
    model: Any, values: Mapping[str, Tensor], rows: Any, work: Blocks, *, draw: bool
) -> dict[str, Tensor]:
    """Observed site -> ``(K, B, ...)`` means or draws, given latents ``(K, B, ...)``."""
    layout, device = work.layout, next(iter(_leaves(rows))).device
    placed = {n: by_program(v.to(device), layout, n) for n, v in values.items()}
    draws = len(next(iter(values.values())))
    number = draws if layout.vectorize else 1
    one_by_one = ({n: v[k] for n, v in placed.items()} for k in range(draws))
    found: dict[str, list[Tensor]] = {}
    for chosen in [placed] if layout.vectorize else one_by_one:
        made = sample_observed(model, rows, chosen, number, layout) if draw else {}
        for name, family in observed_sites(model, rows, chosen, number, layout).items():
            value = made[name] if draw else _mean(name, family)
            value = value if layout.vectorize else value[None]
            axis = value.dim() - family.event_dim + layout.data_dim
            full = value.expand((number, *value.shape[1:])).movedim(axis, 1)
            found.setdefault(name, []).append(full.cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def _mean(name: str, family: Any) -> Tensor:
    """The mean of an observed site; of one of classes, the most probable."""
    shape = family.batch_shape + family.event_shape
    with contextlib.suppress(NotImplementedError, AttributeError):
        mean: Tensor = family.mean
        if not torch.isnan(mean).any():
            return mean.expand(shape)
    with contextlib.suppress(NotImplementedError, AttributeError):
        mode: Tensor = family.mode
        return mode.expand(shape)
    raise ProgramError(
        f"observed site {name!r} ({type(family).__name__}) has no mean that torch knows: from "
        "Python decode with draw=True; pvae sample writes sentences"
    )


def is_discrete(distribution: Any) -> bool:
    """Whether a distribution is known to be of whole numbers."""
    try:
        return bool(distribution.support.is_discrete)
    except (NotImplementedError, AttributeError):
        return False


def _check_latents(model: Any, latents: Mapping[str, Tensor], work: Blocks) -> None:
    """Every latent site of the model, each of the shape it has there."""
    rows = work.first()
    drawn, _ = sample_guide(prior_of(model), rows, 1, work.layout)
    missing = [name for name in work.layout.latents if name not in latents]
    extra = [name for name in latents if name not in work.layout.latents]
    if missing or extra:
        raise ProgramError(
            f"the model has the latent sites {_listed(work.layout.latents)}, the latents given are "
            f"those of {_listed(latents)}: give a value for each, and no others"
        )
    for name, value in latents.items():
        own = drawn[name] if work.layout.vectorize else drawn[name][None]
        expected = tuple(by_datum(own, work.layout, name).shape[2:])
        if tuple(value.shape[1:]) != expected:
            raise ProgramError(
                f"site {name!r} takes {expected} for each datum, got {tuple(value.shape[1:])}"
            )


def _common_rows(latents: Mapping[str, Tensor]) -> int:
    sizes = {name: value.shape[0] if value.dim() else 0 for name, value in latents.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise OptionError(
            f"latents must be site -> (N, ...), N the same for all, got {sizes or 'none'}"
        )
    return next(iter(sizes.values()))


def repeated(like: Any, total: int) -> Any:
    """A template of one row or ``total`` as one of ``total``."""
    batch = as_batch(like)
    rows = num_rows(batch)
    if rows not in (1, total):
        raise OptionError(f"like must have one row or {total}, as many as latents, got {rows}")
    device = next(iter(_leaves(batch))).device
    index = torch.arange(total, device=device)
    return batch if rows == total else take(batch, torch.zeros_like(index))


def _leaves(batch: Any) -> list[Tensor]:
    leaves: list[Tensor] = torch.utils._pytree.tree_leaves(batch)
    return leaves


def _at_least(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise OptionError(f"{name} must be at least 1, got {number}")


def _listed(names: Any) -> str:
    return "{" + ", ".join(map(repr, names)) + "}"
