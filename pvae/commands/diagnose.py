"""``pvae diagnose``: gap ledger, latents, calibration and predictive checks of a run."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae import runs
from pvae.commands.preparing import data_for, threads
from pvae.commands.programs import need_encoder
from pvae.commands.saying import say, watched
from pvae.errors import OptionError, ProgramError

if TYPE_CHECKING:
    from pvae.data import Dataset
    from pvae.training import Run

__all__ = ["diagnose"]


def diagnose(arguments: argparse.Namespace) -> None:
    """``pvae diagnose``: gap ledger, latents, calibration and predictive checks of a run."""
    from pvae.data import num_rows

    for option in ("num_data", "num_particles", "num_runs"):
        if getattr(arguments, option) < 2:
            raise OptionError(
                f"--{option.replace('_', '-')} must be at least 2, got {getattr(arguments, option)}"
            )
    folder = Path(arguments.run)
    config = runs.read_config(folder)
    need_encoder(config, folder, "diagnose a run of a game that has one, such as vae_gan")
    run = runs.load(folder)
    dataset = data_for(config, None)
    rows = runs.test_batch(run.model, dataset, arguments.num_data)
    say(f"{dataset.description()}; the first {num_rows(rows)} of the test split")
    found, skipped = {}, {}
    with threads(dataset):
        for title, work in _diagnoses(run, rows, dataset, arguments).items():
            with watched(title) as progress:
                try:
                    found[title] = work(progress)
                except ProgramError as error:
                    skipped[title] = str(error)
            say(f"\n{title}")
            say(skipped[title] if title in skipped else found[title].report())
    if not found:
        raise ProgramError(next(iter(skipped.values())))
    _write_diagnosis(found, skipped, folder, dataset, arguments)
    say(f"\nwrote {folder}: diagnosis.json, tables as csv, figures")


def _diagnoses(
    run: Run, rows: Any, dataset: Dataset, arguments: argparse.Namespace
) -> dict[str, Callable[[Callable[[int, int], None]], Any]]:
    from pvae import evidence

    model, guide, seed = run.model, run.guide, arguments.seed

    def back(batch: Any) -> Any:
        return dataset.transform.inverse(batch[0] if isinstance(batch, tuple) else batch)

    statistics = {
        "mean": lambda x: back(x).double().mean(),
        "standard deviation": lambda x: back(x).double().std(),
        "spread of row means": lambda x: back(x).double().flatten(1).mean(1).std(),
        "spread within rows": lambda x: back(x).double().flatten(1).std(1).mean(),
    }
    return {
        "gaps": lambda progress: evidence.gaps(
            model, guide, rows, num_particles=arguments.num_particles, seed=seed, progress=progress
        ),
        "latents": lambda _: evidence.information(model, guide, rows, seed=seed),
        "calibration": lambda progress: evidence.calibration(
            model, guide, rows, num_runs=arguments.num_runs, seed=seed, progress=progress
        ),
        "predictive": lambda progress: evidence.predictive_checks(
            model, rows, statistics, guide=guide, seed=seed, progress=progress
        ),
    }


def _write_diagnosis(
    found: Mapping[str, Any],
    skipped: Mapping[str, str],
    folder: Path,
    dataset: Dataset,
    arguments: argparse.Namespace,
) -> None:
    from pvae import plots

    pictures: dict[str, dict[str, Callable[[Any], Any]]] = {
        "gaps": {"gaps": plots.gap_ledger},
        "latents": {"latent_information": plots.latent_information},
        "calibration": {
            "rank_histograms": plots.rank_histograms,
            "coverage": plots.coverage_curves,
        },
        "predictive": {"predictive_checks": plots.predictive_histograms},
    }
    content: dict[str, Any] = {
        "data": dataset.description(), "num_data": arguments.num_data, "seed": arguments.seed,
        "units": "nats per datum", "skipped": dict(skipped),
    }  # fmt: skip
    with runs.publish(folder) as aside:
        for title, result in found.items():
            table = result.rows()
            content[title] = {"rows": table, "report": result.report()}
            _write_csv(aside / f"{title}.csv", table)
            for name, picture in pictures[title].items():
                runs.save_figure(
                    functools.partial(picture, result), aside / "figures" / f"{name}.png"
                )
        runs.write_json(aside / "diagnosis.json", content)


def _write_csv(path: Path, table: list[dict[str, Any]]) -> None:
    import csv
    import io

    from pvae.checkpoints import write_aside

    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]) if table else [])
    writer.writeheader()
    writer.writerows(table)
    write_aside(path, text.getvalue().encode())
