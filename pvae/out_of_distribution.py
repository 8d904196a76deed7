r"""Scores of how unlike its training data a datum is; higher is further out.

A density model may give data it has never seen a higher density than its own (Nalisnick et al.
2019, Do deep generative models know what they don't know?), so several scores stand side by side:

- evidence: ``-log p(x)``;
- typicality: ``|-log p(x) - H|``, H the entropy as the training data show it (Nalisnick et al.
  2019, Detecting out-of-distribution inputs to deep generative models using typicality);
- regret: what the encoder leaves to be gained by fitting ``q`` to this datum alone (Xiao et al.
  2020, Likelihood regret), the amortisation gap of :func:`pvae.evidence.gaps`.

Over several runs there is also :func:`waic`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pvae.data import as_batch, num_rows
from pvae.errors import DataError, OptionError, did_you_mean
from pvae.evidence.gaps import gaps
from pvae.evidence.importance import importance
from pvae.seeds import mix

__all__ = ["SCORES", "Auroc", "Detection", "auroc", "detect", "typicality", "waic"]

SCORES = ("evidence", "typicality", "regret")


class Auroc(NamedTuple):
    """Area under the receiver operating characteristic, and its bootstrap standard error."""

    value: float
    stderr: float


class Detection(NamedTuple):
    """One score of data from inside and from outside the distribution.

    Attributes:
        inside: ``(N,)`` scores.
        outside: ``(M,)`` scores.
        auroc: How well the score tells them apart.
    """

    inside: Tensor
    outside: Tensor
    auroc: Auroc


def detect(
    model: Any,
    guide: Any,
    inside: Any,
    outside: Any,
    *,
    reference: Any,
    scores: Sequence[str] = ("evidence", "typicality"),
    num_particles: int = 100,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Detection]:
    """Score held-out data and data from elsewhere, and say how well each score tells them apart.

    Args:
        model: The generative program.
        guide: The inference program.
        inside: Held-out data of the kind that the pair was trained on, N rows.
        outside: Other data of the same form, M rows.
        reference: Data whose mean ``-log p`` is taken as the entropy: training data, or others of
            that kind, but none of ``inside``.
        scores: Any of ``"evidence"``, ``"typicality"`` and ``"regret"``.
        num_particles: Draws per datum of each estimate.
        seed: Seed of the draws.
        progress: Called with (rows done, all rows).

    Raises:
        OptionError: There is no such score, or none is given.
        ProgramError: The programs do not fit each other or the data.
    """
    for score in scores:
        if score not in SCORES:
            raise OptionError(f"no score is called {score!r}: {did_you_mean(score, SCORES)}")
    if not scores:
        raise OptionError(f"scores must name at least one of {', '.join(SCORES)}, got none")
    sources = {"inside": inside, "outside": outside, "reference": reference}
    sizes = {name: num_rows(as_batch(x, model=model)) for name, x in sources.items()}
    wanted = sizes if "typicality" in scores else ["inside", "outside"]
    log_p: dict[str, Tensor] = {}
    done, total = 0, sum(sizes[name] for name in wanted)
    for name in wanted if {"evidence", "typicality"} & set(scores) else ():
        log_p[name] = importance(model, guide, sources[name], num_particles, seed=seed).log_evidence
        done += sizes[name]
        if progress is not None:
            progress(done, total)
    found = {}
    for score in scores:
        if score == "regret":
            pair = [
                gaps(model, guide, x, num_particles=max(2, num_particles), seed=seed).amortisation
                for x in (inside, outside)
            ]
        elif score == "evidence":
            pair = [-log_p["inside"], -log_p["outside"]]
        else:
            pair = [typicality(log_p[name], log_p["reference"]) for name in ("inside", "outside")]
        found[score] = Detection(pair[0], pair[1], auroc(pair[0], pair[1], seed=seed))
    return found


def typicality(log_p: Any, reference: Any, *, group_size: int = 1) -> Tensor:
    """``|mean over a group of -log p(x) - H|``, with ``H = mean(-reference)``, nats per datum.

    Args:
        log_p: ``(N,)`` log evidence.
        reference: ``(R,)`` log evidence of training data.
        group_size: M data judged together, in their order; the typical set is one of groups, and a
            group is told more surely than a datum. A last group that is not full is left out.

    Returns:
        ``(N // M,)`` scores.

    Raises:
        DataError: Values are not finite numbers ``(N,)``.
        OptionError: ``group_size`` is below one or above N.
    """
    values, known = _vector("log_p", log_p), _vector("reference", reference)
    if not 1 <= group_size <= len(values):
        raise OptionError(f"group_size must be between 1 and {len(values)}, got {group_size}")
    groups = values[: len(values) // group_size * group_size].reshape(-1, group_size)
    return (known.mean() - groups.mean(1)).abs()


def waic(log_p: Any) -> Tensor:
    """``-(mean_r log p_r(x) - var_r log p_r(x))`` over R runs: ``(R, N) -> (N,)``.

    Choi, Jang & Alemi (2018), WAIC, but why? The runs differ in their seed.

    Raises:
        DataError: Not a finite matrix of at least two runs.
    """
    table = torch.as_tensor(log_p).double()
    if table.dim() != 2 or len(table) < 2 or not bool(table.isfinite().all()):
        raise DataError(
            f"waic takes finite log evidence (R, N) of at least two runs, got {tuple(table.shape)}"
        )
    return table.var(0) - table.mean(0)


def auroc(inside: Any, outside: Any, *, num_bootstrap: int = 1000, seed: int = 0) -> Auroc:
    """``P(outside > inside) + P(equal) / 2`` of two sets of scores; half is no better than chance.

    The standard error is that of the value over resamples of both sets.

    Args:
        inside: ``(N,)`` scores of data from inside the distribution.
        outside: ``(M,)`` scores of others.
        num_bootstrap: Number of resamples.
        seed: Of the resamples; the caller's random stream is untouched.

    Raises:
        DataError: Scores are not finite numbers ``(N,)``.
        OptionError: ``num_bootstrap`` is below two.
    """
    first, second = _vector("inside", inside), _vector("outside", outside)
    if num_bootstrap < 2:
        raise OptionError(f"num_bootstrap must be at least 2, got {num_bootstrap}")
    order = first.sort().values
    below, not_above = (torch.searchsorted(order, second, right=right) for right in (False, True))

    def area(weights: Tensor, others: Tensor) -> Tensor:
        """Of data that count as often as their weights ``(N,)`` and ``(M,)`` say."""
        mass = torch.cat([weights.new_zeros(1), weights.cumsum(0)])
        ranks = mass[below] + mass[not_above]
        return (others * ranks).sum() / (2 * weights.sum() * others.sum())

    generator = torch.Generator().manual_seed(mix(seed, 106))

    def counts(x: Tensor) -> Tensor:
        chosen = torch.randint(len(x), x.shape, generator=generator)
        return torch.bincount(chosen, minlength=len(x)).double()

    resampled = [area(counts(first), counts(second)) for _ in range(num_bootstrap)]
    value = area(torch.ones_like(first), torch.ones_like(second))
    return Auroc(float(value), float(torch.stack(resampled).std()))


def _vector(name: str, values: Any) -> Tensor:
    found = torch.as_tensor(values).detach().double().cpu()
    if found.dim() != 1 or len(found) == 0 or not bool(found.isfinite().all()):
        bad = int((~found.isfinite()).sum()) if found.numel() else 0
        raise DataError(
            f"{name} must be finite numbers (N,), got shape {tuple(found.shape)} with {bad} not "
            f"finite" + ("" if math.prod(found.shape) else ": give at least one")
        )
    return found
