"""Watching a training from the command line: pictures at intervals, and TensorBoard.

Both are trackers, told after each epoch; what they draw, they draw from a random stream of their
own, so that the training's parameters are those of one that nobody watched.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvae import runs
from pvae.checkpoints import write_aside
from pvae.data import num_rows, take
from pvae.errors import OptionError, did_you_mean, first_line
from pvae.galleries import tiles
from pvae.trackers import TensorBoard, Tracker

if TYPE_CHECKING:
    from pvae.data import Dataset
    from pvae.training import Run

__all__ = ["Pictures", "check", "watchers"]

_TRACKERS = ("tensorboard",)
_COLUMNS = 8  # images beside each other
_ENOUGH = 480  # pixels a picture is wide, at least, where images are small


class Pictures:
    """Samples, and the same data reconstructed, every few epochs; a tracker.

    Samples are of the same latents each time. Where ``p(x | z)`` has a mean, that is what is shown.
    Called with a run it gives the pictures, as :class:`pvae.trackers.TensorBoard` takes them.

    Args:
        batch: Data as the model takes them, the same each time.
        image_shape: How a row is an image.
        folder: Where ``samples-00010.png`` and ``reconstructions-00010.png`` are written.
        interval: Epochs between two pictures.
        back: From the model's scale to that of the data.
        reconstruct: Whether the guide is trained, so that it can.
    """

    def __init__(
        self,
        batch: Any,
        image_shape: Sequence[int],
        folder: Path,
        *,
        interval: int = 1,
        back: Callable[[Tensor], Tensor] = lambda x: x,
        reconstruct: bool = True,
    ) -> None:
        self.batch, self.image_shape, self.folder = batch, tuple(image_shape), folder
        self.interval, self.back, self.reconstruct = interval, back, reconstruct
        self.last: tuple[int, dict[str, Tensor]] = (0, {})

    def __call__(self, run: Run) -> dict[str, Tensor]:
        """Name -> picture ``(H, W)`` or ``(C, H, W)`` in [0, 1]; those of an epoch are made once.

        A picture that cannot be drawn is a warning, never the loss of a training.
        """
        if self.last[0] != len(run.history):
            try:
                self.last = len(run.history), self._draw(run)
            except Exception as error:  # of a user's program, whatever it is
                reason = first_line(error) or type(error).__name__
                warnings.warn(f"no pictures are drawn: {reason}", UserWarning, stacklevel=2)
                self.last = len(run.history), {}
        return self.last[1]

    def _draw(self, run: Run) -> dict[str, Tensor]:
        data = self._rows(self.batch)
        scale = float(data.min()), float(data.max())
        made = self._made(run, None)[: _COLUMNS**2]
        found = {"samples": tiles(made, self.image_shape, columns=_COLUMNS, scale=scale)}
        if self.reconstruct:
            again, across = self._made(run, run.guide), min(_COLUMNS, len(data))
            rows = [
                part[k : k + across]
                for k in range(0, min(2 * across, len(data)) - across + 1, across)
                for part in (data, again)
            ]  # each row of data above their reconstructions
            found["reconstructions"] = tiles(
                torch.cat(rows), self.image_shape, columns=across, scale=scale
            )
        return found

    def _rows(self, batch: Any) -> Tensor:
        """The data themselves, on their original scale."""
        return self.back(batch[0] if isinstance(batch, tuple) else batch)

    def _made(self, run: Run, guide: Any) -> Tensor:
        draws, means, _ = runs.generate(run.model, self.batch, guide=guide)
        return self.back(draws if means is None else means)

    def start(self, run: Run) -> None:
        """Nothing is known yet."""

    def epoch(self, run: Run, row: Mapping[str, float]) -> None:
        """The files of this epoch, if it is its turn."""
        number = int(row["epoch"])
        if number % self.interval:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, picture in self(run).items():
            write_aside(self.folder / f"{name}-{number:05d}.png", _png(picture))

    def finish(self, run: Run) -> None:
        """The figures of the end are drawn by the command."""


def _png(picture: Tensor) -> bytes:
    """A picture as a file, small ones enlarged pixel by pixel."""
    from matplotlib.image import imsave

    factor = max(1, round(_ENOUGH / picture.shape[-1]))
    large = picture.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    array = large.numpy() if large.dim() == 2 else large.movedim(0, -1).contiguous().numpy()
    content = io.BytesIO()
    imsave(content, array, cmap="gray", vmin=0, vmax=1, format="png")
    return content.getvalue()


def check(config: Mapping[str, Any]) -> None:
    """Refuse what nobody can watch by, before anything is read.

    Raises:
        OptionError: ``track`` is no known place or not installed, or ``pictures`` no interval.
    """
    track, interval = config["track"], config["pictures"]
    if track is not None and track not in _TRACKERS:
        raise OptionError(f"--track takes no {track!r}: {did_you_mean(track, _TRACKERS)}")
    if interval is not None and interval < 1:
        raise OptionError(f"--pictures takes a number of epochs of at least 1, got {interval}")
    if track is not None:
        TensorBoard(".")


def watchers(
    config: Mapping[str, Any],
    model: Any,
    dataset: Dataset,
    folder: Path,
    *,
    rows: Tensor | None = None,
    reconstruct: bool = True,
) -> list[Tracker]:
    """The trackers that ``track`` and ``pictures`` ask for.

    Args:
        config: A resolved configuration.
        model: It says by its program whether it takes labels.
        dataset: Its first validation data are shown.
        folder: The run.
        rows: Data ``(N, D)`` to be shown instead.
        reconstruct: Whether the guide is trained.

    Raises:
        OptionError: Pictures of data that are no images.
    """
    pictures = None
    if config["pictures"] is not None:
        if dataset.image_shape is None:
            raise OptionError(
                f"--pictures needs images, and {dataset.name} has no image_shape: leave it out"
            )
        batch: Any = rows
        if rows is None:
            batch = runs.batch_for(model, dataset.valid.x, dataset.valid.labels)
        batch = take(batch, torch.arange(min(_COLUMNS**2, num_rows(batch))))
        pictures = Pictures(
            batch, dataset.image_shape, folder / "figures" / "epochs",
            interval=config["pictures"], back=dataset.transform.inverse, reconstruct=reconstruct,
        )  # fmt: skip
    found: list[Tracker] = [] if pictures is None else [pictures]
    if config["track"] is not None:
        found.append(
            TensorBoard(
                folder / "tensorboard",
                hparams=_flat(config),
                pictures=pictures,
                interval=config["pictures"] or 1,
            )  # fmt: skip
        )
    return found


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the run, those of its programs as ``model.z_dim``."""
    found: dict[str, Any] = {}
    for key in runs.DEFAULTS:
        if isinstance(config[key], Mapping):
            start = key.removesuffix("_options")
            found |= {f"{start}.{name}": value for name, value in config[key].items()}
        else:
            found[key] = config[key]
    return found
