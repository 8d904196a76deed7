"""``pvae doctor``: a run examined after the fact, as a report with a picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae import runs
from pvae.commands.preparing import data_for, threads
from pvae.commands.saying import say
from pvae.errors import RunError

if TYPE_CHECKING:
    from pvae.doctor import Finding
    from pvae.training import Run

__all__ = ["doctor"]

_ROWS = 256  # held-out data that are looked at


def doctor(arguments: argparse.Namespace) -> None:
    """Examine data, history and pair of a run; write ``doctor.md`` and ``figures/doctor.png``."""
    from pvae import evidence
    from pvae.checkpoints import write_aside
    from pvae.doctor import examine_data, examine_history, examine_pair, report

    folder = Path(arguments.run)
    config = runs.read_config(folder)
    if config["game"] is not None:
        raise RunError(
            f"{folder} was trained by a game, and the doctor knows trainings by a bound: a side "
            "that gave up is said while it trains"
        )
    run = runs.load(folder)
    dataset = data_for(config, None)
    valid, labels = dataset.valid, dataset.valid.labels
    labels = None if labels is None else labels[:_ROWS]
    rows = runs.batch_for(run.model, valid.x[:_ROWS], labels)
    with threads(dataset):
        findings = examine_data(dataset.train.x) if dataset.kind == "continuous" else []
        findings += examine_history(run.history, objective=run.objective)
        findings += examine_pair(run.model, run.guide, rows, seed=arguments.seed)
        found = evidence.importance(run.model, run.guide, rows, 200, seed=arguments.seed)
    text = report(findings)
    text += f"\n\n{_vital_signs(run, found)}"
    say(dataset.description())
    say(text)
    title = f"# {folder.name}\n\n{dataset.description()}\n\n"
    write_aside(folder / "doctor.md", f"{title}{text}\n".encode())
    runs.save_figure(lambda: _picture(run, findings), folder / "figures" / "doctor.png")
    say(f"wrote {folder}: doctor.md, figures/doctor.png")


def _vital_signs(run: Run, found: Any) -> str:
    """The figures that a reader wants beside the findings, whatever these are."""
    best = run.history[run.best_epoch - 1]
    lines = [f"best epoch {run.best_epoch} of {len(run.history)}, stopped by {run.stopped}"]
    if "valid_elbo" in best:
        lines.append(
            f"held-out ELBO {best['valid_elbo']:.3f}, training {best['elbo']:.3f}, KL "
            f"{best.get('valid_kl', float('nan')):.3f} nats per datum"
        )
    if found.pareto_k is not None:
        share = float((found.pareto_k > 0.7).double().mean())
        lines.append(
            f"k-hat: median {float(found.pareto_k.median()):.2f}, above 0.7 for {share:.0%} of "
            f"{len(found.pareto_k)} held-out data (200 draws each)"
        )
    return "\n".join(lines)


def _picture(run: Run, findings: Sequence[Finding]) -> Any:
    """ELBO, KL and its weight, learning rate by epoch; the findings above."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    epochs = [row["epoch"] for row in run.history]
    panels = {
        "ELBO, nats": ("elbo", "valid_elbo"),
        "KL, nats": ("kl", "valid_kl"),
        "KL weight": ("beta",),
        "learning rate": ("lr",),
    }
    for axes, (title, keys) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for key in keys:
            values = [row.get(key, float("nan")) for row in run.history]
            axes.plot(epochs, values, label="held out" if key.startswith("valid") else "training")
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("epoch")
        axes.axvline(run.best_epoch, color="0.7", linestyle=":", zorder=0)
        if keys[0] in ("beta", "lr"):
            axes.set_ylim(bottom=0)
        if len(keys) > 1:
            axes.legend(frameon=False)
        shown = sorted(row[keys[-1]] for row in run.history if keys[-1] in row)
        if keys[0] == "elbo" and len(shown) > 4:  # the plunge of the first epochs hides the rest
            low, high = shown[len(shown) // 10], shown[-1]
            margin = 0.3 * (high - low) or 1.0
            axes.set_ylim(low - margin, high + margin)
    names = ", ".join(finding.name for finding in findings) or "nothing was found to be wrong"
    figure.suptitle(names, fontsize=11)
    return figure
