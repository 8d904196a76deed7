"""Trackers: told of every epoch, in order; TensorBoard's files read back."""

from __future__ import annotations

import warnings

import pytest
import torch

import pvae
from pvae.errors import OptionError
from pvae.guides.gaussian import Gaussian
from pvae.models.vae import VAE
from pvae.trackers import TensorBoard


class Notes:
    """Any object with three methods is a tracker."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self, run):
        self.said.append("start")

    def epoch(self, run, row):
        assert run.history[-1] is row
        self.said.append(f"epoch {row['epoch']}")

    def finish(self, run):
        self.said.append(f"finish at {run.best_epoch}")


def fit(**options):
    torch.manual_seed(0)
    model = VAE(6, z_dim=2, hidden=(4,))
    guide = Gaussian(6, model.latents, hidden=(4,))
    x = torch.bernoulli(torch.full((20, 6), 0.4))
    return pvae.fit(model, guide, x, valid=x, epochs=3, progress=False, engine="eager", **options)


def test_a_tracker_is_told_of_every_epoch():
    notes = Notes()
    run = fit(trackers=[notes])
    assert notes.said == ["start", "epoch 1", "epoch 2", "epoch 3", f"finish at {run.best_epoch}"]


def test_a_tracker_changes_nothing():
    plain, watched = fit(), fit(trackers=[Notes(), Notes()])
    for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_tracker_that_raises_ends_the_training_with_the_best_parameters():
    class Stops(Notes):
        def epoch(self, run, row):
            super().epoch(run, row)
            if row["epoch"] == 2:
                raise StopIteration("enough")

    stops = Stops()
    with pytest.raises(StopIteration, match="enough"):
        fit(trackers=[stops])
    assert stops.said == ["start", "epoch 1", "epoch 2"]


def test_tensorboard_has_scalars_pictures_and_options(tmp_path):
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        board = TensorBoard(
            tmp_path,
            hparams={"lr": 1e-3, "hidden": [4]},
            pictures=lambda run: {"means": torch.rand(4, 5)},
            interval=2,
        )
        run = fit(trackers=[board])
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path))
        events.Reload()
    tags = events.Tags()
    assert {"train/elbo", "valid/elbo", "run/lr", "run/beta"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("valid/elbo")] == [1, 2, 3]
    values = [event.value for event in events.Scalars("valid/elbo")]
    assert values == pytest.approx([row["valid_elbo"] for row in run.history], rel=1e-5)
    assert [event.step for event in events.Images("means")] == [2]
    assert "best/valid_elbo" in tags["scalars"]


def test_without_tensorboard_the_remedy_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(OptionError, match=r"pvae-toolkit\[tensorboard\]"):
        TensorBoard(tmp_path)
