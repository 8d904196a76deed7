"""``pvae board``: the cells of a public board, those computed that are missing, and its tables."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae import runs
from pvae.commands.saying import say
from pvae.errors import OptionError, RunError

if TYPE_CHECKING:
    from pvae.board import Cell

__all__ = ["board"]


def board(arguments: argparse.Namespace) -> None:
    """``pvae board``: compute what is missing of a board, and write its tables."""
    from pvae import board as boards
    from pvae import locks, workers

    if arguments.run_cell is not None:
        from pvae import cells

        cells.compute(workers.read_configuration(), Path(arguments.run_cell))
        return
    if arguments.board is None:
        say(boards.describe())
        return
    jobs = workers.num_cores() if arguments.jobs is None else arguments.jobs
    if jobs < 1:
        raise OptionError(f"--jobs must be at least 1, got {jobs}")
    chosen = boards.cells(
        arguments.board,
        schedule=arguments.schedule,
        data=arguments.data,
        entries=arguments.cells,
        seeds=arguments.seeds,
        precision=arguments.precision,
    )
    out = Path(arguments.out or f"boards/{arguments.board}-{arguments.schedule}")
    (out / "cells").mkdir(parents=True, exist_ok=True)
    failed = _fill_cells(chosen, out / "cells", jobs)
    with locks.locked(out, waits=True):
        _write_standings(chosen, failed, out)
    if failed:
        raise RunError(
            f"{len(failed)} of {len(chosen)} cells failed, the first: "
            f"{next(iter(failed.values()))} (run the command again to try them again)"
        )


def _fill_cells(chosen: list[Cell], folder: Path, jobs: int) -> dict[str, str]:
    """Compute the cells that are missing, long ones first; digest -> reason of those that fail.

    Commands that share the folder each take cells that no other has claimed.
    """
    from pvae import locks, workers
    from pvae.progress import CellReporter

    def claim(k: int) -> Any:
        place = folder / missing[k].digest
        file = locks.claim(folder.parent / ".claims" / place.name)
        if file is None:
            return "taken"
        if place.exists():
            file.close()
            return "done"
        for left in folder.glob(f".{place.name}.*"):  # of a command that was killed
            shutil.rmtree(left, ignore_errors=True)
        return file

    missing = [cell for cell in chosen if not (folder / cell.digest).exists()]
    missing.sort(key=lambda cell: -cell.task.size)
    work = [(folder / cell.digest, cell.config) for cell in missing]
    failed = {}
    with CellReporter(len(chosen), len(chosen) - len(missing)) as reporter:
        outcomes = workers.run_all(
            work, jobs=jobs, started=lambda k: reporter.start(missing[k]), claim=claim
        )
        for outcome in outcomes:
            cell = missing[outcome.index]
            if outcome.seconds is None:
                reporter.elsewhere(cell)
                continue
            if outcome.reason is not None:
                failed[cell.digest] = outcome.reason
            reporter.end(cell, outcome.seconds, outcome.reason)
    return failed


def _write_standings(chosen: list[Cell], failed: Mapping[str, str], out: Path) -> None:
    from pvae import cells, plots, standings
    from pvae.checkpoints import write_aside

    found: list[Any] = []
    for cell in chosen:
        try:
            result = cells.read(out / "cells" / cell.digest) if cell.digest not in failed else None
            found.append(failed[cell.digest] if result is None else result)
        except RunError as error:
            found.append(str(error))
    tables = standings.standings(chosen, found)
    write_aside(out / "board.csv", standings.to_csv(tables).encode())
    write_aside(out / "board.md", standings.markdown(tables).encode())
    if any(table.num_data for table in tables):
        runs.save_figure(lambda: plots.standings(tables), out / "board.png")
    for table in tables:
        say(standings.as_text(table))
    say(f"wrote {out}: board.csv, board.md, board.png, cells")
