"""``pvae encode | reconstruct | interpolate | traverse | ood``: what they write, say and refuse."""

from __future__ import annotations

import hashlib
import json
import re

import numpy as np
import pytest
import torch

from pvae import latents, runs
from pvae.cli import main
from pvae.data import load

TINY = ["--model.hidden", "[8]", "--guide.hidden", "[8]", "--model.z_dim", "2"]


def train(folder, *words):
    quick = [*TINY, "--epochs", "2", "--engine", "eager", "--run-dir", str(folder)]
    assert main(["train", "vae", *words, *quick]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("latents") / "run")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A run on a table of three standardised features, and the table a hundred further out."""
    place = tmp_path_factory.mktemp("table")
    rows = np.random.default_rng(0).normal(size=(400, 3))
    np.save(place / "here.npy", rows)
    np.save(place / "there.npy", rows + 100)
    return train(place / "run", "--data", str(place / "here.npy")), place


def last(capsys):
    return capsys.readouterr().out.strip().splitlines()[-1]


def test_encode_writes_what_the_library_gives(trained, capsys):
    assert main(["encode", str(trained), "--num-draws", "3"]) == 0
    said = last(capsys)
    target = trained / "latents-test.npz"
    digest = re.search(r"SHA-256 ([0-9a-f]{64})", said).group(1)
    assert hashlib.sha256(target.read_bytes()).hexdigest() == digest
    run, data = runs.load(trained), load("digits")
    codes = latents.encode(run.model, run.guide, data.test, num_draws=3)
    with np.load(target) as file:
        assert set(file.files) == {"z_mean", "z_scale", "z_draws", "labels"}
        assert np.array_equal(file["z_mean"], codes.mean["z"].numpy())
        assert np.array_equal(file["z_scale"], codes.scale["z"].numpy())
        assert np.array_equal(file["z_draws"], codes.draws["z"].numpy())
        assert np.array_equal(file["labels"], data.test.labels.numpy())


def test_reconstruct_writes_an_array_on_the_original_scale(trained, tmp_path, capsys):
    target = tmp_path / "made.npy"
    assert main(["reconstruct", str(trained), "--size", "5", "--out", str(target)]) == 0
    run, data = runs.load(trained), load("digits")
    expected = data.transform.inverse(
        latents.reconstruct(run.model, run.guide, data.test.x[:5])["x"]
    )
    assert np.array_equal(np.load(target), expected.numpy())
    error = (expected - data.transform.inverse(data.test.x[:5])).square().mean().sqrt()
    assert f"error {float(error):.4g}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "shape"),
    [
        (["interpolate", "--size", "3", "--steps", "4", "--path", "spherical"], (4, 3, 64)),
        (["traverse", "--datum", "7", "--steps", "5"], (2, 5, 1, 64)),
    ],
)
def test_paths_are_arrays_or_pictures(trained, tmp_path, words, shape):
    command, *options = words
    target = tmp_path / "paths.npy"
    assert main([command, str(trained), *options, "--out", str(target)]) == 0
    assert np.load(target).shape == shape
    assert main([command, str(trained), *options]) == 0
    names = {path.stem for path in (trained / "figures").iterdir()}
    assert names & {"interpolations", "traversals"}


def test_ood_says_how_well_the_scores_tell_apart(table, capsys):
    run, place = table
    words = ["--against", str(place / "there.npy"), "--num-particles", "10"]
    assert main(["ood", str(run), *words, "--scores", "evidence,typicality"]) == 0
    said = capsys.readouterr().out
    assert "evidence   AUROC 1.000" in said
    about = json.loads((run / "ood.json").read_text())
    assert about["scores"]["evidence"]["auroc"] == 1
    assert len(about["scores"]["typicality"]["outside"]) == 80
    assert (run / "figures" / "ood.png").is_file()
    assert main(["ood", str(run), "--against", str(place / "here.npy")]) == 0
    same = json.loads((run / "ood.json").read_text())["scores"]["evidence"]["auroc"]
    assert same == pytest.approx(0.5, abs=0.01)


def test_other_data_are_prepared_as_the_training_data_were(table):
    """Standardised by its own moments, the table further out would be the same."""
    run, place = table
    for name in ("here", "there"):
        words = ["--data", str(place / f"{name}.npy"), "--out", str(place / f"{name}.npz")]
        assert main(["encode", str(run), *words]) == 0
    here, there = (np.load(place / f"{name}.npz")["z_mean"] for name in ("here", "there"))
    assert np.abs(here - there).min() > 1
    pair = runs.load(run)
    data = load(str(place / "here.npy"))
    moved = data.test.x + 100 / data.transform.parts[0].std.float()
    expected = latents.encode(pair.model, pair.guide, moved).mean["z"]
    torch.testing.assert_close(torch.from_numpy(there), expected, rtol=1e-3, atol=1e-3)


def test_tables_have_pictures_too(table):
    run, _ = table
    for command in ("reconstruct", "interpolate", "traverse"):
        assert main([command, str(run)]) == 0
    names = {path.stem for path in (run / "figures").iterdir()}
    assert {"reconstructions_of_test", "interpolations", "traversals"} <= names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["encode", "nowhere"], "there is no run folder nowhere"),
        (["encode", "RUN", "--out", "x.csv"], "--out must end in .npz, got 'x.csv'"),
        (["encode", "RUN", "--num-draws", "-1"], "--num-draws must be at least 0, got -1"),
        (["encode", "RUN", "--data", "narrow.npy"], "trained on 64 features, narrow.npy has 3"),
        (["encode", "RUN", "--data", "nothing.npy"], "nothing.npy is not a file"),
        (["reconstruct", "RUN", "--size", "0"], "--size must be at least 1, got 0"),
        (["reconstruct", "RUN", "--num-draws", "0"], "num_draws must be at least 1"),
        (["reconstruct", "RUN", "--out", "x.gif"], "--out must end in .png or .npy"),
        (["interpolate", "RUN", "--size", "1000"], "needs 2000 test data, digits has 360"),
        (["interpolate", "RUN", "--steps", "1"], "steps must be at least 2"),
        (["interpolate", "RUN", "--path", "arc"], "no path is called 'arc'"),
        (["traverse", "RUN", "--datum", "360"], "--datum must be between 0 and 359, got 360"),
        (["traverse", "RUN", "--site", "y"], "no real latent site is called 'y'"),
        (["traverse", "RUN", "--extent", "2"], "extent between 0 and 1"),
        (["ood", "RUN"], "--against"),
        (["ood", "RUN", "--against", "narrow.npy"], "trained on 64 features, narrow.npy has 3"),
        (["ood", "RUN", "--against", "digits", "--scores", "odd"], "no score is called 'odd'"),
        (["ood", "RUN", "--against", "digits", "--num-data", "1"], "--num-data must be at least 2"),
    ],
)
def test_wrong_words_get_one_sentence(trained, words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("narrow.npy", np.random.default_rng(0).normal(size=(40, 3)))
    assert main([str(trained) if word == "RUN" else word for word in words]) != 0
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("pvae: error:")
    assert message in said
