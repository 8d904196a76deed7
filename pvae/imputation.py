"""Missing cells filled in by what a model makes of the observed ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.data import as_batch, num_rows, take
from pvae.errors import DataError, OptionError, ProgramError
from pvae.evidence.importance import evaluation
from pvae.evidence.sweep import tensors_of
from pvae.log_weights import ess
from pvae.particles import Layout, arguments, draw, inspect, observed_families, sample_observed

__all__ = ["Imputation", "impute"]

_MAX_CELLS = 2**22  # particles x rows x columns held at once


@dataclass(frozen=True)
class Imputation:
    """Rows with their missing cells filled in; observed cells are as they were.

    Attributes:
        mean: ``(N, D)``, each missing cell by its posterior mean, or its most probable value where
            the column's values are names: one best guess, the least squared error.
        draws: ``(M, N, D)``, M draws of the missing cells from their joint posterior predictive:
            what to carry an analysis through, so that its error counts the missing cells.
        ess: ``(N,)`` effective sample size of each row's K weights.
    """

    mean: Tensor
    draws: Tensor
    ess: Tensor

    def __repr__(self) -> str:
        rows, columns = self.mean.shape
        return f"Imputation({rows} x {columns}, {len(self.draws)} draws)"


def impute(
    model: Any,
    guide: Any,
    x: Any,
    num_particles: int = 1000,
    *,
    num_draws: int = 20,
    seed: int = 0,
) -> Imputation:
    r"""Fill in the cells that are NaN by sampling-importance-resampling.

    With ``z_k ~ q(z | x_obs)`` and ``w_k`` proportional to ``p(x_obs, z_k) / q(z_k | x_obs)``, of
    sum one, ``E[x_mis | x_obs]`` is estimated by ``sum_k w_k E[x_mis | z_k]``, a name by the vote
    of draws of ``p(x_mis | z_k)`` with weights ``w_k``, and a joint draw is one of
    ``p(x_mis | z_k)`` with k of probability ``w_k`` (Mattei & Frellsen 2019).

    Args:
        model: The generative program; ``takes_missing`` says that it knows NaN.
        guide: The inference program.
        x: Rows ``(N, D)`` with NaN where a cell is missing, or a tuple that begins with them.
        num_particles: K.
        num_draws: M.
        seed: Seed of all draws; the caller's random stream is untouched.

    Raises:
        OptionError: ``num_particles`` or ``num_draws`` is out of range.
        DataError: ``x`` has NaN, and the model does not take them.
        ProgramError: The model does not observe ``x`` itself.
    """
    if num_particles < 1 or num_draws < 0:
        raise OptionError(
            "num_particles must be at least 1 and num_draws at least 0, got "
            f"{num_particles} and {num_draws}"
        )
    device = next((t.device for t in tensors_of(model, guide)), torch.device("cpu"))
    batch = as_batch(x, device=device, model=model)
    rows = arguments(batch)[0][0]
    if rows.dim() != 2:
        raise DataError(f"x has shape {tuple(rows.shape)}, expected rows (N, D): flatten it")
    block = max(1, _MAX_CELLS // (num_particles * rows.shape[1]))
    pieces = []
    with evaluation(model, guide, seed=seed, device=device):
        layout: Layout | None = None
        for index in torch.split(torch.arange(num_rows(batch), device=device), block):
            part = take(batch, index)
            layout = inspect(model, guide, part) if layout is None else layout
            pieces.append(_impute(model, guide, part, num_particles, num_draws, layout))
    mean, draws, sizes = zip(*pieces, strict=True)
    return Imputation(torch.cat(mean).cpu(), torch.cat(draws, 1).cpu(), torch.cat(sizes).cpu())


def _impute(
    model: Any, guide: Any, batch: Any, num_particles: int, num_draws: int, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    x = arguments(batch)[0][0]
    particles = draw(model, guide, batch, num_particles, layout=layout)
    families = observed_families(model, batch, particles.values, num_particles, layout)
    if 0 not in families:
        raise ProgramError(
            "the model observes no site that is x itself, so its cells cannot be imputed: let one "
            "site have obs=x"
        )
    site = next(name for name, key in layout.entries.items() if key == 0)
    drawn = sample_observed(model, batch, particles.values, num_particles, layout)[site].to(x)
    log_weights = particles.log_weights.double()
    weights = log_weights.softmax(0)
    guess = (weights[..., None] * _means(families[0], drawn)).sum(0)
    nominal = _nominal(families[0], x.shape[1]).to(x.device)
    if bool(nominal.any()):
        guess[:, nominal] = _vote(drawn[..., nominal], weights)
    missing = x.isnan()
    filled = torch.where(missing, guess.to(x.dtype), x)
    chosen = torch.multinomial(weights.T, max(num_draws, 1), replacement=True).T[:num_draws]
    resampled = drawn[chosen, torch.arange(len(x), device=x.device)]
    return filled, torch.where(missing, resampled, x), ess(log_weights)


def _means(family: Any, drawn: Tensor) -> Tensor:
    """``E[x | z_k]`` where it is known and finite, else a draw in its place: ``(K, B, D)``."""
    try:
        means: Tensor = family.mean.expand_as(drawn)
    except (NotImplementedError, AttributeError):
        return drawn
    return torch.where(means.isfinite(), means, drawn)


def _nominal(family: Any, width: int) -> Tensor:
    """``(D,)``: the columns whose values are names rather than amounts."""
    base = family
    while not hasattr(base, "is_nominal") and hasattr(base, "base_dist"):
        base = base.base_dist
    if hasattr(base, "is_nominal"):
        nominal: Tensor = base.is_nominal
        return nominal
    return torch.full((width,), isinstance(base, torch.distributions.Bernoulli))


def _vote(drawn: Tensor, weights: Tensor) -> Tensor:
    """The value of largest weight of each cell: ``(K, B, n)`` -> ``(B, n)``."""
    values = drawn.unique()  # type: ignore[no-untyped-call]
    votes = [((drawn == value) * weights[..., None]).sum(0) for value in values]
    winners: Tensor = values[torch.stack(votes).argmax(0)]
    return winners.to(weights.dtype)
