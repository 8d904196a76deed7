"""A user's mistakes at the command line: one line, an exit code, and nothing left behind."""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pvae.cli import main

SMALL = ["--epochs", "1", "--model.hidden", "[8]", "--guide.hidden", "[8]", "--model.z_dim", "2"]
TRAIN = ["train", "vae", *SMALL]

NORMAL = "dist.Normal(self.net(z), 1.0)"
MODEL = """
import pyro
import pyro.distributions as dist
import torch
from torch import nn


class Mine(nn.Module):
    {latents}
    def __init__(self, x_dim: int, *, width: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, x_dim))

    def forward(self, x=None, size=1):
        {first}
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            z = pyro.sample("{site}", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)
"""


def model_file(
    place: Path,
    *,
    latents: str = 'latents = {"z": (2,)}',
    first: str = "pass",
    site: str = "z",
    extra: str = "",
) -> str:
    path = place / "mine.py"
    path.write_text(extra + MODEL.format(latents=latents, first=first, site=site))
    return str(path)


def table(place: Path, text: str) -> str:
    path = place / "table.csv"
    path.write_text(text)
    return str(path)


def array(place: Path, values: np.ndarray[Any, Any]) -> str:
    np.save(place / "rows.npy", values)
    return str(place / "rows.npy")


def sentences(place: Path) -> str:
    path = place / "lines.txt"
    path.write_text("one two three\ntwo three\nfour\n" * 9)
    return str(path)


def config(place: Path, text: str) -> str:
    path = place / "run.yaml"
    path.write_text(text)
    return str(path)


def rows(number: int = 40, seed: int = 0) -> str:
    values = np.random.default_rng(seed).normal(size=(number, 3))
    return "\n".join(",".join(f"{value:.4f}" for value in row) for row in values) + "\n"


def with_nan(place: Path) -> str:
    lines = rows().splitlines()
    lines[7] = "0.1,nan,0.3"
    return table(place, "\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main([*TRAIN, "--run-dir", str(folder)]) == 0
    return folder


def damaged(place: Path, trained: Path) -> str:
    folder = place / "damaged"
    shutil.copytree(trained, folder)
    for path in folder.glob("checkpoints/[bs]*/tensors.safetensors"):  # best and steps
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
    return str(folder)


def edited(place: Path, trained: Path, line: str, other: str) -> str:
    """The run with another line in its configuration."""
    folder = place / "edited"
    shutil.copytree(trained, folder)
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace(line, other))
    return str(folder)


def fitted(place: Path) -> Path:
    (place / "fitted" / "checkpoints").mkdir(parents=True)
    return place / "fitted"


def counts(place: Path) -> str:
    path = place / "counts.py"
    likelihood = "dist.Poisson(self.net(z).exp())"
    path.write_text(Path(model_file(place)).read_text().replace(NORMAL, likelihood))
    return str(path)


Case = Callable[[Path, Path], list[str]]

CASES: dict[str, tuple[Case, int, tuple[str, ...]]] = {
    # --- the command line itself
    "misspelt command": (lambda p, r: ["trian"], 2, ("'trian'", "did you mean 'train'")),
    "no command": (lambda p, r: ["--frobnicate"], 2, ("--frobnicate",)),
    "no model": (lambda p, r: ["train"], 2, ("needs a MODEL", "vae")),
    "misspelt option": (
        lambda p, r: [*TRAIN, "--epcohs", "3"],
        2,
        ("--epcohs", "did you mean '--epochs'"),
    ),
    "option without a value": (lambda p, r: [*TRAIN, "--lr"], 2, ("--lr needs a value", "--help")),
    "misspelt model option": (
        lambda p, r: ["train", "vae", "--model.zdim", "3"],
        2,
        ("VAE has no option --model.zdim", "did you mean '--model.z_dim'"),
    ),
    "misspelt component": (
        lambda p, r: ["train", "vae", "--modle.z_dim", "3"],
        2,
        ("--modle.z_dim", "did you mean '--model.z_dim'"),
    ),
    "model option without a value": (
        lambda p, r: ["train", "vae", "--model.z_dim"],
        2,
        ("--model.z_dim needs a value",),
    ),
    "option known from the data": (
        lambda p, r: ["train", "vae", "--model.x_dim", "3"],
        2,
        ("--model.x_dim is known from the data",),
    ),
    # --- names
    "misspelt model": (lambda p, r: ["train", "vea"], 2, ("'vea'", "did you mean 'vae'")),
    "misspelt guide": (
        lambda p, r: [*TRAIN, "--guide", "guassian"],
        2,
        ("'guassian'", "did you mean 'gaussian'"),
    ),
    "misspelt objective": (
        lambda p, r: [*TRAIN, "--objective", "iawe"],
        2,
        ("'iawe'", "did you mean 'iwae'"),
    ),
    "misspelt gradient": (
        lambda p, r: [*TRAIN, "--objective.gradient", "pathwyse"],
        2,
        ("'pathwyse'", "did you mean 'pathwise'"),
    ),
    "schedule of a wrong kind": (
        lambda p, r: [*TRAIN, "--objective.beta", "Linear(steps='x')"],
        2,
        ("Linear(steps='x')", "cannot be built"),
    ),
    "misspelt optimizer": (
        lambda p, r: [*TRAIN, "--optimizer", "adma"],
        2,
        ("'adma'", "did you mean"),
    ),
    "misspelt likelihood": (
        lambda p, r: [*TRAIN, "--model.likelihood", "gausian"],
        2,
        ("'gausian'", "did you mean 'gaussian'"),
    ),
    "misspelt activation": (
        lambda p, r: [*TRAIN, "--model.activation", "thanh"],
        2,
        ("'thanh'", "did you mean 'tanh'"),
    ),
    "misspelt engine": (lambda p, r: [*TRAIN, "--engine", "eagre"], 2, ("did you mean 'eager'",)),
    "misspelt schedule": (
        lambda p, r: [*TRAIN, "--lr-schedule", "cosin"],
        2,
        ("did you mean 'cosine'",),
    ),
    "unknown device": (lambda p, r: [*TRAIN, "--device", "tpu9"], 2, ("'tpu9'", "try 'cpu'")),
    "unknown module": (lambda p, r: ["train", "no.such:Model"], 2, ("no.such:Model", "imported")),
    "no module": (lambda p, r: ["train", ".:Model"], 2, (".:Model names no module",)),
    "class that is no program": (
        lambda p, r: ["train", "pathlib:Path"],
        2,
        ("which cannot be called", "a class with forward"),
    ),
    # --- numbers
    "negative epochs": (lambda p, r: [*TRAIN, "--epochs", "-1"], 2, ("epochs", "at least 1")),
    "epochs in words": (lambda p, r: [*TRAIN, "--epochs", "ten"], 2, ("--epochs", "'ten'")),
    "broken epochs": (lambda p, r: [*TRAIN, "--epochs", "1.5"], 2, ("whole number", "'1.5'")),
    "no learning rate": (lambda p, r: [*TRAIN, "--lr", "0"], 2, ("lr must be positive",)),
    "infinite learning rate": (lambda p, r: [*TRAIN, "--lr", "inf"], 2, ("finite, got inf",)),
    "negative clipping": (
        lambda p, r: [*TRAIN, "--clip-norm", "-1"],
        2,
        ("clip_norm must be positive", "-1"),
    ),
    "no clipping at all": (lambda p, r: [*TRAIN, "--clip-norm", "0"], 2, ("clip_norm", "None")),
    "weight in words": (
        lambda p, r: [*TRAIN, "--objective.beta", "x"],
        2,
        ("beta takes no 'x'", "a number", "Linear"),
    ),
    "data without a name": (lambda p, r: [*TRAIN, "--data", ""], 2, ("empty", "path")),
    "empty config": (lambda p, r: [*TRAIN, "--config", config(p, "")], 2, ("it is empty",)),
    "folder of fit": (lambda p, r: ["sample", str(fitted(p))], 66, ("pvae.fit", "resume=True")),
    "empty batches": (lambda p, r: [*TRAIN, "--batch-size", "0"], 2, ("batch_size", "least 1")),
    "no patience": (lambda p, r: [*TRAIN, "--patience", "0"], 2, ("patience", "at least 1")),
    "no latent dimension": (
        lambda p, r: ["train", "vae", "--model.z_dim", "0"],
        2,
        ("at least 1",),
    ),
    "negative latent dimension": (
        lambda p, r: ["train", "vae", "--model.z_dim", "-3"],
        2,
        ("vae cannot be built with z_dim = -3", "at least 1"),
    ),
    "width of zero": (
        lambda p, r: ["train", "vae", "--guide.hidden", "[0]"],
        2,
        ("hidden = [0]", "at least 1"),
    ),
    "rank of zero": (
        lambda p, r: ["train", "vae", "--guide.rank", "0"],
        2,
        ("rank must be at least 1, got 0",),
    ),
    "seed beyond all generators": (
        lambda p, r: ["evaluate", str(r), "--seed", "9" * 20],
        2,
        ("--seed", "2^63"),
    ),
    "seed of scikit-learn": (
        lambda p, r: ["compare", "--seed", "-1"],
        2,
        ("--seed", "from 0 to 2^32 - 1", "'-1'"),
    ),
    "broken latent dimension": (
        lambda p, r: ["train", "vae", "--model.z_dim", "2.5"],
        2,
        ("--model.z_dim", "int", "2.5"),
    ),
    "hidden is no list": (
        lambda p, r: ["train", "vae", "--model.hidden", "wide"],
        2,
        ("--model.hidden", "Sequence[int]", "'wide'"),
    ),
    "no particles": (
        lambda p, r: [*TRAIN, "--objective", "iwae", "--objective.num_particles", "0"],
        2,
        ("num_particles", "at least 1"),
    ),
    "unsound objective": (
        lambda p, r: [*TRAIN, "--objective", "iwae", "--objective.free_bits", "0.5"],
        2,
        ("free_bits holds for bound=elbo",),
    ),
    # --- the user's program
    "missing file": (
        lambda p, r: ["train", "./gone.py:Mine"],
        2,
        ("gone.py", "does not exist"),
    ),
    "file without the class": (
        lambda p, r: ["train", f"{model_file(p)}:Mien"],
        2,
        ("no 'Mien'", "did you mean 'Mine'"),
    ),
    "file without a model": (
        lambda p, r: ["train", table(p, "x = 1\n") + ":Mine"],
        2,
        ("table.csv",),
    ),
    "file with a syntax error": (
        lambda p, r: ["train", model_file(p, extra="def broken(:\n")],
        2,
        ("mine.py, line 1", "SyntaxError"),
    ),
    "file that does not import": (
        lambda p, r: ["train", model_file(p, extra="import nowhere_to_be_found\n")],
        2,
        ("mine.py, line 1", "nowhere_to_be_found"),
    ),
    "model without latents": (
        lambda p, r: ["train", model_file(p, latents=""), "--guide", "gaussian", "--epochs", "1"],
        2,
        ("latent", "--guide"),
    ),
    "model that raises": (
        lambda p, r: ["train", model_file(p, first='raise ValueError("boom")')],
        2,
        ("ValueError: boom", "mine.py, line 15", "--debug"),
    ),
    "guide of another model": (
        lambda p, r: ["train", model_file(p, site="u"), "--guide", "gaussian", "--epochs", "1"],
        2,
        ("'u'", "'z'"),
    ),
    "model that cannot be built": (
        lambda p, r: ["train", model_file(p), "--model.width", "-4"],
        2,
        ("cannot be built with width = -4", "mine.py, line 12"),
    ),
    "two models in a file": (
        lambda p, r: [
            "train",
            model_file(p, extra="from torch import nn\nclass A(nn.Module): ..."),
        ],
        2,
        ("A, Mine", "which one"),
    ),
    # --- data
    "unknown data set": (
        lambda p, r: [*TRAIN, "--data", "digit"],
        2,
        ("'digit'", "did you mean 'digits'"),
    ),
    "missing data file": (lambda p, r: [*TRAIN, "--data", "gone.csv"], 65, ("gone.csv",)),
    "no network": (lambda p, r: [*TRAIN, "--data", "fashion-mnist"], 65, ("PVAE_DATA",)),
    "nan in a table": (lambda p, r: [*TRAIN, "--data", with_nan(p)], 65, ("row 7", "nan")),
    "empty table": (lambda p, r: [*TRAIN, "--data", table(p, "")], 65, ("table.csv",)),
    "text in a table": (
        lambda p, r: [*TRAIN, "--data", table(p, "a,b\n1,2\n3,many\n")],
        65,
        ("'many'",),
    ),
    "semicolons in a table": (
        lambda p, r: [*TRAIN, "--data", table(p, "1,5;2,5\n" * 9)],
        65,
        ("'5;2'", "several numbers", "commas between cells"),
    ),
    "tabs in a table": (
        lambda p, r: [*TRAIN, "--data", table(p, "1.5\t2\n" * 9)],
        65,
        ("several numbers", "commas between cells"),
    ),
    "rows without a number": (
        lambda p, r: [*TRAIN, "--data", array(p, np.zeros((9, 0)))],
        65,
        ("(9, 0)", "at least one number in each row"),
    ),
    "rows of words": (
        lambda p, r: [*TRAIN, "--data", array(p, np.array([["a", "b"]] * 9))],
        65,
        ("<U1", "number its words"),
    ),
    "data without a suffix": (
        lambda p, r: [*TRAIN, "--data", "/dev/null"],
        65,
        ("ends in no suffix",),
    ),
    "images that are no folder": (
        lambda p, r: [*TRAIN, "--data-unreadable", "skip"],
        2,
        ("unreadable='skip'", "folder of images", "digits"),
    ),
    "labels for a model that takes none": (
        lambda p, r: [*TRAIN, "--labels", "5"],
        2,
        ("labels=5", "VAE has none", "leave it out"),
    ),
    "grey pixels for Bernoulli": (
        lambda p, r: [*TRAIN, "--model.likelihood", "bernoulli"],
        65,
        ("Bernoulli", "binari"),
    ),
    "counts that were given noise": (
        lambda p, r: ["train", counts(p), "--data", table(p, "1,2\n3,0\n5,1\n" * 9)],
        65,
        ("Poisson", "whole numbers from 0", "transform='none'"),
    ),
    "misspelt binarize": (
        lambda p, r: [*TRAIN, "--binarize", "dinamic"],
        2,
        ("did you mean 'dynamic'",),
    ),
    "misspelt transform": (
        lambda p, r: [*TRAIN, "--transform", "logits"],
        2,
        ("did you mean 'logit'",),
    ),
    # --- config files
    "config that is gone": (lambda p, r: [*TRAIN, "--config", "gone.yaml"], 2, ("gone.yaml",)),
    "config with an unknown key": (
        lambda p, r: [*TRAIN, "--config", config(p, "epcohs: 3\n")],
        2,
        ("run.yaml", "'epcohs'", "did you mean 'epochs'"),
    ),
    "config with an unknown model option": (
        lambda p, r: [*TRAIN, "--config", config(p, "model_options: {zdim: 3}\n")],
        2,
        ("run.yaml: model_options", "zdim", "did you mean 'z_dim'"),
    ),
    "config with a key twice": (
        lambda p, r: [*TRAIN, "--config", config(p, "lr: 0.1\nepochs: 1\nlr: 0.2\n")],
        2,
        ("run.yaml, line 3", "'lr'", "line 1"),
    ),
    "config with a nested key twice": (
        lambda p, r: [*TRAIN, "--config", config(p, "model_options: {z_dim: 1, z_dim: 2}\n")],
        2,
        ("run.yaml, line 1", "'z_dim'"),
    ),
    "config that is no YAML": (
        lambda p, r: [*TRAIN, "--config", config(p, "lr: [0.1\nepochs\n")],
        2,
        ("run.yaml, line", "not YAML"),
    ),
    "config with a tab": (
        lambda p, r: [*TRAIN, "--config", config(p, "model_options:\n\tz_dim: 2\n")],
        2,
        ("run.yaml, line 2", "not YAML"),
    ),
    "config that is a list": (
        lambda p, r: [*TRAIN, "--config", config(p, "- 1\n- 2\n")],
        2,
        ("run.yaml", "list"),
    ),
    "config with a value of another type": (
        lambda p, r: ["train", "vae", "--config", config(p, "epochs: many\n")],
        2,
        ("run.yaml", "'epochs'", "whole number"),
    ),
    "config with a list for a number": (
        lambda p, r: ["train", "vae", "--config", config(p, "epochs: [1, 2]\n")],
        2,
        ("run.yaml", "'epochs'", "one value"),
    ),
    # --- run folders
    "run folder that is gone": (lambda p, r: ["evaluate", "gone"], 66, ("no run folder gone",)),
    "run folder that is none": (lambda p, r: ["sample", "."], 66, ("no config.yaml",)),
    "run folder that exists": (
        lambda p, r: [*TRAIN, "--run-dir", str(r)],
        66,
        ("exists already", "--run-dir"),
    ),
    "run folder that cannot be made": (
        lambda p, r: [*TRAIN, "--run-dir", table(p, "") + "/run"],
        66,
        ("cannot be written",),
    ),
    "run folder whose options are of another kind": (
        lambda p, r: ["evaluate", edited(p, r, "seed: 0", "seed: x")],
        66,
        ("config.yaml", "'seed'", "'x'"),
    ),
    "run folder without a model": (
        lambda p, r: ["evaluate", edited(p, r, "model: vae", "model: null")],
        66,
        ("config.yaml", "'model' is None", "train the run again"),
    ),
    "no run folder": (lambda p, r: ["evaluate"], 2, ("needs RUN", "evaluate --help")),
    "two run folders": (lambda p, r: ["evaluate", str(r), "other"], 2, ("cannot take 'other'",)),
    "no boards": (lambda p, r: ["board", "binary", "--data", ""], 2, ("--data", "names")),
    "no temperatures": (
        lambda p, r: ["evaluate", str(r), "--method", "annealed", "--num-temperatures", "0"],
        2,
        ("--num-temperatures", "at least 2"),
    ),
    "no tolerance": (
        lambda p, r: ["evaluate", str(r), "--method", "auto", "--tolerance", "nan"],
        2,
        ("--tolerance", "positive", "nan"),
    ),
    "damaged checkpoint": (
        lambda p, r: ["evaluate", damaged(p, r)],
        66,
        ("tensors.safetensors", "damaged"),
    ),
    "evaluation without particles": (
        lambda p, r: ["evaluate", str(r), "--num-particles", "0"],
        2,
        ("--num-particles must be at least 1, got 0",),
    ),
    "unknown split": (
        lambda p, r: ["evaluate", str(r), "--split", "tset"],
        2,
        ("'tset'", "did you mean 'test'"),
    ),
    "evaluation on other data": (
        lambda p, r: ["evaluate", str(r), "--data", table(p, rows())],
        65,
        ("64 features", "has 3"),
    ),
    "no samples": (lambda p, r: ["sample", str(r), "--size", "0"], 2, ("--size", "at least 1")),
    "more samples than memory": (
        lambda p, r: ["sample", str(r), "--size", "9" * 14],
        70,
        ("memory is too small", "fewer at a time"),
    ),
    "samples of a wrong kind": (
        lambda p, r: ["sample", str(r), "--out", "x.jpeg"],
        2,
        (".npy or .png", "x.jpeg"),
    ),
    "runs of different data": (
        lambda p, r: ["compare", str(r), edited(p, r, "transform: null", "transform: logit")],
        66,
        ("same data", "transform differs"),
    ),
    "epochs of runs that are trained": (
        lambda p, r: ["compare", str(r), "--epochs", "3"],
        2,
        ("--epochs is for the roster", "leave one out"),
    ),
    "bits of runs that are trained": (
        lambda p, r: ["compare", str(r), "--binarize", "fixed"],
        2,
        ("--binarize is for the roster", "leave one out"),
    ),
    "roster for sentences": (
        lambda p, r: ["compare", "--data", sentences(p)],
        65,
        ("lines.txt holds padded sequences", "pvae compare RUN RUN"),
    ),
    "comparison without particles": (
        lambda p, r: ["compare", "--num-particles", "0"],
        2,
        ("--num-particles", "at least 1"),
    ),
    "comparison on unknown data": (
        lambda p, r: ["compare", "--data", "digti"],
        2,
        ("did you mean 'digits'",),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_mistake_is_one_line_and_leaves_nothing(
    name: str,
    trained: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.delenv("PVAE_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.chdir(tmp_path)
    make, code, words = CASES[name]
    argv = make(tmp_path, trained)
    before = sorted([*tmp_path.rglob("*"), *trained.rglob("*")])
    capsys.readouterr()
    assert main(argv) == code
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("pvae: error: ")
    assert sum(line.startswith("pvae: error") for line in errors) == 1
    assert not any("Traceback" in line for line in errors)
    for word in words:
        assert word in errors[-1]
    assert sorted([*tmp_path.rglob("*"), *trained.rglob("*")]) == before
