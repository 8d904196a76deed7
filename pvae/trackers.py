"""Trackers: what is told of a training while it runs; anything with these three methods is one.

``metrics.jsonl`` in the run folder is always written; a tracker is for other places.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pvae.errors import OptionError

if TYPE_CHECKING:
    from pvae.loop import Run

__all__ = ["TensorBoard", "Tracker"]


class Tracker(Protocol):
    """Three methods, called by :func:`pvae.fit`; one that raises ends the training."""

    def start(self, run: Run) -> None:
        """Before the first step."""

    def epoch(self, run: Run, row: Mapping[str, float]) -> None:
        """After each epoch, with its row of the history; ``run`` has the parameters of now."""

    def finish(self, run: Run) -> None:
        """After the last epoch, the best parameters restored; not called if the training fails."""


class TensorBoard:
    """Scalars of each epoch, pictures at intervals and the final figures, for TensorBoard.

    Args:
        folder: Where the event files go; look at them by ``tensorboard --logdir FOLDER``.
        hparams: Options of the run, kept beside its last figures.
        pictures: Makes pictures of a run, name -> ``(H, W)`` or ``(C, H, W)`` in [0, 1].
        interval: Epochs between two pictures.

    Raises:
        OptionError: TensorBoard is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        hparams: Mapping[str, Any] | None = None,
        pictures: Any = None,
        interval: int = 10,
    ) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise OptionError(
                "TensorBoard is not installed: pip install 'pvae-toolkit[tensorboard]'"
            ) from None
        self.make: Any = SummaryWriter
        self.folder = str(folder)
        self.writer: Any = None
        self.hparams, self.pictures, self.interval = hparams, pictures, interval

    def start(self, run: Run) -> None:
        """The files are opened; what they say of epochs that are gone through again is void."""
        again = len(run.history) + 1 if run.history else None
        self.writer = self.make(self.folder, purge_step=again)

    def epoch(self, run: Run, row: Mapping[str, float]) -> None:
        """One point of every scalar, by epoch; pictures where it is their turn."""
        number = int(row["epoch"])
        for name, value in row.items():
            if name not in ("epoch", "step"):
                self.writer.add_scalar(_group(name), value, number)
        if self.pictures is not None and number % self.interval == 0:
            for name, picture in self.pictures(run).items():
                form = "HW" if picture.dim() == 2 else "CHW"
                self.writer.add_image(name, picture, number, dataformats=form)
        self.writer.flush()

    def finish(self, run: Run) -> None:
        """The options with the best epoch's figures, and the files closed."""
        if self.hparams is not None and run.history:
            best = run.history[run.best_epoch - 1]
            plain = (bool, int, float, str)
            options = {k: v if isinstance(v, plain) else str(v) for k, v in self.hparams.items()}
            figures = {f"best/{n}": v for n, v in best.items() if n not in ("epoch", "step")}
            self.writer.add_hparams(options, figures, run_name=".")
        self.writer.close()


def _group(name: str) -> str:
    """``valid_elbo`` as ``valid/elbo``, so that TensorBoard shows train and valid side by side."""
    head, _, tail = name.partition("_")
    if head == "valid":
        return f"valid/{tail}"
    measured = ("bound", "elbo", "reconstruction", "kl")
    return f"train/{name}" if name in measured else f"run/{name}"
