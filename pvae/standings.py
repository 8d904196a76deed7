"""The tables of a board: per data set the entries by mean log p, with paired bootstrap intervals.

Published numbers stand between ours, marked as such, with their source and what differs.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.board import Cell
from pvae.cells import Result
from pvae.errors import RunError
from pvae.published import Published, footnotes, published

__all__ = ["Line", "Standing", "as_text", "markdown", "paired_bootstrap", "standings", "to_csv"]

Outcome = Result | str  # what a cell found, or one line on why it found nothing

_RESAMPLES = 10_000
_LEVEL = 0.95
_BLOCK_ENTRIES = 2_000_000  # of the resampled indices held at a time


@dataclass(frozen=True)
class Line:
    """One line of a table; nats per datum where not said otherwise.

    Attributes:
        data: The data set.
        entry: Short name; empty for published numbers.
        title: Name.
        status: ``"ours"``, ``"published"`` or ``"failed"``.
        mean: Mean test log density, over the seeds too.
        stderr: Standard error of ``mean`` over the draw of the test data.
        difference: Mean difference to the best of ours.
        low: Lower end of its 95 % paired bootstrap interval.
        high: Upper end.
        kind: ``"exact"``, ``"estimate"``, ``"lower bound"``, or ``"published"``.
        unreliable: Share of test data with k-hat above 0.7.
        valid_mean: Mean validation log density.
        seeds: Number of seeds.
        seed_std: Standard deviation of the mean between seeds.
        num_parameters: Fitted numbers.
        seconds: Time of fit and scores, over all seeds.
        chosen: What validation chose, by the first seed.
        note: Source of a published number, or why a cell failed.
    """

    data: str
    entry: str
    title: str
    status: str
    mean: float | None = None
    stderr: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    kind: str = ""
    unreliable: float | None = None
    valid_mean: float | None = None
    seeds: int | None = None
    seed_std: float | None = None
    num_parameters: int | None = None
    seconds: float | None = None
    chosen: str = ""
    note: str = ""


@dataclass(frozen=True)
class Standing:
    """The table of one data set, best line first, failures last.

    Attributes:
        data: The data set.
        num_data: Test data N; zero if every cell failed.
        x_dim: Features D.
        lines: The lines.
        published: The printed numbers among them.
        num_particles: K of the estimates, each once.
    """

    data: str
    num_data: int
    x_dim: int
    lines: tuple[Line, ...]
    published: tuple[Published, ...]
    num_particles: tuple[int, ...] = ()


def paired_bootstrap(
    differences: Tensor, *, resamples: int = _RESAMPLES, level: float = _LEVEL, seed: int = 0
) -> Tensor:
    """Percentile intervals of mean differences, resampling the data: ``(N, E) -> (2, E)``.

    Each resample draws N data with replacement, the same for every column. Efron & Tibshirani
    (1993), An introduction to the bootstrap.

    Args:
        differences: Per-datum differences of E entries, nats.
        resamples: Number of resamples.
        level: Coverage.
        seed: Of the resamples.

    Returns:
        Lower and upper ends; NaN for a column that is not finite throughout.
    """
    values = differences.double()
    finite = values.isfinite().all(0)
    safe = torch.where(finite, values, torch.zeros_like(values))
    generator = torch.Generator().manual_seed(seed)
    total, means, left = len(values), [], resamples
    while left > 0:
        rows = min(left, max(1, _BLOCK_ENTRIES // total))
        index = torch.randint(total, (rows, total), generator=generator)
        index += total * torch.arange(rows)[:, None]
        counts = torch.bincount(index.flatten(), minlength=rows * total).reshape(rows, total)
        means.append(counts.double() @ safe / total)
        left -= rows
    tail = (1 - level) / 2
    ends = torch.quantile(torch.cat(means), torch.tensor([tail, 1 - tail]).double(), dim=0)
    return torch.where(finite, ends, torch.full_like(ends, math.nan))


def standings(cells: Sequence[Cell], outcomes: Sequence[Outcome]) -> list[Standing]:
    """The table of every data set, in the order of the cells.

    Args:
        cells: The cells.
        outcomes: What each found, or why it failed.

    Raises:
        RunError: The cells of a data set were scored on different test data.
    """
    tables = []
    for data in dict.fromkeys(cell.task.data for cell in cells):
        pairs = [(c, o) for c, o in zip(cells, outcomes, strict=True) if c.task.data == data]
        tables.append(_standing(data, pairs))
    return tables


def _standing(data: str, pairs: Sequence[tuple[Cell, Outcome]]) -> Standing:
    found: dict[str, list[Result]] = {}
    failed, titles = {}, {}
    for cell, outcome in pairs:
        titles[cell.entry] = cell.title
        if isinstance(outcome, str):
            failed[cell.entry] = outcome
        else:
            found.setdefault(cell.entry, []).append(outcome)
    results = [result for several in found.values() for result in several]
    if len({(result.fingerprint, len(result.log_p)) for result in results}) > 1:
        raise RunError(
            f"the cells of {data} were scored on different test data: remove the board's folder "
            "and run it again"
        )
    broken = [
        Line(data, entry, titles[entry], "failed", note=reason) for entry, reason in failed.items()
    ]
    printed = tuple(published(data)) if results else ()
    ours = _ours(data, titles, found)
    lines = sorted([*ours, *(_published_line(data, entry) for entry in printed)], key=_by_mean)
    return Standing(
        data,
        len(results[0].log_p) if results else 0,
        results[0].x_dim if results else 0,
        (*lines, *broken),
        printed,
        tuple(sorted({r.num_particles for r in results if r.num_particles is not None})),
    )


def _by_mean(line: Line) -> float:
    return -line.mean if line.mean is not None and not math.isnan(line.mean) else math.inf


def _published_line(data: str, entry: Published) -> Line:
    note = entry.source.reference
    return Line(data, "", entry.name, "published", entry.log_p, kind="published", note=note)


def _ours(
    data: str, titles: Mapping[str, str], found: Mapping[str, Sequence[Result]]
) -> list[Line]:
    if not found:
        return []
    names = list(found)
    log_p = torch.stack(
        [torch.stack([r.log_p for r in found[name]]).mean(0) for name in names], 1
    ).double()
    best = int(log_p.mean(0).nan_to_num(-math.inf, neginf=-math.inf).argmax())
    differences = log_p - log_p[:, best : best + 1]
    low, high = paired_bootstrap(differences)
    stderr = log_p.std(0) / math.sqrt(len(log_p))
    return [
        _line(
            data, name, titles[name], found[name], log_p[:, k], float(stderr[k]),
            (float(differences[:, k].mean()), float(low[k]), float(high[k])),
        )
        for k, name in enumerate(names)
    ]  # fmt: skip


def _line(
    data: str,
    entry: str,
    title: str,
    results: Sequence[Result],
    log_p: Tensor,
    stderr: float,
    difference: tuple[float, float, float],
) -> Line:
    first = results[0]
    means = torch.stack([result.log_p.mean() for result in results])
    shares = [r.unreliable for r in results if r.unreliable is not None]
    return Line(
        data, entry, title, "ours", float(log_p.mean()), stderr, *difference,
        kind=first.kind,
        unreliable=sum(shares) / len(shares) if shares else None,
        valid_mean=sum(r.valid_mean for r in results) / len(results),
        seeds=len(results),
        seed_std=float(means.std()) if len(results) > 1 else None,
        num_parameters=first.num_parameters,
        seconds=sum(r.seconds for r in results),
        chosen=first.chosen,
    )  # fmt: skip


# --- files ---------------------------------------------------------------------------------------


def to_csv(tables: Sequence[Standing]) -> str:
    """Every line of every table, one line each; what is unknown is an empty cell."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Line)])
    writer.writeheader()
    writer.writerows(dataclasses.asdict(line) for table in tables for line in table.lines)
    return text.getvalue()


_HEADER = (
    "entry", "log p (nats)", "to the best, 95 %", "kind", "k-hat > 0.7", "validation", "chosen",
    "parameters", "seconds",
)  # fmt: skip
_LEFT = ("entry", "kind", "chosen")


def markdown(tables: Sequence[Standing]) -> str:
    """Every table in Markdown, with the sources of the published numbers."""
    return "\n".join(_table(table) for table in tables)


def _table(table: Standing) -> str:
    rule = [":---" if title in _LEFT else "---:" for title in _HEADER]
    marks = {source.reference: number for number, source in footnotes(table.published)}
    rows = [_row(line, marks) for line in table.lines if line.status != "failed"]
    size = f" ({table.num_data} test data x {table.x_dim})" if table.num_data else ""
    lines = [f"### {table.data}{size}", ""]
    if rows:
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        lines += [f"| {' | '.join(line)} |" for line in (_HEADER, rule, *escaped)]
        lines += ["", _legend(table), ""]
    lines += [
        f"- {line.title} failed: {line.note}" for line in table.lines if line.status == "failed"
    ]
    lines += [
        f"{number}. {source.reference}: {source.protocol}."
        for number, source in footnotes(table.published)
    ]
    return "\n".join([*lines, ""])


def _legend(table: Standing) -> str:
    parts = [
        "Mean log p of the test data ± its standard error; paired bootstrap of the difference to "
        "the best of ours"
    ]
    if table.num_particles:
        counts = ", ".join(map(str, table.num_particles))
        parts.append(f"estimates by importance sampling with K = {counts}, biased low")
    if any((line.seeds or 1) > 1 for line in table.lines):
        parts.append("means over seeds, the standard deviation between them in brackets")
    if table.published:
        parts.append("published numbers are by other protocols, see below")
    return "; ".join(parts) + "."


def _row(line: Line, marks: Mapping[str, int]) -> list[str]:
    if line.status == "published":
        mark = f"published [{marks[line.note]}]"
        return [line.title, f"{line.mean:.2f}", "", mark, *[""] * (len(_HEADER) - 4)]
    return [
        f"**{line.title}**",
        _mean_in_words(line),
        _difference_in_words(line),
        line.kind,
        "" if line.unreliable is None else f"{line.unreliable:.1%}",
        _number(line.valid_mean, ".2f"),
        line.chosen,
        _number(line.num_parameters, ","),
        _number(line.seconds, ".0f"),
    ]


def _mean_in_words(line: Line) -> str:
    text = f"{line.mean:.2f} ± {line.stderr:.2f}"
    return text if line.seed_std is None else f"{text} ({line.seeds} seeds: {line.seed_std:.2f})"


def _difference_in_words(line: Line) -> str:
    if line.difference == 0 and line.low == 0 and line.high == 0:
        return "best"
    return f"{line.difference:.2f} [{line.low:.2f}, {line.high:.2f}]"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def as_text(table: Standing) -> str:
    """One table in plain text, for a terminal."""
    marks = {source.reference: number for number, source in footnotes(table.published)}
    shown = [line for line in table.lines if line.status != "failed"]
    cells = [list(_HEADER), *(_row(line, marks) for line in shown)]
    cells = [[cell.replace("**", "") for cell in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in cells] if shown else []
    size = f": {table.num_data} test data x {table.x_dim}" if table.num_data else ""
    failed = [f"{line.title} failed: {line.note}" for line in table.lines if line not in shown]
    sources = [f"[{number}] {reference}" for reference, number in marks.items()]
    return "\n".join([f"{table.data}{size}", *lines, *sources, *failed, ""])


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    columns = zip(row, widths, _HEADER, strict=True)
    return [c.ljust(w) if title in _LEFT else c.rjust(w) for c, w, title in columns]
