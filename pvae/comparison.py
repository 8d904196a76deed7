"""The board: models and classical baselines on one protocol, the held-out log-likelihood."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvae.checkpoints import write_aside
from pvae.data import Dataset, Split, as_batch
from pvae.distributed import join, local_device
from pvae.errors import (
    DataError,
    NonFiniteError,
    OptionError,
    ProgramError,
    PvaeError,
    did_you_mean,
)
from pvae.evidence import in_parts
from pvae.evidence.importance import Evidence, evaluation, importance
from pvae.particles import module_of, parameters
from pvae.training import Run

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Board", "Row", "compare"]

Progress = Callable[[str, int, int], None]

_BLOCK = 1024  # rows scored at once where the density is exact


@dataclass(frozen=True)
class Row:
    """One entry of a board; nats per datum where not said otherwise.

    Attributes:
        name: The entry's name.
        mean: Mean test log density.
        stderr: Standard error of ``mean`` over the draw of the test data.
        bits_per_dim: ``-mean / (D ln 2)``; of a data set of sequences, D leaves the padding out.
        difference: Mean of the per-datum differences to the best row; zero for the best.
        difference_stderr: Standard error of ``difference``, from the same paired differences.
        kind: ``"exact"``, ``"estimate"`` or ``"lower bound"``.
        elbo: Mean ELBO of the same draws; ``None`` where nothing was drawn.
        unreliable: Share of data with k-hat above 0.7; ``None`` where nothing was drawn.
        num_parameters: Fitted numbers, those of the guide included.
        fit_seconds: Time of the fit, where known.
        score_seconds: Time of scoring the test data.
    """

    name: str
    mean: float
    stderr: float
    bits_per_dim: float
    difference: float
    difference_stderr: float
    kind: str
    elbo: float | None
    unreliable: float | None
    num_parameters: int | None
    fit_seconds: float | None
    score_seconds: float


@dataclass(frozen=True, repr=False)
class Board:
    """Rows sorted best first, with the per-datum values they come from.

    Attributes:
        rows: One :class:`Row` per entry, the highest mean first.
        evidence: Name -> :class:`pvae.Evidence` of the N test data, on the scale of the board.
        num_data: N.
        x_dim: D.
        data: What was scored, and on which scale, in words.
    """

    rows: tuple[Row, ...]
    evidence: Mapping[str, Evidence]
    num_data: int
    x_dim: int
    data: str

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        known = did_you_mean(name, [row.name for row in self.rows])
        raise OptionError(f"the board has no row called {name!r}: {known}")

    def __str__(self) -> str:
        cells = [_HEADER, *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        cells.insert(1, ["-" * width for width in widths])
        lines = ["  ".join(_align(line, widths)).rstrip() for line in cells]
        return "\n".join([self.data, "", *lines, "", self._legend()])

    __repr__ = __str__

    def table(self) -> Table:
        """The board for a terminal."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        table.title, table.caption = Text(self.data), Text(self._legend())
        table.title_justify = table.caption_justify = "left"
        cells = [_cells(row) for row in self.rows]
        for title, short in zip(_HEADER, _STACKED, strict=True):
            left: Any = "left" if title in _LEFT else "right"
            table.add_column(short, justify=left, no_wrap=title not in _FOLDED, overflow="fold")
        for k, line in enumerate(cells):
            table.add_row(*map(Text, line), style="" if k else "bold")
        return table

    def markdown(self) -> str:
        """The board as a Markdown table."""
        rule = [":---" if title in _LEFT else "---:" for title in _HEADER]
        rows = [[cell.replace("|", "\\|") for cell in _cells(row)] for row in self.rows]
        lines = [f"| {' | '.join(line)} |" for line in [_HEADER, rule, *rows]]
        return "\n".join([*lines, "", f"{self.data}. {self._legend()}", ""])

    def to_csv(self, path: str | Path) -> None:
        """Write the rows, one line each; an unknown value is an empty cell."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in self.rows)
        write_aside(Path(path), text.getvalue().encode())

    def to_json(self, path: str | Path) -> None:
        """Write the rows as strict JSON: what is unknown or infinite is ``null``."""
        content = {
            "data": self.data,
            "num_data": self.num_data,
            "x_dim": self.x_dim,
            "units": "nats per datum",
            "rows": [_strict(dataclasses.asdict(row)) for row in self.rows],
        }
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        write_aside(Path(path), (text + "\n").encode())

    def save(self, folder: str | Path) -> None:
        """Write ``board.csv`` and ``board.json`` into a folder, made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.to_csv(folder / "board.csv")
        self.to_json(folder / "board.json")

    def _legend(self) -> str:
        drawn = sorted({e.num_particles for e in self.evidence.values() if _is_drawn(e)})
        parts = ["mean log p ± its standard error over the data, nats per datum"]
        if drawn:
            counts = ", ".join(map(str, drawn))
            parts.append(f"estimates by importance sampling with K = {counts}, biased low")
        return "; ".join(parts)


def compare(
    entries: Mapping[str, Any],
    test: Any,
    *,
    log_det: Tensor | None = None,
    num_particles: int = 1000,
    seed: int = 0,
    fit_seconds: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> Board:
    r"""Score every entry on the same test data and set their mean log densities side by side.

    ``mean = (1/N) sum_n (log p(x_n) + log_det_n)`` with the standard error ``std / sqrt(N)``;
    entries are told apart by the mean and standard error of their paired, per-datum differences. A
    density that is known is taken as it is (a baseline's ``score_samples``, a model's
    ``log_evidence``); any other pair is scored by importance sampling, which is biased low by
    about half the variance of its weights over K.

    Args:
        entries: Name -> a :class:`pvae.Run`, a ``(model, guide)`` tuple, a fitted baseline, or a
            model with a ``log_evidence(x)`` method.
        test: Test data ``(N, D)``, or a split of a data set, whose ``log_det`` is added so that
            densities are on the original scale; of a whole data set, its test split.
        log_det: ``(N,)`` log Jacobian determinants of the map from original to test data, nats.
        num_particles: K of the estimates.
        seed: Seed of the estimates' draws.
        fit_seconds: Name -> seconds that a fit took, for entries that do not know it themselves.
        progress: Called with (name, data done, N).

    Returns:
        The board, best entry first.

    Raises:
        PvaeError: An entry is of no known kind or does not fit the data; the message names it.
        NonFiniteError: An entry's log density is NaN or plus infinity for some datum.
    """
    if not entries:
        raise OptionError("a board needs at least one entry: pass {name: run or fitted baseline}")
    seconds = dict(fit_seconds or {})
    for name in seconds:
        if name not in entries:
            hint = did_you_mean(name, entries)
            raise OptionError(f"fit_seconds names {name!r}, which is no entry: {hint}")
    x, offset, scale = _test_data(test, log_det, _most_tolerant(entries))
    evidence, facts = {}, {}
    for name, entry in entries.items():
        started = time.perf_counter()
        scored, num_parameters = _score(name, entry, x, num_particles, seed, progress)
        elapsed = time.perf_counter() - started
        evidence[name] = scored if offset is None else scored.shifted(offset)
        facts[name] = (num_parameters, seconds.get(name, _fit_time(entry)), elapsed)
    x_dim = x[0].numel()
    num_dims = test.num_dims() if isinstance(test, Dataset) else x_dim
    rows = _rows(evidence, facts, num_dims)
    ordered = {row.name: evidence[row.name] for row in rows}
    return Board(rows, ordered, len(x), x_dim, f"{len(x)} test data x {x_dim} features, {scale}")


def _most_tolerant(entries: Mapping[str, Any]) -> Any:
    """A model that takes missing cells, if there is one; the others refuse them themselves."""
    models = (
        entry.model
        if isinstance(entry, Run)
        else next(iter(entry), None)
        if isinstance(entry, tuple)
        else entry
        for entry in entries.values()
    )
    return next((model for model in models if getattr(model, "takes_missing", False)), None)


def _test_data(test: Any, log_det: Any, model: Any) -> tuple[Tensor, Tensor | None, str]:
    """Test rows ``(N, ...)``, the log Jacobian ``(N,)`` to add, and the scale in words."""
    if isinstance(test, Dataset):
        test = test.test
    if isinstance(test, Split):
        if log_det is not None:
            raise OptionError("a split brings its own log_det: pass log_det with a tensor only")
        test, log_det = test.x, test.log_det
    x = as_batch(test, model=model)
    if not isinstance(x, Tensor):
        raise DataError(f"test data must be one tensor (N, D), got a {type(x).__name__} of them")
    if len(x) < 2:
        raise DataError(f"a standard error needs at least 2 test data, got {len(x)}: pass more")
    if log_det is None:
        return x, None, "densities on the scale of the test data"
    log_det = torch.as_tensor(log_det, dtype=torch.float64)
    if log_det.shape != (len(x),):
        raise DataError(
            f"log_det must have one number for each of the {len(x)} test data, got shape "
            f"{tuple(log_det.shape)}"
        )
    return x, log_det, "densities on the original scale"


def _fit_time(entry: Any) -> float | None:
    return entry.seconds if isinstance(entry, Run) else None


def _score(
    name: str, entry: Any, x: Tensor, num_particles: int, seed: int, progress: Progress | None
) -> tuple[Evidence, int | None]:
    """Evidence of the test data on their own scale, and the number of fitted numbers."""

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(name, done, total)

    try:
        if hasattr(entry, "score_samples") and not isinstance(entry, type):
            return _score_baseline(entry, x, report)
        model, guide = _programs(entry)
        _check_fit(model, guide, x)
        if callable(getattr(model, "log_evidence", None)):
            scored = _shared(_exact, model, guide, x, seed=seed, progress=report)
        else:
            scored = _shared(importance, model, guide, x, num_particles, seed=seed, progress=report)
        _check_finite(scored.log_evidence)
        return scored, _num_parameters(entry, model, guide, x, seed)
    except PvaeError as error:
        error.args = (f"entry {name!r}: {error}",)
        raise
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ProgramError(
            f"entry {name!r} cannot score test data of shape {tuple(x.shape)} ({reason}): was it "
            "made for other data?"
        ) from error


def _programs(entry: Any) -> tuple[Any, Any]:
    """Model and guide; a model whose evidence is known stands in for its guide."""
    if isinstance(entry, Run):
        return entry.model, entry.guide
    if isinstance(entry, tuple) and len(entry) == 2 and all(map(callable, entry)):
        return entry
    if callable(getattr(entry, "log_evidence", None)) and not isinstance(entry, type):
        return entry, entry
    what = f"the class {entry.__name__}" if isinstance(entry, type) else type(entry).__name__
    raise OptionError(
        f"expected a Run, a (model, guide) tuple, a fitted baseline or a model with "
        f"log_evidence(x), got {what}"
    )


def _check_fit(model: Any, guide: Any, x: Tensor) -> None:
    for program in (model, guide):
        expected = getattr(program, "x_dim", None)
        if isinstance(expected, int) and x.dim() == 2 and x.shape[1] != expected:
            raise DataError(
                f"{type(program).__name__} takes {expected} features, the test data have "
                f"{x.shape[1]}: pass the data it was trained on"
            )
        module = module_of(program)
        for parameter in module.parameters() if module is not None else ():
            floats = x.is_floating_point() and parameter.is_floating_point()
            if floats and parameter.dtype != x.dtype:
                raise DataError(
                    f"{type(module).__name__} has {_dtype(parameter)} parameters, the test data "
                    f"are {_dtype(x)}: convert one to the other"
                )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _score_baseline(
    baseline: Any, x: Tensor, report: Callable[[int, int], None]
) -> tuple[Evidence, int | None]:
    log_p = torch.as_tensor(baseline.score_samples(x))
    if log_p.shape != (len(x),):
        raise DataError(
            f"score_samples must give one log density for each of the {len(x)} data, got shape "
            f"{tuple(log_p.shape)}"
        )
    scored = Evidence.exact(log_p, method=getattr(baseline, "name", type(baseline).__name__))
    scored = dataclasses.replace(scored, kind=getattr(baseline, "kind", "exact"))
    _check_finite(scored.log_evidence)
    report(len(x), len(x))
    return scored, getattr(baseline, "num_parameters", None)


def _shared(estimator: Callable[..., Evidence], *args: Any, **options: Any) -> Evidence:
    """An estimate of all data, of which each process takes its own where there are several."""
    if join(local_device(_device(*args[:2]))) is None:
        return estimator(*args, **options)
    return in_parts(*args, estimator=estimator, **options)


def _exact(
    model: Any, guide: Any, x: Tensor, *, seed: int, progress: Callable[[int, int], None]
) -> Evidence:
    device, pieces, done = _device(model), [], 0
    as_batch(x, model=model)  # refuses missing cells that it does not take
    with evaluation(model, model, seed=seed, device=device):
        for rows in torch.split(x, _BLOCK):
            pieces.append(model.log_evidence(rows.to(device)).double().cpu())
            done += len(rows)
            progress(done, len(x))
    return Evidence.exact(torch.cat(pieces))


def _check_finite(log_p: Tensor) -> None:
    """Minus infinity is an honest value (a density of zero); NaN and plus infinity are not."""
    wrong = log_p.isnan() | (log_p == math.inf)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise NonFiniteError(
            f"the log density of test row {row} is {float(log_p[row])}: train again with a lower "
            "lr, or look at the noise of the likelihood"
        )


def _device(*programs: Any) -> torch.device:
    modules = [module for module in map(module_of, programs) if module is not None]
    weights = (p for module in modules for p in module.parameters())
    return next((p.device for p in weights), torch.device("cpu"))


def _num_parameters(entry: Any, model: Any, guide: Any, x: Tensor, seed: int) -> int:
    if isinstance(entry, Run) and entry.num_parameters:
        return entry.num_parameters
    if model is guide:
        module = module_of(model)
        return sum(p.numel() for p in module.parameters()) if module is not None else 0
    device = _device(model, guide)
    with evaluation(model, guide, seed=seed, device=device):
        found = parameters(model, guide, x[:1].to(device))
    return sum(p.numel() for p in found.values())


def _rows(
    evidence: Mapping[str, Evidence],
    facts: Mapping[str, tuple[int | None, float | None, float]],
    num_dims: float,
) -> tuple[Row, ...]:
    names = sorted(evidence, key=lambda name: -evidence[name].mean)
    best = evidence[names[0]].log_evidence
    return tuple(_row(name, evidence[name], best, *facts[name], num_dims) for name in names)


def _row(
    name: str,
    scored: Evidence,
    best: Tensor,
    num_parameters: int | None,
    fit_seconds: float | None,
    score_seconds: float,
    num_dims: float,
) -> Row:
    same = scored.log_evidence is best
    difference = torch.zeros_like(best) if same else scored.log_evidence - best
    drawn = _is_drawn(scored)
    return Row(
        name=name,
        mean=scored.mean,
        stderr=scored.mean_stderr,
        bits_per_dim=-scored.mean / (num_dims * math.log(2)),
        difference=float(difference.mean()),
        difference_stderr=float(difference.std()) / math.sqrt(len(best)),
        kind=scored.kind,
        elbo=float(scored.elbo.mean()) if drawn else None,
        unreliable=scored.unreliable if drawn else None,
        num_parameters=num_parameters,
        fit_seconds=fit_seconds,
        score_seconds=score_seconds,
    )


def _is_drawn(scored: Evidence) -> bool:
    return scored.method == "importance"


def _strict(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


_HEADER = [
    "entry", "log p (nats)", "bits/dim", "to the best", "kind", "ELBO", "k-hat > 0.7",
    "parameters", "fit (s)", "score (s)",
]  # fmt: skip
_STACKED = [
    "entry", "log p\n(nats)", "bits/\ndim", "to the\nbest", "kind", "ELBO", "k-hat\n> 0.7",
    "para-\nmeters", "fit\n(s)", "score\n(s)",
]  # fmt: skip
_FOLDED = ("entry", "log p (nats)", "to the best")
_LEFT = ("entry", "kind")


def _cells(row: Row) -> list[str]:
    is_best = row.difference == 0 and row.difference_stderr == 0
    return [
        row.name,
        _with_error(row.mean, row.stderr),
        _number(row.bits_per_dim, ".3f"),
        "best" if is_best else _with_error(row.difference, row.difference_stderr),
        row.kind,
        _number(row.elbo, ".2f"),
        _number(row.unreliable, ".1%"),
        _number(row.num_parameters, ","),
        _duration(row.fit_seconds),
        _duration(row.score_seconds),
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else format(value, form)


def _with_error(value: float, stderr: float) -> str:
    if not math.isfinite(value):
        return _number(value, ".2f")
    return f"{value:.2f} ± {stderr:.2f}" if math.isfinite(stderr) else f"{value:.2f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.1f}" if seconds < 100 else f"{seconds:.0f}"


def _align(line: list[str], widths: list[int]) -> list[str]:
    pairs = zip(line, widths, _HEADER, strict=True)
    return [c.ljust(w) if title in _LEFT else c.rjust(w) for c, w, title in pairs]
