"""Evidence of each datum: of two entries, of its weights, of the gap to the bound."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pvae.errors import DataError
from pvae.evidence.importance import Evidence
from pvae.plots.arrays import Array, as_array
from pvae.plots.figures import COLOURS, GREY, INK, empty_figure, polish, shortened, single_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pvae.evidence import Gaps

__all__ = ["evidence_against", "gap_ledger", "weights_diagnostics"]


def evidence_against(
    evidence_a: Evidence, evidence_b: Evidence, names: tuple[str, str] = ("A", "B")
) -> Figure:
    """Log evidence of each datum by one entry against another, with the mean paired difference.

    Points whose k-hat exceeds 0.7 in either are set apart.

    Args:
        evidence_a: Evidence of N data, drawn along the vertical axis.
        evidence_b: Evidence of the same data, along the horizontal axis.
        names: What to call them.

    Raises:
        DataError: They are not of equally many data.
    """
    if len(evidence_a) != len(evidence_b):
        raise DataError(
            f"evidence of the same data is needed, got {len(evidence_a)} and {len(evidence_b)} data"
        )
    a, b = as_array(evidence_a.log_evidence), as_array(evidence_b.log_evidence)
    seen = np.isfinite(a) & np.isfinite(b)
    doubtful = as_array(torch.maximum(evidence_a.pareto_k, evidence_b.pareto_k)) > 0.7
    first, second = (shortened(name, 30) for name in names)
    figure, axes = single_axes(5.8, 6.1)
    beyond = _square(axes, np.concatenate([a[seen], b[seen]]))
    axes.axline((0, 0), slope=1, color=GREY, lw=1, zorder=1)
    for rows, colour, marker, label in (
        (seen & ~doubtful, COLOURS[0], "o", "k-hat at most 0.7, or exact"),
        (seen & doubtful, COLOURS[1], "^", "k-hat > 0.7"),
    ):
        style = {"color": colour, "marker": marker, "label": f"{label} ({rows.sum()})"}
        axes.scatter(
            *(np.clip(values[rows], *axes.get_xlim()) for values in (b, a)),
            s=16, alpha=0.5, lw=0, clip_on=False, **style,
        )  # fmt: skip
    note = f"\n{beyond} values beyond the axes are drawn on their edge" if beyond else ""
    axes.set(xlabel=f"{second}: log p (nats){note}", ylabel=f"{first}: log p (nats)")
    axes.set_title(f"{first} − {second}\n{_paired(a[seen] - b[seen])}", fontsize=11)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _square(axes: Any, values: Array) -> int:
    """Equal limits around all but the lowest hundredth; returns how many lie beyond."""
    if len(values) == 0:
        return 0
    low, high = float(np.quantile(values, 0.01)), float(values.max())
    low = low if values.min() < low - 0.5 * (high - low) else float(values.min())
    margin = 0.05 * (high - low) or 1.0
    limits = (low - margin, high + margin)
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    return int((values < limits[0]).sum())


def _paired(difference: Array) -> str:
    if len(difference) < 2:
        return "too few data for a mean difference"
    stderr = difference.std(ddof=1) / math.sqrt(len(difference))
    mean = f"{difference.mean():+.3g} ± {stderr:.2g}".replace("-", "−")
    return f"mean difference {mean} nats (SE, N = {len(difference)})"


def weights_diagnostics(evidence: Evidence) -> Figure:
    """Histograms of k-hat, with the line at 0.7, and of the effective share of the particles.

    Args:
        evidence: What importance sampling gave for N data.
    """
    khat, ess = as_array(evidence.pareto_k), as_array(evidence.ess)
    figure = empty_figure(9.5, 3.8)
    left, right = figure.subplots(1, 2)
    seen = np.minimum(khat[np.isfinite(khat)], 2)
    for part, colour in ((seen[seen <= 0.7], COLOURS[0]), (seen[seen > 0.7], COLOURS[1])):
        left.hist(part, _edges(seen), color=colour, ec="white", lw=0.5)
    left.axvline(0.7, color=INK, ls="--", lw=1.2)
    left.set(xlabel=f"Pareto k-hat{_left_out(khat)}", ylabel="data")
    left.set_title(f"{100 * evidence.unreliable:.1f} % of {len(evidence)} data above 0.7")
    share = 100 * ess / evidence.num_particles
    edges = np.linspace(0, min(100, 1.1 * share.max()), 31)
    right.hist(share, edges, color=COLOURS[2], ec="white", lw=0.5)
    right.set(xlabel=f"effective share of K = {evidence.num_particles} particles (%)")
    right.set_title(f"median effective share {np.median(share):.1f} %")
    for axes in (left, right):
        polish(axes)
        axes.title.set_fontsize(11)
    return figure


def _left_out(khat: Array) -> str:
    tailless, large = int((~np.isfinite(khat)).sum()), int((np.isfinite(khat) & (khat > 2)).sum())
    notes = [f"{tailless} without a tail to fit are not shown"] if tailless else []
    notes += [f"{large} above 2 are drawn at 2"] if large else []
    return "".join(f"\n{note}" for note in notes)


def _edges(khat: Array) -> Array:
    """Bin edges for k-hat, one of them at 0.7."""
    low, high = float(np.min(khat, initial=0.0)), float(np.max(khat, initial=1.0))
    step = (high - low) / 30
    below, above = math.ceil((0.7 - low) / step), math.ceil((high - 0.7) / step)
    return np.arange(-below, above + 1) * step + 0.7


def gap_ledger(gaps: Gaps) -> Figure:
    """``log p - ELBO`` in parts: their means ± 2 SE, and each datum's parts by size of its gap.

    Args:
        gaps: What :func:`pvae.evidence.gaps` found.
    """
    parts = {
        "approximation": as_array(gaps.approximation + gaps.estimation),
        "amortisation": as_array(gaps.amortisation),
    }
    figure = empty_figure(10, 4)
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    _mean_parts(left, parts)
    left.set_title(f"log p(x) − ELBO = {float(gaps.total.mean()):.3g} nats", fontsize=11)
    order = np.argsort(as_array(gaps.total))
    shown = np.linspace(0, len(order) - 1, min(len(order), 300)).astype(int)
    _stacked_parts(right, parts, order[shown])
    right.set_title(f"Each of {len(gaps)} data", fontsize=11)
    for axes in (left, right):
        polish(axes)
    right.legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def _mean_parts(axes: Any, parts: Mapping[str, Array]) -> None:
    for place, ((name, values), colour) in enumerate(zip(parts.items(), COLOURS, strict=False)):
        error = 2 * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        axes.bar(place, values.mean(), 0.6, yerr=error, capsize=4, color=colour, label=name)
        axes.annotate(
            f"{values.mean():.3g}", (place, values.mean()), (26, 4), textcoords="offset points",
            ha="center", fontsize=9,
        )  # fmt: skip
    axes.set_xticks(range(2), list(parts))
    axes.set(ylabel="nats per datum ± 2 SE")


def _stacked_parts(axes: Any, parts: Mapping[str, Array], shown: Array) -> None:
    floor, places = np.zeros(len(shown)), np.linspace(0, 100, len(shown))
    for (name, values), colour in zip(parts.items(), COLOURS, strict=False):
        top = floor + np.maximum(values[shown], 0)
        axes.fill_between(places, floor, top, color=colour, alpha=0.85, lw=0, label=name)
        floor = top
    axes.set(xlabel="data, by the size of their gap (%)", ylabel="nats")
