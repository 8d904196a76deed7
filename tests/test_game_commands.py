"""Games from the command line: one command, an ordinary run folder, one sentence for a mistake."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import pvae
from pvae import catalogue, runs
from pvae.checkpoints import load_tensors
from pvae.cli import main

TINY = ["--model.z_dim", "2", "--model.channels", "[3]", "--model.hidden", "0", "--batch-size",
        "16", "--epochs", "2"]  # fmt: skip
GUIDE = ["--guide.channels", "[3]", "--guide.hidden", "0"]
GAMES = ("adversarial_autoencoder", "avb", "gan", "vae_gan")
OWN = '''"""A game of one's own."""
import torch
from torch import nn

from pvae.adversarial import Game, Moves, Player


class Judge(nn.Linear):
    """Rows to logits."""


def matched(model, guide, x_dim, *, pull: float = 1.0) -> Game:
    """Both lower the distance of reconstructions.

    Args:
        pull: Weight of the distance.
    """
    judge = Judge(x_dim, 1)

    def moves(x):
        again = model.decode(guide.posterior(x)["z"].rsample()).mean
        distance = pull * (x - again).square().sum(-1).mean()
        told = (judge(x) - judge(again)).square().mean()
        return Moves({"pair": distance, "judge": -told})

    pair = [*model.parameters(), *guide.parameters()]
    players = (Player("pair", pair), Player("judge", list(judge.parameters())))
    return Game(players, moves, {"judge": judge}, on_means=True)
'''


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    levels = np.random.default_rng(0).integers(0, 256, (90, 4, 4), dtype=np.uint8)
    np.save("images.npy", levels)
    np.save("table.npy", levels.reshape(90, 16).astype(np.float32) + 0.5)
    Path("lines.txt").write_text("a small line of words\n" * 40)


def train(game: str, *options: str, folder: str = "run") -> int:
    guide = [] if "--guide" in options else GUIDE
    words = ["train", "conv", "--data", "images.npy", "--game", game, *TINY, *guide, *options]
    return main([*words, "--run-dir", folder])


def last_line(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_games_are_those_of_the_module(capsys):
    assert tuple(sorted(catalogue.games())) == GAMES
    assert main(["list"]) == 0
    page = capsys.readouterr().out
    assert "games:\n" in page
    assert "\n  vae_gan " in page
    assert main(["train", "conv", "--game", "vae_gan", "--help"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert "game options (vae_gan)" in page
    assert "--game.margin … Nats either way within which both move" in page
    assert "--game.image_shape" not in page
    assert "--game.discriminator" not in page


@pytest.mark.parametrize("game", GAMES)
def test_one_command_leaves_a_folder_that_the_others_take(game, capsys):
    assert train(game, "--pictures", "2", "--track", "tensorboard") == 0
    assert "wrote run; next: pvae sample run" in capsys.readouterr().out
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    sides = {"generator"} if game == "gan" else {"encoder", "decoder"}
    told = "told_apart" if game == "avb" else "accuracy"
    assert rows[1].keys() >= {"epoch", "discriminator", told, "sample_spread"} | sides
    has_encoder = game != "gan"
    pictures = {path.name for path in Path("run/figures/epochs").iterdir()}
    assert ("reconstructions-00002.png" in pictures) is has_encoder
    assert {"samples.png", "training_curves.png"} <= {p.name for p in Path("run/figures").iterdir()}
    run = pvae.load("run")
    assert run.best_epoch == 2
    assert run.num_parameters > sum(p.numel() for p in run.model.parameters())

    assert main(["sample", "run", "--size", "5"]) == 0
    samples = np.load("run/samples.npy")
    assert samples.shape == (5, 16)
    assert set(np.unique(samples)) - {0.0, 1.0}  # means, not bits

    assert main(["reconstruct", "run", "--size", "4"]) == (0 if has_encoder else 66)
    importance = main(["evaluate", "run", "--num-particles", "4"])
    assert importance == (0 if has_encoder else 66)
    assert ("say --method annealed" in capsys.readouterr().err) is not has_encoder


def test_a_gan_is_evaluated_from_its_prior():
    assert train("gan") == 0
    options = ["--method", "annealed", "--num-temperatures", "3", "--split", "valid"]
    assert main(["evaluate", "run", *options]) == 0
    about = json.loads(Path("run/evidence.json").read_text())
    assert about["num_data"] == 9
    assert np.isfinite(about["log_evidence"])


def test_grey_values_are_played_with_and_bits_are_evaluated():
    """The game that sets data beside means is given grey values, the others bits of them."""
    assert train("vae_gan") == 0
    config = runs.read_config("run")
    assert config["binarize"] == "dynamic"
    assert config["model_options"]["likelihood"] == "bernoulli"
    assert config["data_facts"]["kind"] == "binary"
    seen = []

    def watch(game_name):
        from pvae import adversarial

        inner = adversarial._step
        seen.clear()

        def step(game, optimizers, batch):
            seen.append(batch)
            return inner(game, optimizers, batch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(adversarial, "_step", step)
            assert train(game_name, folder=f"again-{game_name}") == 0
        return torch.cat(seen).unique()

    assert len(watch("vae_gan")) > 2
    assert watch("avb").tolist() == [0.0, 1.0]


def test_the_seed_decides_and_watching_does_not():
    assert train("vae_gan", folder="one") == 0
    assert train("vae_gan", "--pictures", "1", "--track", "tensorboard", folder="two") == 0
    assert train("vae_gan", "--seed", "1", folder="three") == 0
    one, two, three = (
        load_tensors(Path(n) / "checkpoints" / "best")[0] for n in ("one", "two", "three")
    )
    assert any(name.startswith("game.discriminator.") for name in one)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["model.decoder.head.0.weight"], three["model.decoder.head.0.weight"])


def test_a_game_is_resumed_to_the_bytes_of_a_longer_one(capsys):
    assert train("vae_gan", folder="whole") == 0
    assert train("vae_gan", "--epochs", "1") == 0
    assert main(["train", "--resume", "run", "--epochs", "2", "--pictures", "1"]) == 0
    whole, resumed = (load_tensors(Path(n) / "checkpoints" / "best")[0] for n in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 2
    assert [path.name for path in sorted(Path("run/figures/epochs").iterdir())] == [
        "reconstructions-00002.png", "samples-00002.png"
    ]  # fmt: skip
    assert main(["train", "--resume", "run"]) == 0
    assert "was finished already" in capsys.readouterr().out
    assert main(["train", "--resume", "run", "--game.margin", "0.3"]) == 66
    assert "game_options.margin was 0.4 and is 0.3" in last_line(capsys)
    assert main(["train", "--resume", "run", "--game", "gan"]) == 66
    assert "game was 'vae_gan' and is 'gan'" in last_line(capsys)


def test_a_game_of_ones_own_is_a_function_in_a_file(capsys):
    Path("mine.py").write_text(OWN)
    assert train("./mine.py", "--game.pull", "0.5") == 0
    assert runs.read_config("run")["game_options"] == {"pull": 0.5}
    Path("mine.py").write_text(OWN.replace("guide.posterior", "guide.posteriour"))
    assert main(["train", "--resume", "run", "--epochs", "3"]) == 0
    assert "the copy in the run folder is used" in capsys.readouterr().err
    assert main(["reconstruct", "run", "--size", "4"]) == 0
    assert train("./mine.py", folder="broken") == 2
    assert "mine.py, line 21: AttributeError" in last_line(capsys)
    assert not Path("broken").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--objective", "iwae"], "--objective is for a training by a bound"),
        (["--objective.num_particles", "3"], "--objective is for a training by a bound"),
        (["--lr", "2e-3"], "its players' rate is --game.lr"),
        (["--optimizer", "sgd"], "--optimizer is for a training by a bound"),
        (["--engine", "compiled"], "--engine is for a training by a bound"),
        (["--alternate", "3"], "--alternate is for a training by a bound"),
        (["--game", "wgan"], "no game is called 'wgan': did you mean 'gan'"),
        (["--game.margins", "1"], "vae_gan has no option --game.margins: did you mean"),
        (["--game.margin", "wide"], "--game.margin takes a value of type"),
        (["--game.average", "1.5"], "at least 0 and below 1, got 1.5"),
        (["--game.discriminator", "x"], "--game.discriminator"),
        (["--game", "none", "--game.margin", "1"], "none is played: name one by --game"),
        (["--data", "lines.txt"], "text or padded sequences"),
        (["--transform", "none"], "whole numbers up to"),
        (["--guide", "flow"], "has no posterior(), by which this game asks it"),
        (["--guide", "auto"], "has no posterior(), by which this game asks it"),
    ],
)  # fmt: skip
def test_a_wrong_combination_is_one_sentence_and_leaves_nothing(options, said, capsys):
    assert train("vae_gan", *options) != 0
    error = last_line(capsys)
    assert error.startswith("pvae: error: ")
    assert said in error
    assert not Path("run").exists()


def test_tables_have_games_of_codes_alone(capsys):
    words = ["train", "vae", "--data", "table.npy", "--epochs", "1", "--model.z_dim", "2"]
    assert main([*words, "--game", "gan", "--run-dir", "run"]) == 2
    assert "the data have no image_shape" in last_line(capsys)
    assert not Path("run").exists()
    assert main([*words, "--game", "adversarial_autoencoder", "--run-dir", "run"]) == 0
    assert pvae.load("run").model.likelihood == "gaussian"


def test_other_commands_say_what_a_game_is_not_for(capsys):
    assert train("vae_gan") == 0
    assert main(["doctor", "run"]) == 66
    assert "was trained by a game" in last_line(capsys)
    assert main(["sweep", "conv", "--data", "images.npy", "--game", "gan", "--search",
                 "model.z_dim=2..3"]) == 2  # fmt: skip
    assert "--game is for one training" in last_line(capsys)
    assert main(["train", "vae", "--game.margin", "1"]) == 2
    assert "--game.margin is an option of a game" in last_line(capsys)


def test_what_collapsed_is_said_in_the_log_and_at_the_end(capsys):
    """A generator that hardly moves makes samples that are all alike."""
    assert train("gan", "--game.lr", "1e-6") == 0
    told = capsys.readouterr()
    assert "the generator has collapsed on few of them" in told.out
    assert "epoch 2: samples vary" in told.err
