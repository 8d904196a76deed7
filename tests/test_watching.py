"""Watching a training from the command line: what is written, and that nothing else changes."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from torch import Tensor

from pvae.checkpoints import load_tensors
from pvae.cli import main
from pvae.galleries import tiles

QUICK = ["--model.hidden", "[6]", "--guide.hidden", "[6]", "--model.z_dim", "2", "--guide",
         "gaussian", "--engine", "eager", "--lr-schedule", "constant"]  # fmt: skip
WATCHED = ["--pictures", "1", "--track", "tensorboard"]


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    levels = np.random.default_rng(0).integers(0, 256, (90, 4, 4), dtype=np.uint8)
    np.save("images.npy", levels)
    np.save("table.npy", levels.reshape(90, 16).astype(np.float32) + 0.5)


def train(*options: str, epochs: int = 2) -> int:
    return main(["train", "vae", "--data", "images.npy", *QUICK, "--epochs", str(epochs), *options])


def parameters(folder: str) -> dict[str, Tensor]:
    return load_tensors(Path(folder) / "checkpoints" / "best")[0]


def events(folder: str):
    found = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = found.EventAccumulator(f"{folder}/tensorboard")
    accumulator.Reload()
    return accumulator


def picture(path: str) -> np.ndarray:
    return matplotlib.image.imread(path)


def test_watching_changes_no_byte_and_writes_pictures_and_curves():
    assert train("--run-dir", "plain") == 0
    assert train("--run-dir", "watched", *WATCHED) == 0
    plain, watched = parameters("plain"), parameters("watched")
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    names = sorted(path.name for path in Path("watched/figures/epochs").iterdir())
    assert names == [f"{kind}-{k:05d}.png" for kind in ("reconstructions", "samples")
                     for k in (1, 2)]  # fmt: skip
    assert not Path("plain/figures/epochs").exists()
    found = events("watched")
    assert [event.step for event in found.Scalars("valid/elbo")] == [1, 2]
    assert [event.step for event in found.Images("samples")] == [1, 2]


def test_pictures_are_of_the_same_data_and_latents_every_time():
    assert train("--run-dir", "run", "--pictures", "2", epochs=4) == 0
    first, second = (picture(f"run/figures/epochs/reconstructions-0000{k}.png") for k in (2, 4))
    scale = first.shape[1] // 39  # eight images of four pixels and seven lines between
    above = slice(0, 4 * scale)
    assert np.array_equal(first[above], second[above])
    assert not np.array_equal(first, second)


def test_a_picture_that_cannot_be_drawn_is_a_warning(monkeypatch, capsys):
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("no mean\nof this")

    monkeypatch.setattr("pvae.runs.generate", fail)
    assert train("--run-dir", "run", "--pictures", "1") == 0
    assert "pvae: warning: no pictures are drawn: no mean\n" in capsys.readouterr().err


def test_a_resumed_training_goes_on_with_both_and_ends_as_one_that_was_not():
    assert train("--run-dir", "whole", *WATCHED, "--checkpoint-every", "1 epoch", epochs=3) == 0
    assert train("--run-dir", "run", *WATCHED, "--checkpoint-every", "1 epoch") == 0
    assert main(["train", "--resume", "run", "--epochs", "3"]) == 0
    ended, resumed = parameters("whole"), parameters("run")
    assert all(torch.equal(ended[name], resumed[name]) for name in ended)
    for kind in ("samples", "reconstructions"):
        files = [f"{folder}/figures/epochs/{kind}-00003.png" for folder in ("whole", "run")]
        assert np.array_equal(*map(picture, files))
    assert [event.step for event in events("run").Scalars("train/elbo")] == [1, 2, 3]


def test_a_resumed_training_may_be_watched_otherwise():
    assert train("--run-dir", "run", "--checkpoint-every", "1 epoch") == 0
    assert main(["train", "--resume", "run", "--epochs", "4", "--pictures", "3"]) == 0
    assert [path.name for path in sorted(Path("run/figures/epochs").iterdir())] == [
        "reconstructions-00003.png", "samples-00003.png"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--pictures", "0"], "--pictures takes a number of epochs of at least 1, got 0"),
        (["--track", "tensorbord"], "did you mean 'tensorboard'"),
        (["--data", "table.npy", "--pictures", "1"], "table.npy has no image_shape: leave it out"),
    ],
)
def test_what_cannot_be_watched_is_one_sentence_and_leaves_nothing(options, said, capsys):
    assert train("--run-dir", "run", *options) != 0
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("pvae: error: ")
    assert said in error
    assert not Path("run").exists()


def test_without_tensorboard_the_install_command_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train("--run-dir", "run", "--track", "tensorboard") == 2
    assert "pip install 'pvae-toolkit[tensorboard]'" in capsys.readouterr().err
    assert not Path("run").exists()


def test_tiles_lie_row_by_row_with_white_lines_between():
    found = tiles(torch.arange(12.0).reshape(3, 4), (2, 2), columns=2, scale=(0.0, 8.0))
    expected = torch.tensor([
        [0, 1, 8, 4, 5], [2, 3, 8, 6, 7], [8, 8, 8, 8, 8], [8, 8, 8, 8, 8], [8, 8, 8, 8, 8],
    ]) / 8.0  # fmt: skip
    assert torch.equal(found, expected)  # what is above the scale is white
    colours = tiles(torch.rand(2, 12), (3, 2, 2), columns=2, scale=(0.0, 1.0))
    assert colours.shape == (3, 2, 5)
