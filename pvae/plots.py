"""Pictures of runs, samples and boards: each function returns a matplotlib ``Figure``.

No display is needed and no global state of ``pyplot`` is touched. Colours are those of Okabe & Ito
(2008), which colour-blind readers can tell apart; where there may be more series than colours,
markers differ too.
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pvae.checkpoints import write_aside
from pvae.errors import DataError
from pvae.evidence.importance import Evidence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pvae.comparison import Board
    from pvae.evidence import Calibration, Gaps, Information, PredictiveChecks

__all__ = [
    "board",
    "coverage_curves",
    "evidence_against",
    "gap_ledger",
    "latent_information",
    "latent_scatter",
    "predictive_histograms",
    "rank_histograms",
    "reconstructions",
    "samples_beside_data",
    "save",
    "selection_curves",
    "standings",
    "training_curves",
    "weights_diagnostics",
]

Array = NDArray[Any]
History = Sequence[Mapping[str, float]]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D")
_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*", "<", ">")
_GREY = "#8A8A8A"
_INK = "#333333"
_KINDS = {"exact": ("s", "#0072B2"), "estimate": ("o", "#D55E00"), "lower bound": ("^", "#009E73")}
_MAX_FEATURES = 16  # of a table, before a picture of its marginals becomes unreadable
_MAX_POINTS = 2000


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, whole or not at all; its folder is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    write_aside(path, content.getvalue())
    return path


def training_curves(histories: Mapping[str, History]) -> Figure:
    """Training and validation bound by epoch, nats per datum; the best epoch is marked.

    The vertical axis leaves out the plunge of the first epochs where it would hide the rest.

    Args:
        histories: Name -> ``run.history``.

    Raises:
        DataError: No history has an epoch.
    """
    known = {name: history for name, history in histories.items() if history}
    if not known:
        raise DataError("there is no epoch to draw: pass {name: run.history} of a trained run")
    figure, axes = _subplots(7.5, 4.5)
    shown: list[float] = []
    for (name, history), colour in zip(known.items(), itertools.cycle(_COLOURS), strict=False):
        shown += _curve(axes, name, history, colour)
    _leave_out_the_plunge(axes, shown, max(len(history) for history in known.values()))
    axes.plot([], [], "--", color=_GREY, lw=1.2, label="training")
    if any("valid_bound" in history[0] for history in known.values()):
        axes.plot([], [], "-", color=_GREY, lw=2, label="validation")
        axes.plot([], [], "o", color=_GREY, mec="white", ms=8, label="best epoch")
    axes.set(xlabel="epoch", ylabel="bound (nats per datum)", title="Bound by epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend_beside(axes)
    return figure


def _curve(axes: Any, name: str, history: History, colour: str) -> list[float]:
    """One run's lines; returns the values that must be seen: all but the first tenth."""
    epochs = _column(history, "epoch")
    train, valid = _column(history, "bound"), _column(history, "valid_bound")
    lone = "o" if len(history) == 1 else None
    label = _words(name)
    axes.plot(epochs, train, "--", color=colour, lw=1.2, alpha=0.8, marker=lone, ms=4)
    axes.plot([], [], "-", color=colour, lw=4, label=label)
    if np.isfinite(valid).any():
        best = int(np.nanargmax(valid))
        axes.plot(epochs, valid, "-", color=colour, lw=2)
        axes.plot(epochs[best], valid[best], "o", color=colour, mec="white", ms=8, zorder=5)
    settled = slice(math.ceil(len(history) / 10), None)
    values = [*train[settled], *valid[settled]]
    return [value for value in values if math.isfinite(value)]


def _column(history: History, key: str) -> Array:
    return np.array([row.get(key, math.nan) for row in history], dtype=float)


def _leave_out_the_plunge(axes: Any, shown: list[float], epochs: int) -> None:
    if epochs < 5 or not shown:
        return
    low, high = min(shown), max(shown)
    if low - axes.get_ylim()[0] > 1.5 * (high - low) > 0:
        margin = 0.06 * (high - low)
        axes.set_ylim(low - margin, high + margin)
        note = {"transform": axes.transAxes, "ha": "right", "fontsize": 8.5, "color": "#666666"}
        axes.text(0.98, 0.03, "the first epochs lie below the axis", **note)


def samples_beside_data(
    samples: Mapping[str, Tensor], data: Tensor, image_shape: Sequence[int] | None = None
) -> Figure:
    """Data beside samples of each model.

    Images are laid out as square mosaics. Tables (``image_shape`` is ``None``) become quantiles of
    each feature, and scatters of the first two principal components of the data.

    Args:
        samples: Name -> samples ``(S, D)``.
        data: Data ``(N, D)``.
        image_shape: ``(H, W)``, ``(C, H, W)`` or ``(H, W, C)``.

    Raises:
        DataError: Widths disagree, or do not make up images of that shape.
    """
    sources = {"data": _matrix(data), **{name: _matrix(x) for name, x in samples.items()}}
    _check_widths(sources)
    if image_shape is None:
        return _tables_beside(sources)
    side = min(8, *(math.isqrt(len(x)) for x in sources.values()))
    rows, columns = _rows_and_columns(len(sources))
    figure, grid = _grid(rows, columns, width=2.7 * columns, height=2.95 * rows)
    low, high = _grey_range(sources["data"])
    for axes, (name, x) in zip(grid, sources.items(), strict=False):
        mosaic = _mosaic(_images(x[: side**2], image_shape), side)
        _picture(axes, mosaic, low, high)
        axes.set_title(_words(name, 26), fontsize=10)
    return figure


def reconstructions(
    data: Tensor, reconstructed: Mapping[str, Tensor], image_shape: Sequence[int] | None = None
) -> Figure:
    """Data above their reconstructions, one row per model; for tables value against value.

    Args:
        data: Data ``(N, D)``.
        reconstructed: Name -> ``(N, D)``, row n the reconstruction of datum n.
        image_shape: ``(H, W)``, ``(C, H, W)`` or ``(H, W, C)``; ``None`` for tables.

    Raises:
        DataError: Widths disagree, or do not make up images of that shape.
    """
    sources = {"data": _matrix(data), **{name: _matrix(x) for name, x in reconstructed.items()}}
    _check_widths(sources)
    if image_shape is None:
        return _tables_reconstructed(sources)
    count = min(12, *(len(x) for x in sources.values()))
    height = 9.8 * _aspect(image_shape) / count + 0.28
    figure, grid = _grid(len(sources), 1, width=10, height=height * len(sources))
    low, high = _grey_range(sources["data"])
    for axes, (name, x) in zip(grid, sources.items(), strict=False):
        _picture(axes, _mosaic(_images(x[:count], image_shape), count), low, high)
        axes.set_title(_words(name, 60), loc="left", fontsize=10, pad=3)
    return figure


def latent_scatter(z: Tensor, labels: Tensor | None = None) -> Figure:
    """Posterior means or draws of the latents, one point per datum, coloured by label.

    More than two dimensions are projected on their first two principal components, and the axes
    say so; one dimension becomes a histogram per label.

    Args:
        z: ``(N, L)``; further dimensions are flattened.
        labels: ``(N,)`` classes, or numbers (then a colour bar).

    Raises:
        DataError: There is not one label for each datum.
    """
    points = _matrix(z)
    marks = None if labels is None else _numbers(labels).reshape(-1)
    if marks is not None and len(marks) != len(points):
        raise DataError(f"{len(points)} latents need as many labels, got {len(marks)}")
    figure, axes = _subplots(7, 5.4)
    groups = _by_label(marks, len(points))
    if points.shape[1] == 1:
        _histograms(axes, points[:, 0], groups)
        return figure
    flat, names = _plane(points, "z")
    if groups is None:
        scatter = axes.scatter(*flat.T, c=marks, s=12, cmap="viridis", lw=0)
        figure.colorbar(scatter, ax=axes, label="label")
    for k, (label, rows) in enumerate((groups or {}).items()):
        style = {"color": _COLOURS[k % len(_COLOURS)], "marker": _MARKERS[k % len(_MARKERS)]}
        axes.scatter(*flat[rows].T, s=16, alpha=0.75, lw=0, label=label, **style)
    axes.set(xlabel=names[0], ylabel=names[1], title=f"Latents of {len(points)} data")
    if groups and len(groups) > 1:
        _legend_beside(axes, title="label", markerscale=1.6)
    return figure


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
    a, b = _numbers(evidence_a.log_evidence), _numbers(evidence_b.log_evidence)
    seen = np.isfinite(a) & np.isfinite(b)
    doubtful = _numbers(torch.maximum(evidence_a.pareto_k, evidence_b.pareto_k)) > 0.7
    first, second = (_words(name, 30) for name in names)
    figure, axes = _subplots(5.8, 6.1)
    beyond = _square(axes, np.concatenate([a[seen], b[seen]]))
    axes.axline((0, 0), slope=1, color=_GREY, lw=1, zorder=1)
    for rows, colour, marker, label in (
        (seen & ~doubtful, _COLOURS[0], "o", "k-hat at most 0.7, or exact"),
        (seen & doubtful, _COLOURS[1], "^", "k-hat > 0.7"),
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


def board(board: Board) -> Figure:
    """Mean test log p of each entry, and its paired difference to the best, both ± 2 SE.

    Args:
        board: What :func:`pvae.compare` returned.
    """
    rows = [row for row in board.rows if math.isfinite(row.mean)]
    figure = _figure(10.5, 1.7 + 0.42 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for place, row in enumerate(rows):
        marker, colour = _KINDS.get(row.kind, _KINDS["estimate"])
        style = {"fmt": marker, "color": colour, "ms": 7, "capsize": 3, "elinewidth": 1.5}
        left.errorbar(row.mean, place, xerr=2 * row.stderr, **style)
        right.errorbar(row.difference, place, xerr=2 * _or_zero(row.difference_stderr), **style)
        if row.elbo is not None:
            left.plot(row.elbo, place, "|", color=_GREY, ms=11, mew=2)
    _board_axes(left, right, rows)
    _kinds_legend(figure, rows)
    figure.suptitle(board.data[:1].upper() + board.data[1:], fontsize=11)
    return figure


def _board_axes(left: Any, right: Any, rows: Sequence[Any]) -> None:
    for axes in (left, right):
        _polish(axes)
        axes.grid(visible=True, axis="y", color="#EEEEEE")
    left.set_yticks(range(len(rows)), [_words(row.name, 28) for row in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.set_xlabel("mean test log p ± 2 SE (nats per datum)")
    right.set_xlabel("paired difference to the best ± 2 SE (nats)")
    right.locator_params(axis="x", nbins=5)
    right.axvline(0, color=_GREY, lw=1, zorder=0)
    right.tick_params(axis="y", length=0)


def _kinds_legend(figure: Any, rows: Sequence[Any]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], marker=marker, color=colour, ls="", ms=7, label=kind)
        for kind, (marker, colour) in _KINDS.items()
        if any(row.kind == kind for row in rows)
    ]
    if any(row.elbo is not None for row in rows):
        handles.append(Line2D([], [], marker="|", color=_GREY, ls="", ms=11, mew=2, label="ELBO"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)


def selection_curves(densities: Mapping[str, Any]) -> Figure:
    """How each density chose its size: the criterion against the candidates, the choice ringed.

    Args:
        densities: Name -> a fitted baseline; those that had nothing to choose are left out.

    Raises:
        DataError: None of them had anything to choose.
    """
    chosen = {name: each for name, each in densities.items() if getattr(each, "selection", None)}
    if not chosen:
        raise DataError("none of the densities had a size to choose: give several n_components")
    rows, columns = _rows_and_columns(len(chosen))
    figure = _figure(3.6 * columns, 2.7 * rows)
    grid = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes, (name, density), colour in zip(
        grid, chosen.items(), itertools.cycle(_COLOURS), strict=False
    ):
        values = sorted(density.selection)
        heights = [density.selection[value] for value in values]
        axes.plot(values, heights, "o-", color=colour, ms=4)
        best = density.selection[density.chosen]
        axes.plot(density.chosen, best, "o", ms=11, mfc="none", mec=_INK)
        finite = [height for height in heights if math.isfinite(height)]
        spread = best - float(np.median(finite))
        # A candidate that fails by thousands of nats would flatten all others.
        axes.set_ylim(max(min(finite), best - 4 * spread) - 0.1 * spread, best + 0.3 * spread)
        axes.set_xscale("log")
        axes.minorticks_off()
        ticks = values if len(values) <= 8 else values[:: len(values) // 4]
        axes.set_xticks(ticks, [f"{value:.2g}" if value < 1 else f"{value:g}" for value in ticks])
        axes.set_title(_words(name, 30), fontsize=10)
        axes.set_xlabel(density.option)
        _polish(axes)
    for axes in grid[len(chosen) :]:
        axes.set_visible(False)
    for axes in grid[::columns]:
        axes.set_ylabel("criterion (nats per datum)")
    return figure


def standings(tables: Sequence[Any]) -> Figure:
    """Every data set of a public board: mean test log p ± 2 SE, and paired bootstrap intervals.

    Args:
        tables: What :func:`pvae.standings.standings` made; those without a finite mean are left
            out.

    Raises:
        DataError: There is nothing to draw.
    """
    shown = {table.data: _finite_lines(table) for table in tables}
    shown = {data: lines for data, lines in shown.items() if lines}
    if not shown:
        raise DataError("no cell of the board has a finite mean: there is nothing to draw")
    heights = [1.6 + len(lines) for lines in shown.values()]
    figure = _figure(11, 0.9 + 0.27 * sum(heights))
    grid = figure.subplots(len(shown), 2, squeeze=False, width_ratios=(3, 2), height_ratios=heights)
    for (left, right), (data, lines) in zip(grid, shown.items(), strict=True):
        right.sharey(left)
        for place, line in enumerate(lines):
            _standing(left, right, place, line)
        _standing_axes(left, right, data, lines)
    grid[-1, 0].set_xlabel("mean test log p ± 2 SE (nats per datum)")
    grid[-1, 1].set_xlabel("paired difference to the best of ours, 95 % (nats)")
    _standings_legend(figure, [line for lines in shown.values() for line in lines])
    return figure


def _finite_lines(table: Any) -> list[Any]:
    return [line for line in table.lines if line.mean is not None and math.isfinite(line.mean)]


def _standing(left: Any, right: Any, place: int, line: Any) -> None:
    if line.status == "published":
        left.plot(line.mean, place, "D", mfc="white", mec=_GREY, ms=6)
        return
    marker, colour = _KINDS.get(line.kind, _KINDS["estimate"])
    style = {"fmt": marker, "color": colour, "ms": 6, "capsize": 3, "elinewidth": 1.5}
    left.errorbar(line.mean, place, xerr=2 * _or_zero(line.stderr), **style)
    ends = [[_or_zero(line.difference - line.low)], [_or_zero(line.high - line.difference)]]
    right.errorbar(line.difference, place, xerr=np.maximum(ends, 0), **style)


def _standing_axes(left: Any, right: Any, data: str, lines: Sequence[Any]) -> None:
    for axes in (left, right):
        _polish(axes)
        axes.grid(visible=True, axis="y", color="#EEEEEE")
    left.set_yticks(range(len(lines)), [_words(line.title, 28) for line in lines], fontsize=8.5)
    for label, line in zip(left.get_yticklabels(), lines, strict=True):
        label.set_color("#666666" if line.status == "published" else _INK)
    left.set_ylim(len(lines) - 0.5, -0.5)
    left.set_title(data, loc="left", fontsize=11)
    right.locator_params(axis="x", nbins=5)
    right.axvline(0, color=_GREY, lw=1, zorder=0)
    right.tick_params(axis="y", length=0, labelleft=False)


def _standings_legend(figure: Any, lines: Sequence[Any]) -> None:
    from matplotlib.lines import Line2D

    kinds = {line.kind for line in lines}
    handles = [
        Line2D([], [], marker=marker, color=colour, ls="", ms=6, label=kind)
        for kind, (marker, colour) in _KINDS.items()
        if kind in kinds
    ]
    if "published" in kinds:
        style: dict[str, Any] = {"marker": "D", "mfc": "white", "mec": _GREY, "ls": "", "ms": 6}
        handles.append(Line2D([], [], label="published", **style))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)


def weights_diagnostics(evidence: Evidence) -> Figure:
    """Histograms of k-hat, with the line at 0.7, and of the effective share of the particles.

    Args:
        evidence: What importance sampling gave for N data.
    """
    khat, ess = _numbers(evidence.pareto_k), _numbers(evidence.ess)
    figure = _figure(9.5, 3.8)
    left, right = figure.subplots(1, 2)
    seen = np.minimum(khat[np.isfinite(khat)], 2)
    for part, colour in ((seen[seen <= 0.7], _COLOURS[0]), (seen[seen > 0.7], _COLOURS[1])):
        left.hist(part, _edges(seen), color=colour, ec="white", lw=0.5)
    left.axvline(0.7, color=_INK, ls="--", lw=1.2)
    left.set(xlabel=f"Pareto k-hat{_left_out(khat)}", ylabel="data")
    left.set_title(f"{100 * evidence.unreliable:.1f} % of {len(evidence)} data above 0.7")
    share = 100 * ess / evidence.num_particles
    edges = np.linspace(0, min(100, 1.1 * share.max()), 31)
    right.hist(share, edges, color=_COLOURS[2], ec="white", lw=0.5)
    right.set(xlabel=f"effective share of K = {evidence.num_particles} particles (%)")
    right.set_title(f"median effective share {np.median(share):.1f} %")
    for axes in (left, right):
        _polish(axes)
        axes.title.set_fontsize(11)
    return figure


def gap_ledger(gaps: Gaps) -> Figure:
    """``log p - ELBO`` in parts: their means ± 2 SE, and each datum's parts by size of its gap.

    Args:
        gaps: What :func:`pvae.evidence.gaps` found.
    """
    parts = {
        "approximation": _numbers(gaps.approximation + gaps.estimation),
        "amortisation": _numbers(gaps.amortisation),
    }
    figure = _figure(10, 4)
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    for place, ((name, values), colour) in enumerate(zip(parts.items(), _COLOURS, strict=False)):
        error = 2 * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        left.bar(place, values.mean(), 0.6, yerr=error, capsize=4, color=colour, label=name)
        left.annotate(
            f"{values.mean():.3g}", (place, values.mean()), (26, 4), textcoords="offset points",
            ha="center", fontsize=9,
        )  # fmt: skip
    left.set_xticks(range(2), list(parts))
    left.set(ylabel="nats per datum ± 2 SE")
    left.set_title(f"log p(x) − ELBO = {float(gaps.total.mean()):.3g} nats", fontsize=11)
    order = np.argsort(_numbers(gaps.total))
    shown = order[np.linspace(0, len(order) - 1, min(len(order), 300)).astype(int)]
    floor, places = np.zeros(len(shown)), np.linspace(0, 100, len(shown))
    for (name, values), colour in zip(parts.items(), _COLOURS, strict=False):
        top = floor + np.maximum(values[shown], 0)
        right.fill_between(places, floor, top, color=colour, alpha=0.85, lw=0, label=name)
        floor = top
    right.set(xlabel="data, by the size of their gap (%)", ylabel="nats")
    right.set_title(f"Each of {len(gaps)} data", fontsize=11)
    for axes in (left, right):
        _polish(axes)
    right.legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def latent_information(information: Information) -> Figure:
    """Mean KL of each latent dimension, largest first: information and aggregate KL stacked.

    Args:
        information: What :func:`pvae.evidence.information` found.
    """
    rows = sorted(information.dimensions, key=lambda each: -each.kl)[:60]
    if not rows:
        raise DataError("no latent site falls into dimensions: there is nothing to draw")
    figure, axes = _subplots(max(7.0, 2.5 + 0.28 * len(rows)), 4.2)
    places = np.arange(len(rows))
    known = np.array([each.kl if each.mutual_information is None else each.mutual_information
                      for each in rows])  # fmt: skip
    rest = np.array([each.marginal_kl or 0.0 for each in rows])
    axes.bar(places, known, 0.75, color=_COLOURS[0], label="mutual information")
    axes.bar(
        places, rest, 0.75, bottom=known, color=_COLOURS[4], label="aggregate KL(q(z) || p(z))"
    )
    collapsed = [k for k, each in enumerate(rows) if each.collapsed]
    if collapsed:
        axes.plot(collapsed, np.zeros(len(collapsed)), "v", color=_COLOURS[1], ms=7,
                  label="collapsed", clip_on=False, zorder=5)  # fmt: skip
    names = [f"{_words(each.site, 12)}[{each.index}]" for each in rows]
    axes.set_xticks(places, names, rotation=90 if len(rows) > 8 else 0)
    axes.set(ylabel="nats per datum")
    axes.set_title(
        f"KL of each latent dimension: {information.active_units} of {len(information.dimensions)} "
        "active", fontsize=11,
    )  # fmt: skip
    axes.legend(frameon=False, fontsize=9)
    return figure


def rank_histograms(calibration: Calibration) -> Figure:
    """Rank histograms with the band that 99 % of calibrated bars lie in; rejected ones in red.

    Args:
        calibration: What :func:`pvae.evidence.calibration` found; at most 16 quantities are drawn,
            the least uniform coordinates and all others.
    """
    shown = _shown_quantities(calibration)
    rows, columns = _rows_and_columns(len(shown))
    figure, grid = _grid(
        rows, columns, width=2.9 * columns + 0.6, height=2.3 * rows + 0.9, bare=False
    )
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    bins, number = calibration.num_bins, len(calibration)
    expected = number / bins
    band = 2.576 * math.sqrt(expected * (1 - 1 / bins))
    ranks, rejected = _numbers(calibration.ranks), set(calibration.rejected)
    for axes, q in zip(grid, shown, strict=False):
        counts = np.bincount(ranks[:, q] * bins // (calibration.num_draws + 1), minlength=bins)
        name = calibration.names[q]
        colour = _COLOURS[1] if name in rejected else _COLOURS[0]
        axes.axhspan(expected - band, expected + band, color="#DDDDDD", lw=0)
        axes.bar((np.arange(bins) + 0.5) / bins, counts, 1 / bins, color=colour, ec="white", lw=0.4)
        axes.set_title(_words(name, 28), fontsize=9)
    figure.supxlabel("rank of the truth among the draws, as a share", fontsize=9)
    figure.suptitle(
        f"{number} simulated data, {calibration.num_draws} draws: {len(rejected)} of "
        f"{len(calibration.names)} quantities rejected", fontsize=11,
    )  # fmt: skip
    return figure


def _shown_quantities(calibration: Calibration) -> list[int]:
    names = calibration.names
    p = np.minimum(*(_numbers(each) for each in calibration.p_values))
    others = [q for q, name in enumerate(names) if " " in name]
    coordinates = sorted((q for q in range(len(names)) if q not in others), key=lambda q: p[q])
    return sorted(coordinates[: 16 - len(others)]) + others


def coverage_curves(calibration: Calibration) -> Figure:
    """How often the truth lies in the region of each nominal level, against the diagonal.

    Args:
        calibration: What :func:`pvae.evidence.calibration` found.
    """
    levels = np.linspace(0, 1, 101)
    found = 100 * _numbers(calibration.coverage(levels.tolist()))
    figure, axes = _subplots(6.6, 5)
    band = 100 * 2.576 * np.sqrt(levels * (1 - levels) / len(calibration))
    axes.fill_between(100 * levels, 100 * levels - band, 100 * levels + band, color="#DDDDDD", lw=0,
                      label="99 % of calibrated curves, at each level")  # fmt: skip
    axes.axline((0, 0), slope=1, color=_GREY, lw=1)
    own = {name for name in calibration.names if " " in name}
    lines = [q for q, name in enumerate(calibration.names) if name not in own]
    for k, q in enumerate(lines):
        label = "latent coordinates, central intervals" if k == 0 else None
        axes.plot(100 * levels, found[:, q], color=_COLOURS[0], lw=1, alpha=0.6, label=label)
    for name, colour in (("log q", _COLOURS[1]), ("log joint", _COLOURS[2])):
        if name in calibration.names:
            q = calibration.names.index(name)
            label = f"densest region by {name}"
            axes.plot(100 * levels, found[:, q], color=colour, lw=2, label=label)
    axes.set(xlabel="nominal level (%)", ylabel="truth inside (%)", xlim=(0, 100), ylim=(0, 100))
    axes.set_title(f"Coverage over {len(calibration)} simulated data", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def predictive_histograms(checks: PredictiveChecks) -> Figure:
    """Each statistic of replicated data, with its value on the data.

    Args:
        checks: What :func:`pvae.evidence.predictive_checks` found.
    """
    names = list(checks.observed)
    rows, columns = _rows_and_columns(len(names))
    figure, grid = _grid(rows, columns, width=3.2 * columns, height=2.8 * rows, bare=False)
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(grid, names, strict=False):
        axes.hist(_numbers(checks.replicated[name]), 24, color=_COLOURS[5], ec="white", lw=0.4)
        axes.axvline(checks.observed[name], color=_COLOURS[1], lw=2)
        axes.set_title(f"{_words(name, 26)}, p = {checks.p_values[name]:.2g}", fontsize=10)
    figure.supxlabel("replicated data (bars) and the data (line)", fontsize=9)
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


# --- tables ------------------------------------------------------------------------------------


def _tables_beside(sources: Mapping[str, Array]) -> Figure:
    models = {name: x for name, x in sources.items() if name != "data"}
    if sources["data"].shape[1] == 1 or not models:
        figure, axes = _subplots(7.5, 3.4)
        _marginals(axes, sources)
        return figure
    rows, columns = _rows_and_columns(len(models))
    figure = _figure(max(8.0, 3 * columns), 3.4 + 2.9 * rows)
    parts: Any = figure.subfigures(2, 1, height_ratios=(3.4, 2.9 * rows))
    above, below = parts
    _marginals(above.subplots(), sources)
    _clouds(below, below.subplots(rows, columns, squeeze=False, sharex=True, sharey=True), sources)
    return figure


def _clouds(figure: Any, grid: Any, sources: Mapping[str, Array]) -> None:
    """Each model's samples over the data, in the plane of the data's principal components."""
    models = [(name, x) for name, x in sources.items() if name != "data"]
    centre, basis, _ = _principal(sources["data"])
    for axes in grid.flat[len(models) :]:
        axes.set_axis_off()
    for k, (axes, (name, x)) in enumerate(zip(grid.flat, models, strict=False)):
        _cloud(axes, sources["data"], centre, basis, _GREY, 0.45)
        _cloud(axes, x, centre, basis, _COLOURS[k % len(_COLOURS)], 0.6)
        axes.set_title(_words(name, 26), fontsize=10)
        _polish(axes)
    figure.supxlabel("principal component 1 of the data", fontsize=10)
    figure.supylabel("principal component 2", fontsize=10)


def _cloud(axes: Any, x: Array, centre: Array, basis: Array, colour: str, alpha: float) -> None:
    flat = (x[:_MAX_POINTS] - centre) @ basis[:2].T
    axes.scatter(*flat.T, s=7, lw=0, color=colour, alpha=alpha)


def _marginals(axes: Any, sources: Mapping[str, Array]) -> None:
    width = next(iter(sources.values())).shape[1]
    shown = min(width, _MAX_FEATURES)
    colours = [_GREY, *_COLOURS]
    step = 0.8 / len(sources)
    room = 430 * step / shown  # points between neighbouring bars
    for k, (name, x) in enumerate(sources.items()):
        q05, q25, q50, q75, q95 = np.quantile(x[:, :shown], (0.05, 0.25, 0.5, 0.75, 0.95), axis=0)
        places = np.arange(shown) + (k - (len(sources) - 1) / 2) * step
        colour = colours[k % len(colours)]
        axes.vlines(places, q05, q95, color=colour, lw=1.2)
        axes.vlines(places, q25, q75, color=colour, lw=min(6, 0.6 * room), label=_words(name))
        axes.plot(places, q50, "o", color="white", mec=colour, ms=min(5, 0.8 * room))
    few = "" if shown == width else f" (the first {shown} of {width})"
    axes.set(xlabel=f"feature{few}", ylabel="value", xticks=range(shown))
    axes.set_title("Median, 25 to 75 % and 5 to 95 % of each feature", fontsize=11)
    _polish(axes)
    _legend_beside(axes)


def _tables_reconstructed(sources: Mapping[str, Array]) -> Figure:
    data = sources["data"]
    models = {name: x for name, x in sources.items() if name != "data"}
    rows, columns = _rows_and_columns(len(models))
    figure, grid = _grid(rows, columns, width=3.4 * columns, height=3.6 * rows, bare=False)
    for axes in grid[1:]:
        axes.sharex(grid[0])
        axes.sharey(grid[0])
    for k, (axes, (name, x)) in enumerate(zip(grid, models.items(), strict=False)):
        count = min(len(x), len(data))
        truth, made = data[:count].reshape(-1), x[:count].reshape(-1)
        stride = math.ceil(len(truth) / _MAX_POINTS)
        axes.axline((0, 0), slope=1, color=_GREY, lw=1)
        colour = _COLOURS[k % len(_COLOURS)]
        axes.scatter(truth[::stride], made[::stride], s=7, lw=0, alpha=0.5, color=colour)
        error = math.sqrt(float(np.square(truth - made).mean()))
        axes.set_title(f"{_words(name, 26)}\nroot mean square error {error:.3g}", fontsize=10)
        axes.set(xlabel="value", ylabel="reconstruction" if k % columns == 0 else "")
    return figure


# --- parts -------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _subplots(width: float, height: float) -> tuple[Figure, Any]:
    figure = _figure(width, height)
    axes = figure.subplots()
    _polish(axes)
    return figure, axes


def _grid(
    rows: int, columns: int, *, width: float, height: float, bare: bool = True
) -> tuple[Figure, list[Any]]:
    figure = _figure(width, height)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.set_axis_off() if bare else _polish(axes)
    return figure, grid


def _rows_and_columns(count: int) -> tuple[int, int]:
    """At most four in a row, the rows as even as can be."""
    rows = math.ceil(count / 4)
    return rows, math.ceil(count / rows)


def _polish(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.grid(visible=True, color="#EEEEEE", lw=0.8)
    axes.set_axisbelow(True)


def _legend_beside(axes: Any, **options: Any) -> None:
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0}
    axes.legend(frameon=False, fontsize=9, **place, **options)


def _words(name: str, width: int = 24) -> str:
    """A name as it is (no mathematics in it), cut where it is too long for a picture."""
    return textwrap.shorten(str(name), width=max(width, 8), placeholder="…").replace("$", r"\$")


def _numbers(values: Any) -> Array:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _matrix(values: Any) -> Array:
    numbers = _numbers(values).astype(float)
    return numbers.reshape(len(numbers), math.prod(numbers.shape[1:]))


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _check_widths(sources: Mapping[str, Array]) -> None:
    expected = sources["data"].shape[1]
    for name, x in sources.items():
        if x.shape[1] != expected:
            raise DataError(f"the data have {expected} features but {name!r} has {x.shape[1]}")
        if len(x) == 0:
            raise DataError(f"{name!r} is empty: pass at least one row")


def _images(x: Array, shape: Sequence[int]) -> Array:
    """``(n, D)`` to ``(n, H, W)`` or ``(n, H, W, 3)``; the frames of a video side by side."""
    if len(shape) == 4 and math.prod(shape) == x.shape[1]:
        frames, channels, height, width = shape
        x = np.moveaxis(x.reshape(-1, *shape), 1, 3).reshape(len(x), -1)
        shape = (channels, height, frames * width)
    if math.prod(shape) != x.shape[1] or len(shape) not in (2, 3):
        raise DataError(f"{x.shape[1]} features do not make up an image of shape {tuple(shape)}")
    images = x.reshape(len(x), *shape)
    if len(shape) == 3 and shape[0] in (1, 3):
        images = np.moveaxis(images, 1, -1)
    if images.ndim == 4 and images.shape[-1] not in (1, 3):
        raise DataError(f"images have 1 or 3 channels, got shape {tuple(shape)}")
    return images[..., 0] if images.ndim == 4 and images.shape[-1] == 1 else images


def _aspect(shape: Sequence[int]) -> float:
    if len(shape) == 4:
        return shape[2] / (shape[0] * shape[3])
    sizes = shape[-2:] if len(shape) == 2 or shape[0] in (1, 3) else shape[:2]
    return sizes[0] / sizes[1]


def _mosaic(images: Array, columns: int) -> Array:
    """``(n, H, W[, 3])`` to one picture, thin gaps (NaN) between."""
    count, height, width = images.shape[:3]
    gap = max(1, round(min(height, width) / 14))
    rows = math.ceil(count / columns)
    size = (rows * (height + gap) - gap, columns * (width + gap) - gap)
    mosaic = np.full((*size, *images.shape[3:]), np.nan)
    for k, image in enumerate(images):
        top, left = (k // columns) * (height + gap), (k % columns) * (width + gap)
        mosaic[top : top + height, left : left + width] = image
    return mosaic


def _grey_range(data: Array) -> tuple[float, float]:
    low, high = (float(q) for q in np.quantile(data, (0.005, 0.995)))
    return (low, high) if high > low else (float(data.min()), float(data.max()) + 1e-9)


def _picture(axes: Any, mosaic: Array, low: float, high: float) -> None:
    if mosaic.ndim == 3:
        mosaic = np.nan_to_num(np.clip((mosaic - low) / (high - low), 0, 1), nan=1.0)
    axes.imshow(mosaic, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    axes.set_axis_on()
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _by_label(marks: Array | None, count: int) -> dict[str, Array] | None:
    """Label -> rows; ``None`` where the labels are numbers rather than classes."""
    if marks is None:
        return {"all": np.arange(count)}
    classes = np.unique(marks)
    if len(classes) > 2 * len(_MARKERS):
        return None
    return {f"{label}": np.flatnonzero(marks == label) for label in classes.tolist()}


def _histograms(axes: Any, z: Array, groups: Mapping[str, Array] | None) -> None:
    edges = np.histogram_bin_edges(z, 24)
    for k, (label, rows) in enumerate((groups or {"all": np.arange(len(z))}).items()):
        colour = _COLOURS[k % len(_COLOURS)]
        axes.hist(z[rows], edges, histtype="step", lw=1.8, color=colour, label=label)
    axes.set(xlabel="z", ylabel="data", title=f"Latents of {len(z)} data")
    if groups and len(groups) > 1:
        _legend_beside(axes, title="label")


def _principal(points: Array) -> tuple[Array, Array, Array]:
    """Centre ``(D,)``, principal axes ``(D, D)`` and the share of variance along each."""
    centre = points.mean(0)
    _, singular, axes = np.linalg.svd(points - centre, full_matrices=False)
    share = singular**2 / max(float((singular**2).sum()), 1e-300)
    return centre, axes, share


def _plane(points: Array, letter: str) -> tuple[Array, tuple[str, str]]:
    size = points.shape[1]
    if size == 2:
        return points, (f"{letter}[0]", f"{letter}[1]")
    centre, basis, share = _principal(points)
    names = [
        f"principal component {k + 1} of {size} dimensions ({part:.0%} of the variance)"
        for k, part in enumerate(share[:2])
    ]
    return (points - centre) @ basis[:2].T, (names[0], names[1])


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
