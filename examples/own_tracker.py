"""A tracker of one's own: every epoch of a training as a row of an SQLite table.

A tracker is any object with three methods; nothing is registered and nothing is derived from. The
same three lines would write to MLflow, Weights & Biases or a logbook.

    python examples/own_tracker.py
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from pathlib import Path

import torch

import pvae
from pvae.guides.gaussian import Gaussian
from pvae.loop import Run
from pvae.models.vae import VAE


class Table:
    """Writes the bounds of each epoch into a table ``epochs``."""

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path)
        self.connection.execute("create table if not exists epochs (epoch int, elbo, valid_elbo)")

    def start(self, run: Run) -> None:
        """A new training replaces the old one."""
        self.connection.execute("delete from epochs")

    def epoch(self, run: Run, row: Mapping[str, float]) -> None:
        """One row, visible to readers at once."""
        values = (row["epoch"], row["elbo"], row["valid_elbo"])
        self.connection.execute("insert into epochs values (?, ?, ?)", values)
        self.connection.commit()

    def finish(self, run: Run) -> None:
        """Nothing is left open."""
        self.connection.close()


def main(epochs: int = 20, path: str = "epochs.sqlite") -> None:
    """Train on the digits, then read the table back."""
    digits = pvae.data.load("digits", binarize="fixed")
    torch.manual_seed(0)
    model = VAE(digits.x_dim, z_dim=8)
    guide = Gaussian(digits.x_dim, model.latents)
    tracker = Table(Path(path))
    pvae.fit(model, guide, digits.train.x, valid=digits.valid.x, epochs=epochs, trackers=[tracker])
    reader = sqlite3.connect(path)
    best = reader.execute("select epoch, max(valid_elbo) from epochs").fetchone()
    reader.close()
    print(f"{path}: best epoch {best[0]}, held-out ELBO {best[1]:.2f} nats")


if __name__ == "__main__":
    main()
