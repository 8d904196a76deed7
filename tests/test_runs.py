"""Run folders: what is written can be loaded again, exactly, or is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pvae
from pvae import runs
from pvae.cli import main
from pvae.errors import OptionError, ProgramError, RunError

SMALL = ["--epochs", "2", "--model.width", "6", "--guide.hidden", "[8]"]

MODEL = """
import pyro
import pyro.distributions as dist
import torch
from torch import nn


class Mine(nn.Module):
    '''A small decoder.

    Args:
        width: Of its hidden layer.
    '''

    latents = {"z": (2,)}

    def __init__(self, x_dim: int, *, width: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, x_dim))
        self.register_buffer("offset", torch.randn(x_dim))

    def forward(self, x=None, size=1):
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(self.net(z) + self.offset, 1.0).to_event(1), obs=x)
"""

FUNCTIONS = """
import pyro
import pyro.distributions as dist
import torch
from torch import nn

decoder, encoder = nn.Linear(2, 64), nn.Linear(64, 4)


def model(x):
    pyro.module("decoder", decoder)
    noise = pyro.param("noise", torch.tensor(2.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(decoder(z), noise).to_event(1), obs=x)


def guide(x):
    pyro.module("encoder", encoder)
    loc, log_scale = encoder(x).chunk(2, -1)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
"""

PLAIN_GUIDE = """
import pyro
import pyro.distributions as dist
from torch import nn


class Plain(nn.Module):
    def __init__(self, x_mean, x_scale, latents) -> None:
        super().__init__()
        self.moments = x_mean, x_scale  # not buffers: no state dict holds them
        self.net = nn.Linear(len(x_mean), 4)

    def forward(self, x):
        mean, scale = self.moments
        loc, log_scale = self.net((x - mean) / scale).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def mine() -> Path:
    """A run of the user's own model file, in ``run/``."""
    Path("mine.py").write_text(MODEL)
    assert main(["train", "./mine.py", *SMALL, "--run-dir", "run"]) == 0
    return Path("run")


def evidence(run: Any, number: int = 40) -> Tensor:
    x = pvae.data.load("digits").test.x[:number]
    found: Tensor = pvae.evidence.importance(run.model, run.guide, x, 20, seed=1).log_evidence
    return found


# --- loading -------------------------------------------------------------------------------------


def test_load_gives_the_trained_pair_back(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "run", "--num-particles", "20", "--seed", "1"]) == 0
    with monkeypatch.context() as context:
        context.setattr("pvae.data.load", lambda *_, **__: pytest.fail("data were loaded"))
        run = pvae.load(mine)
    report = json.loads(Path("run/evidence.json").read_text())
    log_det = pvae.data.load("digits").test.log_det
    assert float((evidence(run, 360) + log_det).mean()) == pytest.approx(report["log_evidence"])
    assert [row["epoch"] for row in run.history] == [1, 2]
    assert (run.best_epoch, run.stopped, run.device, run.run_dir) == (2, "epochs", "cpu", mine)
    assert run.num_parameters == sum(
        p.numel() for m in (run.model, run.guide) for p in m.parameters()
    )
    valid = pvae.data.load("digits").valid.x
    direct = pvae.evidence.importance(run.model, run.guide, valid, 200).elbo.mean()
    assert float(direct) == pytest.approx(run.history[-1]["valid_bound"], rel=0.02)


def test_loading_leaves_the_random_stream_alone(mine: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    pvae.load(mine)
    assert torch.equal(torch.rand(3), expected)


def test_the_copy_stands_in_for_a_file_that_is_gone(mine: Path) -> None:
    expected = evidence(pvae.load(mine))
    Path("mine.py").unlink()
    assert torch.equal(evidence(pvae.load(mine)), expected)
    shutil.rmtree("run/source")
    with pytest.raises(ProgramError, match=r"mine\.py does not exist"):
        pvae.load(mine)


def test_the_copy_stands_in_for_a_file_that_changed(mine: Path) -> None:
    expected = evidence(pvae.load(mine))
    Path("mine.py").write_text(MODEL.replace("nn.Tanh()", "nn.ReLU()"))
    with pytest.warns(UserWarning, match="mine.py has changed since the training"):
        run = pvae.load(mine)
    assert torch.equal(evidence(run), expected)


def test_files_of_one_name_in_two_folders_have_a_copy_each() -> None:
    for place, text in (("a", MODEL), ("b", PLAIN_GUIDE)):
        Path(place).mkdir()
        Path(place, "mine.py").write_text(text)
    words = ["./a/mine.py", "--guide", "./b/mine.py", "--epochs", "2", "--run-dir", "run"]
    assert main(["train", *words]) == 0
    expected = evidence(pvae.load("run"))
    for place in ("a", "b"):
        shutil.rmtree(place)
    assert torch.equal(evidence(pvae.load("run")), expected)


def test_a_folder_may_be_moved(mine: Path) -> None:
    expected = evidence(pvae.load(mine))
    mine.rename("elsewhere")
    assert torch.equal(evidence(pvae.load("elsewhere")), expected)


def test_plain_functions_with_a_parameter_store() -> None:
    Path("pair.py").write_text(FUNCTIONS)
    argv = ["./pair.py", "--guide", "./pair.py", "--epochs", "2", "--run-dir", "run"]
    assert main(["train", *argv]) == 0
    expected = evidence(pvae.load("run"))
    pyro.clear_param_store()
    Path("pair.py").write_text(FUNCTIONS + "\n# read anew: nothing of the training is left in it\n")
    with pytest.warns(UserWarning, match="changed"):
        run = pvae.load("run")
    pyro.clear_param_store()
    shutil.copy("pair.py", "run/source/pair.py")
    run = pvae.load("run")
    assert torch.equal(evidence(run), expected)
    assert float(pyro.param("noise").detach()) != 2.0


def test_moments_of_the_data_need_not_be_buffers(mine: Path) -> None:
    Path("plain.py").write_text(PLAIN_GUIDE)
    argv = ["./mine.py", "--guide", "plain.py", "--epochs", "1", "--run-dir", "plain"]
    assert main(["train", *argv]) == 0
    moments = pvae.load("plain").guide.moments
    x = pvae.data.load("digits").train.x
    assert torch.equal(moments[0], x.mean(0))
    assert torch.equal(moments[1], runs.statistics(pvae.data.load("digits"))["x_scale"])


def test_shared_parameters_are_restored_once() -> None:
    argv = ["factor-analysis", "--guide", "exact", "--epochs", "1", "--model.z_dim", "2"]
    assert main(["train", *argv, "--run-dir", "run"]) == 0
    run = pvae.load("run")
    assert run.guide.model is run.model
    x = pvae.data.load("digits").test.x[:40]
    torch.testing.assert_close(evidence(run), run.model.log_evidence(x).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": "offset2"}, "was the model's file changed"),
        ({"width)": "width + 1)", "(width,": "(width + 1,"}, "has shape"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    mine: Path, change: dict[str, str], message: str
) -> None:
    text = MODEL
    for old, new in change.items():
        text = text.replace(old, new)
    for place in ("mine.py", "run/source/mine.py"):
        Path(place).write_text(text)
    with pytest.raises((RunError, ProgramError), match=message):
        pvae.load(mine)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.yaml", "no config.yaml"),
        ("metrics.jsonl", "metrics.jsonl is missing"),
        ("checkpoints/best/manifest.json", "no readable manifest.json"),
        ("checkpoints/best/tensors.safetensors", "no readable tensors.safetensors"),
        ("checkpoints/data/tensors.safetensors", "no readable tensors.safetensors"),
    ],
)
def test_missing_files_are_named(mine: Path, file: str, message: str) -> None:
    (mine / file).unlink()
    for checkpoint in (mine / "checkpoints").glob("step-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(RunError, match=message):
        pvae.load(mine)


def test_a_config_that_lost_a_line_is_refused(mine: Path) -> None:
    path = mine / "config.yaml"
    path.write_text(path.read_text().replace("guide: auto\n", ""))
    with pytest.raises(RunError, match="has no 'guide'"):
        pvae.load(mine)


def test_data_that_changed_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 3)
    Path("x.csv").write_text("\n".join(",".join(f"{v:.4f}" for v in row) for row in x.tolist()))
    argv = ["vae", "--data", "x.csv", "--epochs", "1", "--model.hidden", "[4]", "--run-dir", "run"]
    assert main(["train", *argv]) == 0
    assert main(["evaluate", "run", "--num-particles", "9"]) == 0
    assert "warning" not in capsys.readouterr().err
    Path("x.csv").write_text(Path("x.csv").read_text().replace("1", "2", 1))
    assert main(["evaluate", "run", "--num-particles", "9"]) == 0
    assert "pvae: warning: x.csv has changed since the training" in capsys.readouterr().err


# --- folders and YAML ----------------------------------------------------------------------------


def write_half(folder: Path) -> None:
    (folder / "a").write_text("new")
    raise KeyError


def test_create_leaves_nothing_when_it_fails() -> None:
    with pytest.raises(KeyError), runs.create("a/b/run") as folder:
        write_half(folder)
    assert list(Path().iterdir()) == []


def test_create_makes_the_folder_at_the_end() -> None:
    with runs.create("a/run") as folder:
        (folder / "file").write_text("whole")
        assert not Path("a/run").exists()
    assert [path.name for path in Path("a").iterdir()] == ["run"]
    assert Path("a/run/file").read_text() == "whole"
    with pytest.raises(RunError, match="exists already"), runs.create("a/run"):
        pass


def test_create_takes_an_empty_folder() -> None:
    Path("run").mkdir()
    with runs.create("run") as folder:
        (folder / "file").write_text("whole")
    assert Path("run/file").is_file()


def test_publish_changes_all_or_nothing() -> None:
    run = Path("run")
    run.mkdir()
    (run / "a").write_text("old")
    with pytest.raises(KeyError), runs.publish(run) as aside:
        write_half(aside)
    assert [path.name for path in run.iterdir()] == ["a"]
    assert (run / "a").read_text() == "old"
    with runs.publish(run) as aside:
        (aside / "a").write_text("new")
        (aside / "figures").mkdir()
        (aside / "figures" / "b").write_text("b")
    assert (run / "a").read_text() == "new"
    assert sorted(path.name for path in run.iterdir()) == ["a", "figures"]


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001", ".001"])
def test_yaml_numbers(text: str) -> None:
    Path("a.yaml").write_text(f"lr: {text}\n")
    assert runs.read_yaml(Path("a.yaml")) == {"lr": 0.001}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: 'a' is there twice"),
        ("a:\n  b: 1\n  b: 2\n", "line 3: 'b' is there twice"),
        ("? [1, 2]\n: 3\n", "line 1: a key must be a word"),
        ("a: !!python/object/apply:os.getcwd []\n", "not YAML"),
        ("a: &x [1]\nb: *y\n", "not YAML"),
        ("", "it is empty"),
        ("[" * 3000, "not YAML"),
    ],
)
def test_yaml_that_is_refused(text: str, message: str) -> None:
    Path("a.yaml").write_text(text)
    with pytest.raises(OptionError, match=message):
        runs.read_yaml(Path("a.yaml"))


def test_yaml_with_a_byte_order_mark() -> None:
    Path("a.yaml").write_bytes(b"\xef\xbb\xbfepochs: 3\n")
    assert runs.read_yaml(Path("a.yaml")) == {"epochs": 3}


def test_json_is_strict() -> None:
    runs.write_json(Path("a.json"), {"a": float("nan"), "b": [float("inf"), 1], "c": {"d": -0.5}})
    assert json.loads(Path("a.json").read_text()) == {"a": None, "b": [None, 1], "c": {"d": -0.5}}


# --- drawing -------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """``z ~ Normal(0, 1)``, ``x ~ Normal(3 z, 0.1)`` in two dimensions."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(3 * z, 0.1).to_event(1), obs=x)


def tiny_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 3, 0.01).to_event(1))


def test_generate_draws_from_the_prior() -> None:
    draws, means, latent = runs.generate(Tiny(), torch.zeros(4000, 2), seed=1)
    assert means is not None
    assert latent is None
    variance, count = 9.01, draws.numel()
    assert abs(float(draws.mean())) < 4.5 * (variance / count) ** 0.5
    assert abs(float(draws.var()) - variance) < 4.5 * variance * (2 / count) ** 0.5
    assert float((draws - means).std()) == pytest.approx(0.1, rel=0.1)


def test_generate_with_a_guide_reconstructs() -> None:
    x = 5 * torch.randn(50, 2)
    _, means, latent = runs.generate(Tiny(), x, guide=tiny_guide)
    assert means is not None
    assert latent is not None
    torch.testing.assert_close(means, x, rtol=0, atol=0.3)
    torch.testing.assert_close(latent, x / 3)


def test_generate_repeats_by_seed_and_leaves_the_stream_alone() -> None:
    torch.manual_seed(0)
    first = runs.generate(Tiny(), torch.zeros(5, 2), seed=1)[0]
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(runs.generate(Tiny(), torch.zeros(5, 2), seed=1)[0], first)
    assert not torch.equal(runs.generate(Tiny(), torch.zeros(5, 2), seed=2)[0], first)


def test_generate_needs_an_observed_site() -> None:
    with pytest.raises(ProgramError, match="observes no site"):
        runs.generate(tiny_guide, torch.zeros(5, 2))


def test_a_picture_that_fails_is_a_warning() -> None:
    def fail() -> Any:
        raise ValueError("no such picture")

    with pytest.warns(UserWarning, match=r"a\.png was not drawn \(ValueError: no such picture\)"):
        assert runs.save_figure(fail, Path("a.png")) is None
    assert not Path("a.png").exists()


def test_constant_features_have_scale_one() -> None:
    dataset = pvae.data.load("digits")
    moments = runs.statistics(dataset)
    constant = dataset.train.x.std(0) == 0
    assert torch.equal(moments["x_scale"][constant], torch.ones(int(constant.sum())))
    assert bool((moments["x_scale"] > 0).all())


# --- pictures ------------------------------------------------------------------------------------


def test_training_curves_are_on_the_scale_of_what_is_printed(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a model's file is called by its name, wherever it lies."""
    from pvae import plots

    drawn: dict[str, Any] = {}
    draw = plots.training_curves
    monkeypatch.setattr(
        plots, "training_curves", lambda histories: drawn.update(histories) or draw(histories)
    )
    run, dataset = pvae.load("run"), pvae.data.load("digits")
    runs.draw_figures(run, dataset, Path("run"), name="/elsewhere/mine.py:Mine")
    (name, (first, *_)) = next(iter(drawn.items()))
    assert name == "mine.py:Mine"
    for key, split in (("bound", dataset.train), ("valid_bound", dataset.valid)):
        shift = float(split.log_det.mean())
        assert first[key] == pytest.approx(run.history[0][key] + shift)
        assert abs(shift) > 1
