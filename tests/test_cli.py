"""The command line: what each command writes and says, from the same numbers as the library's."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pvae
from pvae import catalogue, runs
from pvae.checkpoints import load_tensors
from pvae.cli import main
from pvae.errors import ObjectiveError, OptionError
from pvae.evidence import escalation
from pvae.models.vae import VAE

TINY = ["--model.hidden", "[8]", "--guide.hidden", "[8]", "--model.z_dim", "2"]
QUICK = [*TINY, "--epochs", "2", "--engine", "eager"]  # auto chooses by the clock


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "vae", *QUICK, "--run-dir", str(folder)]) == 0
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config_of(folder: str | Path) -> dict[str, Any]:
    return runs.read_yaml(Path(folder) / "config.yaml")


def files(folder: str | Path) -> set[str]:
    root = Path(folder)
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


# --- help ----------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pvae.cli import main\n"
        "main(['--help']); main(['train', '--help']); main(['--version'])\n"
        "heavy = {'torch', 'pyro', 'matplotlib', 'numpy', 'sklearn', 'arviz', 'jsonargparse'}\n"
        "sys.exit(len(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "COMMAND" in done.stdout
    assert "--lr-schedule" in done.stdout
    assert f"pvae {pvae.__version__}" in done.stdout


def test_help_of_a_model_shows_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "vae", "--objective", "dreg", "--help"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert "--model.z_dim … Number of latent dimensions. (int, default 16)" in page
    assert "--guide.covariance" in page
    assert "objective options (dreg)" in page
    assert "--model.x_dim" not in page
    assert "--guide.latents" not in page


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    page = capsys.readouterr().out
    for name in ("vae", "gaussian", "dreg", "mnist-static", "kernel-density", "adamw"):
        assert f"\n  {name} " in page
    plain = {"vae", "beta_vae", "iwae", "dreg", "stl"}
    assert catalogue.objectives().keys() == plain | {
        "wake_sleep", "rws", "mcem", "rebar", "relax", "disarm", "vimco", "renyi_vae", "miwae",
        "piwae", "ciwae", "tvo", "chivi", "beta_tcvae", "factor_vae", "dip_vae", "info_vae", "wae",
        "capacity_vae", "free_bits_vae", "balanced_vae", "resampled_iwae",
    }  # fmt: skip


def test_broken_pipe_is_quiet() -> None:
    code = "import sys; from pvae.cli import main; sys.exit(main(['list']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait() == 141
    assert process.stderr.read() == ""
    process.stderr.close()


# --- train ---------------------------------------------------------------------------------------


def test_output_that_cannot_be_shown_is_no_error() -> None:
    command = [sys.executable, "-m", "pvae", "train", "--help"]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=ascii_only)
    assert done.returncode == 0
    assert b"--config FILE" in done.stdout
    assert b"rws, ?" in done.stdout
    closed = " ".join(["exec", *command, ">&-"])
    done = subprocess.run(["sh", "-c", closed], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_what_an_objective_learns_is_kept_and_not_taken_for_the_pair(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["--objective", "factor_vae", "--objective.gamma", "5"]
    assert main(["train", "vae", *QUICK, *options, "--run-dir", str(folder)]) == 0
    names = load_tensors(folder / "checkpoints" / "best")[0]
    assert sum(name.startswith("objective.discriminator.") for name in names) == 8
    pvae.load(folder)


def test_train_writes_one_folder(trained: Path) -> None:
    expected = {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints/best/tensors.safetensors",
        "checkpoints/best/manifest.json",
        "figures/training_curves.png",
        "figures/samples.png",
        "figures/reconstructions.png",
        "figures/latents.png",
    }
    assert expected <= files(trained)
    config = config_of(trained)
    assert config["model_options"] == {
        "z_dim": 2,
        "hidden": [8],
        "activation": "silu",
        "likelihood": "gaussian",
        "prior": "normal",
        "prior_components": 10,
    }
    assert config["data_facts"]["x_dim"] == 64
    assert config["data_facts"]["num_levels"] == 17
    assert len((trained / "metrics.jsonl").read_text().splitlines()) == 2
    assert not list(trained.parent.glob(".*"))


def test_default_folders_are_numbered(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main(["train", "factor-analysis", "--guide", "exact", "--epochs", "1"]) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == [
        "factor-analysis-digits-1",
        "factor-analysis-digits-2",
    ]
    assert "pvae evaluate runs/factor-analysis-digits-2" in capsys.readouterr().out


def test_config_file_gives_options_and_the_command_line_wins() -> None:
    Path("run.yaml").write_text(
        "model: vae\n"
        "epochs: 3e0\n"
        "lr: 1e-3\n"
        "seed: 5\n"
        "model_options: {z_dim: 3, hidden: [8]}\n"
        "guide_options: {hidden: [8]}\n"
        "objective: iwae\n"
        "objective_options: {num_particles: 1e1}\n"
        "run_dir: from_file\n"
    )
    argv = ["train", "--config", "run.yaml", "--epochs", "1", "--model.z_dim", "4e0"]
    assert main(argv) == 0
    config = config_of("from_file")
    assert (config["epochs"], config["lr"], config["seed"]) == (1, 1e-3, 5)
    assert config["model_options"]["z_dim"] == 4
    assert config["model_options"]["hidden"] == [8]
    assert config["objective_options"]["num_particles"] == 10


def test_config_of_a_run_repeats_it(trained: Path) -> None:
    assert main(["train", "--config", str(trained / "config.yaml"), "--run-dir", "again"]) == 0
    first, second = (pvae.load(folder).history for folder in (trained, "again"))
    assert [row["bound"] for row in first] == [row["bound"] for row in second]
    assert config_of("again") == config_of(trained)


def test_another_seed_is_another_run(trained: Path) -> None:
    assert main(["train", "vae", *QUICK, "--seed", "1", "--run-dir", "other"]) == 0
    first, second = pvae.load(trained), pvae.load("other")
    assert first.history[0]["bound"] != second.history[0]["bound"]
    facts = [config_of(folder)["data_facts"] for folder in (trained, "other")]
    assert facts[0] == facts[1]


@pytest.mark.parametrize(
    ("treatment", "likelihood"),
    [
        (["--binarize", "fixed"], "bernoulli"),
        (["--transform", "none"], "discretized_logistic"),
        (["--transform", "standardize"], "gaussian"),
    ],
)
def test_likelihood_fits_the_data(
    treatment: list[str], likelihood: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "vae", *TINY, "--epochs", "1", *treatment, "--run-dir", "r"]) == 0
    assert config_of("r")["model_options"]["likelihood"] == likelihood
    assert f"likelihood {likelihood}, for" in capsys.readouterr().out
    model = pvae.load("r").model
    assert model.likelihood == likelihood
    assert likelihood != "discretized_logistic" or model.num_levels == 17


def test_likelihood_of_the_user_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model.likelihood", "continuous_bernoulli", "--epochs", "1", "--run-dir", "r"]
    assert main(["train", "vae", *TINY, *argv]) == 0
    assert config_of("r")["model_options"]["likelihood"] == "continuous_bernoulli"
    assert "likelihood" not in capsys.readouterr().out


def test_a_table_of_the_users_own() -> None:
    generator = np.random.default_rng(0)
    np.save("x.npy", generator.normal(size=(60, 3)).astype(np.float32))
    assert main(["train", "vae", *QUICK, "--data", "x.npy", "--run-dir", "r"]) == 0
    assert config_of("r")["data"] == str(Path("x.npy").absolute())
    assert not (Path("r") / "figures" / "latents.png").exists()
    assert main(["evaluate", "r", "--num-particles", "20"]) == 0
    assert main(["sample", "r", "--size", "5", "--out", "s.npy"]) == 0
    assert np.load("s.npy").shape == (5, 3)
    assert not Path("s.png").exists()


def test_warnings_are_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--objective.beta", "Linear(1000)", "--run-dir", "r"]
    assert main(["train", "vae", *QUICK, *argv]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "warning" in line.lower()] == [
        line for line in lines if line.startswith("pvae: warning: the KL weight ends at 0.03")
    ]
    assert config_of("r")["objective_options"]["beta"] == "Linear(1000)"
    assert pvae.load("r").objective.schedule(500) == 0.5


# --- evaluate, sample, compare -------------------------------------------------------------------


def test_evaluate_reports_what_the_library_computes(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["evaluate", str(trained), "--num-particles", "30", "--seed", "3", "--split", "valid"]
    assert main(argv) == 0
    said = capsys.readouterr().out
    run, split = pvae.load(trained), pvae.data.load("digits").valid
    direct = pvae.evidence.importance(run.model, run.guide, split.x, 30, seed=3)
    direct = direct.shifted(split.log_det)
    report = json.loads((trained / "evidence.json").read_text())
    assert report["log_evidence"] == pytest.approx(direct.mean, abs=1e-9)
    assert report["stderr"] == pytest.approx(direct.mean_stderr, abs=1e-9)
    assert report["elbo"] == pytest.approx(float(direct.elbo.mean()), abs=1e-9)
    assert report["bits_per_dim"] == pytest.approx(-direct.mean / (64 * np.log(2)), abs=1e-9)
    assert report["split"] == "valid"
    assert f"{direct.mean:.3f} ± {direct.mean_stderr:.3f} nats" in said
    assert {"evidence.nc", "figures/evidence.png"} <= files(trained)
    assert [path.name for path in trained.glob(".*")] == [".lock"]


def test_evidence_opens_in_arviz(trained: Path) -> None:
    import arviz

    assert main(["evaluate", str(trained), "--num-particles", "10"]) == 0
    data = arviz.from_netcdf(str(trained / "evidence.nc"))
    report = json.loads((trained / "evidence.json").read_text())
    log_evidence = data["marginal_evidence"]["log_evidence"]
    assert float(log_evidence.mean()) == pytest.approx(report["log_evidence"], abs=1e-6)
    assert data["posterior"]["z"].shape == (1, 100, 360, 2)


def test_evaluation_with_the_exact_posterior_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["factor_analysis", "--guide", "exact", "--model.z_dim", "3", "--epochs", "2"]
    assert main(["train", *argv, "--run-dir", "r"]) == 0
    assert main(["evaluate", "r"]) == 0
    report = json.loads(Path("r/evidence.json").read_text())
    assert report["num_particles"] == 2
    assert report["log_evidence"] == pytest.approx(report["exact_log_evidence"], abs=1e-4)
    assert "model.log_evidence" in capsys.readouterr().out


@pytest.mark.parametrize(("particles", "rows"), [(1, 20), (300, 49)])
def test_the_curve_is_no_more_work_than_the_estimate(
    trained: Path, monkeypatch: pytest.MonkeyPatch, particles: int, rows: int
) -> None:
    """Where that leaves at least 20 of the 360 rows."""
    measured, draw, drawn = pvae.evidence.measured_curve, escalation.draw, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        drawn.append(len(args[2]) * args[3])
        return draw(*args, **kwargs)

    asked: list[int] = []
    monkeypatch.setattr(escalation, "draw", counted)
    monkeypatch.setattr(
        pvae.evidence, "measured_curve",
        lambda *pair, seed: asked.append(len(pair[2])) or measured(*pair, seed=seed),
    )  # fmt: skip
    assert main(["evaluate", str(trained), "--num-particles", str(particles)]) == 0
    assert asked == [rows]
    assert sum(drawn) == rows * pvae.evidence.curve_cost()


def test_sample_is_on_the_original_scale(trained: Path) -> None:
    assert main(["sample", str(trained), "--size", "200", "--seed", "1"]) == 0
    draws = np.load(trained / "samples.npy")
    assert draws.shape == (200, 64)
    assert draws.max() > 5  # grey levels go to 16; the model's own scale ends at 1
    assert (trained / "samples.png").is_file()
    assert main(["sample", str(trained), "--size", "200", "--seed", "1", "--out", "b.npy"]) == 0
    assert np.array_equal(draws, np.load("b.npy"))
    assert main(["sample", str(trained), "--size", "9", "--out", "only.png"]) == 0
    assert files(".") == {"b.npy", "b.png", "only.png"}


def test_compare_runs(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["factor_analysis", "--guide", "exact", "--model.z_dim", "3", "--epochs", "2"]
    assert main(["train", *argv, "--run-dir", "fa"]) == 0
    argv = ["fa", str(trained), "--num-particles", "20", "--run-dir", "board"]
    assert main(["compare", *argv]) == 0
    with Path("board/board.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"fa", trained.name}
    assert rows["fa"]["kind"] == "exact"
    assert rows[trained.name]["kind"] == "estimate"
    run, split = pvae.load(trained), pvae.data.load("digits").test
    direct = pvae.evidence.importance(run.model, run.guide, split.x, 20).shifted(split.log_det)
    assert float(rows[trained.name]["mean"]) == pytest.approx(direct.mean, abs=1e-9)
    assert trained.name in capsys.readouterr().out


@pytest.mark.parametrize(
    ("treatment", "expected"),
    [
        (
            [],
            {
                "Gaussian mixture, diagonal",
                "Gaussian mixture, full",
                "factor analysis",
                "PPCA",
                "kernel density",
                "Student t mixture, diagonal",
                "mixture of factor analysers",
                "VAE, ELBO",
                "VAE, IWAE-5 DReG",
            },
        ),
        (
            ["--binarize", "fixed"],
            {"Bernoulli mixture", "VAE, ELBO", "VAE, IWAE-5", "VAE, IWAE-5 DReG"},
        ),
    ],
)
def test_compare_default_roster(treatment: list[str], expected: set[str]) -> None:
    argv = ["--epochs", "1", "--num-particles", "5", "--run-dir", "board"]
    assert main(["compare", "--data", "digits", *treatment, *argv]) == 0
    board = json.loads(Path("board/board.json").read_text())
    assert {row["name"] for row in board["rows"]} == expected
    assert {"board.csv", "evidence.nc", "vae-elbo/config.yaml"} <= files("board")
    pictures = {path.name for path in Path("board/figures").glob("*.png")}
    assert pictures >= {
        "training_curves.png",
        "samples.png",
        "reconstructions.png",
        "latents.png",
        "evidence.png",
        "board.png",
        "selection.png",
    }
    assert main(["evaluate", "board/vae-elbo", "--num-particles", "5"]) == 0


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "pvae: interrupted"),
        (
            OSError(28, "No space left on device", "x"),
            74,
            "pvae: error: x: No space left on device",
        ),
        (
            RuntimeError("a bug"),
            70,
            "pvae: error: RuntimeError: a bug (--debug shows the traceback)",
        ),
    ],
)
def test_failure_in_training_leaves_nothing(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **options: Any) -> Any:
        (options["run_dir"] / "metrics.jsonl").write_text("half")
        raise error

    monkeypatch.setattr("pvae.training.fit", fail)
    assert main(["train", "vae"]) == code
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert list(Path().iterdir()) == []


def test_termination_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("pvae.training.fit", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["train", "vae"]) == 143
    assert list(Path().iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_failure_in_evaluation_leaves_the_run_as_it_was(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    content = {name: (trained / name).read_bytes() for name in files(trained)}
    monkeypatch.setattr("pvae.arviz.to_netcdf", fail)
    assert main(["evaluate", str(trained), "--num-particles", "7"]) == 74
    assert {name: (trained / name).read_bytes() for name in files(trained)} == content


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "train", "vea"]) == 2
    errors = capsys.readouterr().err
    assert "Traceback" in errors
    assert errors.splitlines()[-1].startswith("pvae: error: no model is called 'vea'")


# --- the catalogue -------------------------------------------------------------------------------


def test_listing_agrees_with_what_can_be_imported() -> None:
    for role in ("model", "guide"):
        for name, line in catalogue.listing(role).items():
            program = catalogue.find(role, name)
            assert program.is_class
            assert (program.factory.__doc__ or "").startswith(line)
            assert catalogue.find(role, name.replace("_", "-")) == program


def test_import_path_finds_the_same_class() -> None:
    found = catalogue.find("model", "pvae.models.vae:VAE")
    assert found.factory is VAE
    assert found.reference == "pvae.models.vae:VAE"


def test_objectives_may_be_written_as_in_python() -> None:
    built = catalogue.build_objective("vae", {"bound": "renyi(0.5)", "num_particles": 3})
    assert built == pvae.Objective(bound=pvae.bounds.renyi(0.5), num_particles=3)
    built = catalogue.build_objective("vae", {"gradient": "score_function", "num_particles": 2})
    assert built.gradient is pvae.gradients.score_function
    assert catalogue.build_objective("beta-vae", {"beta": "2.5"}).beta == 2.5
    with pytest.raises(ObjectiveError, match="upper bound"):
        catalogue.build_objective("vae", {"bound": "cubo(2)"})
    with pytest.raises(OptionError, match="beta takes a number or a schedule, got '1.2.3'"):
        catalogue.build_objective("vae", {"beta": "1.2.3"})


def test_options_have_the_types_of_the_signature() -> None:
    class Example:
        """An example.

        Args:
            rate: A rate.
        """

        def __init__(
            self,
            x_dim: int,
            rate: float,
            *,
            sizes: list[int] | None = None,
            flag: bool = False,
            odd: Any = object,
        ) -> None: ...

    options = catalogue.Options(Example, "model", hidden=["x_dim"])
    assert options.required == ["rate"]
    values = options.read({"rate": "1e-3", "sizes": "[1, 2]", "flag": "true"})
    assert values == {"rate": 1e-3, "sizes": [1, 2], "flag": True}
    assert options.read({"sizes": "null", "rate": 2}) == {"sizes": None, "rate": 2.0}
    assert options.describe()[0] == ("--model.rate", "A rate. (float, required)")
    with pytest.raises(OptionError, match="Example needs --model.rate"):
        options.missing({})
    with pytest.raises(OptionError, match="--model.flag takes a value of type bool, got 'perhaps'"):
        options.read({"flag": "perhaps"})


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    assert main(["train", "vae", *TINY, "--epochs", "1", "--run-dir", "r"]) == 0
    assert torch.get_num_threads() == before


def test_defaults_are_options_of_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    page = capsys.readouterr().out
    for key in runs.DEFAULTS:
        if key != "model" and not key.endswith("_options"):
            assert f"--{key.replace('_', '-')} " in page


def test_features_that_never_vary_are_pointed_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = "\n".join(f"{0.37 * i % 1:.2f},{0.61 * i % 1:.2f},7.5" for i in range(60))
    (tmp_path / "x.csv").write_text(rows)
    main(["train", "vae", "--data", "x.csv", "--epochs", "1"])
    error = capsys.readouterr().err
    assert "1 of 3 features never vary" in error
    assert "number 2" in error


def test_other_data_are_prepared_as_the_training_data_were(tmp_path, capsys, monkeypatch):
    """Standardised by their own moments, data that are shifted would seem just as likely."""
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).normal(size=(120, 4))
    np.save("x.npy", x)
    np.save("shifted.npy", x + 4)
    train = ["train", "factor_analysis", "--data", "x.npy", "--epochs", "2", "--engine", "eager"]
    assert main([*train, "--run-dir", "run"]) == 0
    found = {}
    for name in ("x.npy", "shifted.npy"):
        assert main(["evaluate", "run", "--data", name, "--num-particles", "20"]) == 0
        found[name] = json.loads(Path("run/evidence.json").read_text())["log_evidence"]
    assert found["shifted.npy"] < found["x.npy"] - 10


REGRESSION = """
import pyro
import pyro.distributions as dist
import torch
from torch import nn


class Regression(nn.Module):
    def __init__(self, x_dim: int):
        super().__init__()
        self.net = nn.Linear(x_dim, 1)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            mean = self.net(torch.cat([x[:, :-1], x[:, :1]], -1))[..., 0] + z
            pyro.sample("y", dist.Normal(mean, 1.0), obs=x[:, -1])
"""


@pytest.mark.parametrize(("transform", "warned"), [("standardize", True), ("none", False)])
def test_a_scale_that_counts_more_than_is_scored_is_pointed_out(transform, warned, capsys):
    Path("regression.py").write_text(REGRESSION)
    rows = 3 * np.random.default_rng(0).normal(size=(60, 3))
    np.savetxt("rows.csv", rows, delimiter=",")
    options = ["--epochs", "1", "--engine", "eager", "--transform", transform, "--run-dir", "r"]
    assert main(["train", "./regression.py", "--data", "rows.csv", *options]) == 0
    said = "the model scores 1 of the 3 numbers of a datum"
    assert (said in capsys.readouterr().err) == warned
    assert main(["evaluate", "r", "--num-particles", "5"]) == 0
    assert (said in capsys.readouterr().err) == warned
    assert main(["sample", "r"]) == 2
    assert "inputs you want" in capsys.readouterr().err


def test_a_mixture_trains_without_a_word_on_its_guide() -> None:
    assert main(["train", "gaussian-mixture", "--epochs", "1", "--run-dir", "mixture"]) == 0
    run = pvae.load("mixture")
    x = pvae.data.load("digits").test.x[:5]
    weights = pvae.draw(run.model, run.guide, x, num_particles=3).log_weights
    exact = run.model.log_evidence(x).expand(3, 5)
    torch.testing.assert_close(weights, exact, rtol=1e-4, atol=1e-3)
