"""Every example runs, with tiny settings; one that is not listed here fails."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from pvae.cli import main

FOLDER = Path(__file__).parents[1] / "examples"
SETTINGS = {
    "own_model.py": {"epochs": 2},
    "own_tracker.py": {"epochs": 2},
    "custom_objective.py": {"epochs": 2},
    "em_is_vi.py": {"passes": 3},
    "music.py": {"data": "scales", "epochs": 3, "z_dim": 4, "hidden": 8, "num_particles": 4},
    "audio.py": {
        "data": "chirps",
        "epochs": 2,
        "z_dim": 3,
        "channels": (4,),
        "num_particles": 3,
        "count": 2,
    },
    "video.py": {
        "data": "squares",
        "epochs": 2,
        "z_dim": 2,
        "channels": (4, 6),
        "judge_steps": 5,
        "count": 1,
    },
    "text.py": {"data": "grammar", "epochs": 2, "hidden": 8, "num_test": 20, "num_particles": 5},
    "images.py": {
        "data": "digits",
        "rows": 64,
        "epochs": (1, 1, 1),
        "z_dim": 2,
        "test": 4,
        "num_particles": 2,
        "num_pictures": 4,
    },
    "vae_gan.py": {
        "data": "digits",
        "rows": 128,
        "vae_epochs": 1,
        "gan_epochs": 1,
        "z_dim": 2,
        "num_samples": 40,
        "ais_data": 2,
        "ais_temperatures": 3,
    },
}


def test_every_example_is_listed():
    assert {path.name for path in FOLDER.glob("*.py")} == set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_example_runs(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(FOLDER / name))["main"](**SETTINGS[name])
    assert capsys.readouterr().out.strip()


def test_own_model_trains_from_its_file_on_the_command_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = f"{FOLDER / 'own_model.py'}:RobustFactors"
    assert main(["train", model, "--epochs", "1", "--model.z_dim", "3", "--run-dir", "run"]) == 0
    assert main(["evaluate", "run", "--num-particles", "10"]) == 0
    assert "log evidence" in capsys.readouterr().out
