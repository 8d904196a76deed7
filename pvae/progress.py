"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

__all__ = ["CellReporter", "Reporter", "describe", "watched"]

_INTERVAL = 0.2  # seconds between redraws: reading a value from a GPU waits for it


def describe(row: Mapping[str, float]) -> str:
    """An epoch in words: its bound, reconstruction and KL in nats per datum."""
    parts = [f"bound {row['bound']:.2f}"]
    if "kl" in row:
        parts.append(f"(reconstruction {row['reconstruction']:.2f}, KL {row['kl']:.2f})")
    if abs(row["beta"] - 1) > 1e-6:
        parts.append(f"beta {row['beta']:.3g}, elbo {row['elbo']:.2f}")
    if "valid_bound" in row:
        parts.append(f"valid {row['valid_bound']:.2f}")
    turns = f", {row['e_steps']} E and {row['m_steps']} M steps" if row.get("e_steps") else ""
    return " ".join(parts) + f" nats/datum{turns}, {row['steps_per_second']:.0f} steps/s"


class Reporter:
    """Shows epochs and steps on standard error.

    Args:
        epochs: Number of epochs.
        steps: Steps of an epoch.
        enabled: Show anything at all.
        done: Steps that were taken before.
        describe: An epoch's row in words.
    """

    def __init__(
        self,
        epochs: int,
        steps: int,
        *,
        enabled: bool = True,
        done: int = 0,
        describe: Callable[[Mapping[str, float]], str] = describe,
    ) -> None:
        self.epochs, self.steps, self.enabled, self.done = epochs, steps, enabled, done
        self.describe = describe
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.task: Any = None
        self.pending, self.drawn = 0, 0.0
        self.line_every = max(1, epochs // 10)

    def __enter__(self) -> Reporter:
        if self.enabled and self.console.is_terminal:
            columns = (
                TextColumn(f"epoch {{task.fields[epoch]}}/{self.epochs}"),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.bar.start()
            total, epoch = self.epochs * self.steps, self.done // self.steps + 1
            self.task = self.bar.add_task("", total=total, completed=self.done, epoch=epoch)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False)
        elif self.enabled:
            print(text, file=sys.stderr)

    def step(self, metrics: Tensor, rows: int) -> None:
        """One step is done; its metrics are read only when the bar is redrawn."""
        if self.bar is None:
            return
        self.pending += 1
        now = time.monotonic()
        if now - self.drawn >= _INTERVAL:
            bound, _, reconstruction, kl = (metrics / rows).tolist()
            parts = "" if math.isnan(kl) else f" (rec {reconstruction:.1f}, KL {kl:.1f})"
            rate = self.pending / (now - self.drawn) if self.drawn else 0.0
            text = f"bound {bound:.1f}{parts} nats, {rate:.0f} steps/s"
            self.bar.update(self.task, advance=self.pending, description=text)
            self.pending, self.drawn = 0, now

    def advance(self) -> None:
        """One step is done, of which nothing is shown."""
        if self.bar is not None:
            self.bar.advance(self.task)

    def epoch(self, row: Mapping[str, float]) -> None:
        """An epoch is done."""
        epoch = int(row["epoch"])
        if self.bar is not None:
            self.bar.update(self.task, epoch=min(epoch + 1, self.epochs))
        if self.enabled and (epoch % self.line_every == 0 or epoch in (1, self.epochs)):
            self.say(f"epoch {epoch}/{self.epochs}: {self.describe(row)}")


@contextlib.contextmanager
def watched(
    progress: bool | Callable[[int, float], None],  # noqa: FBT001
    title: str,
    total: int,
) -> Iterator[Callable[[int, float], None]]:
    """What an iteration is told to: the function given, a bar on a terminal, or nothing.

    Args:
        progress: A function of (iteration, objective in nats per datum); ``True`` for the bar.
        title: What stands before the bar.
        total: The most iterations.
    """
    console = Console(stderr=True)
    if callable(progress) or not (progress and console.is_terminal):
        yield progress if callable(progress) else lambda iteration, objective: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed}/{task.total}  {task.fields[objective]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total, objective="")

        def report(iteration: int, objective: float) -> None:
            bar.update(task, completed=iteration, objective=f"{objective:.3f} nats/datum")

        yield report


class CellReporter:
    """Shows the cells of a board on standard error as they end.

    Args:
        total: Number of cells.
        done: How many were there before.
    """

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done = total, done
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.task: Any = None
        self.running: list[str] = []

    def __enter__(self) -> CellReporter:
        if self.console.is_terminal:
            columns = (TextColumn("{task.completed}/{task.total}"), BarColumn(bar_width=20),
                       TextColumn("{task.description}"))  # fmt: skip
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total, completed=self.done)
        self._say(f"{self.total} cells, {self.done} of them are there already")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def start(self, cell: object) -> None:
        """The process of a cell has started."""
        self.running.append(str(cell))
        self._redraw()

    def end(self, cell: object, seconds: float, reason: str | None) -> None:
        """The process of a cell has ended, with the reason if it failed."""
        self.running.remove(str(cell))
        self.done += 1
        ending = f"{seconds:.1f} s" if reason is None else f"failed: {reason}"
        self._say(f"[{self.done}/{self.total}] {cell}: {ending}")
        self._redraw()

    def elsewhere(self, cell: object) -> None:
        """Another command, which shares the folder, has done a cell."""
        self.done += 1
        self._say(f"[{self.done}/{self.total}] {cell}: done by another command")
        self._redraw()

    def _redraw(self) -> None:
        if self.bar is not None:
            description = "; ".join(self.running)
            self.bar.update(self.task, completed=self.done, description=description)

    def _say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)
