"""``pvae diagnose`` and ``pvae evaluate --method``: what they write, say and refuse."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from pvae import plots
from pvae.cli import main
from pvae.evidence import (
    Calibration,
    Dimension,
    Gaps,
    Information,
    PredictiveChecks,
)

TINY = ["--model.hidden", "[8]", "--guide.hidden", "[8]", "--model.z_dim", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnose") / "run"
    words = ["train", "vae", *TINY, "--epochs", "2", "--engine", "eager"]
    assert main([*words, "--run-dir", str(folder)]) == 0
    return folder


def test_diagnose_writes_tables_and_pictures(trained, capsys):
    words = ["--num-data", "30", "--num-particles", "50", "--num-runs", "200"]
    assert main(["diagnose", str(trained), *words]) == 0
    said = capsys.readouterr().out
    for expected in ("approximation", "of 2 dimensions are active", "simulated data", "predictive"):
        assert expected in said
    content = json.loads((trained / "diagnosis.json").read_text())
    assert content["skipped"] == {}
    rows = {row["part"]: row["nats"] for row in content["gaps"]["rows"]}
    parts = rows["approximation"] + rows["amortisation"] + rows["estimation"]
    assert parts == pytest.approx(rows["gap"])
    assert rows["gap"] == pytest.approx(rows["log p(x)"] - rows["ELBO"])
    with (trained / "latents.csv").open() as file:
        assert [row["site"] for row in csv.DictReader(file)] == ["z", "z"]
    pictures = {"gaps", "latent_information", "rank_histograms", "coverage", "predictive_checks"}
    assert pictures <= {path.stem for path in (trained / "figures").iterdir()}
    left = [path.name for path in trained.iterdir() if path.name.startswith(".")]
    assert set(left) <= {".lock"}


def test_evaluate_auto_says_who_spoke(trained, capsys):
    words = ["--method", "auto", "--budget", "200", "--num-particles", "200"]
    assert main(["evaluate", str(trained), *words]) == 0
    said = capsys.readouterr().out
    assert "estimator" in said
    assert "importance" in said
    about = json.loads((trained / "evidence.json").read_text())
    assert about["method"] == "auto"
    assert about["curve"]["k"] == [1, 4, 16, 64, 256]
    assert about["curve"]["bound"] == sorted(about["curve"]["bound"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "RUN", "--tolerance", "0.1"], "--tolerance is for --method auto"),
        (["evaluate", "RUN", "--budget", "9"], "--budget is for --method auto"),
        (["evaluate", "RUN", "--num-temperatures", "9"], "--num-temperatures is for --method"),
        (["evaluate", "RUN", "--method", "magic"], "--method cannot be 'magic'"),
        (
            ["evaluate", "RUN", "--method", "auto", "--tolerance", "-1"],
            "--tolerance must be positive",
        ),
        (["evaluate", "RUN", "--method", "auto", "--budget", "3"], "does not pay for importance"),
        (["diagnose", "RUN", "--num-runs", "0"], "--num-runs must be at least 2, got 0"),
        (["diagnose", "nowhere"], "there is no run folder nowhere"),
    ],
)
def test_wrong_words_get_one_sentence(trained, words, message, capsys):
    assert main([str(trained) if word == "RUN" else word for word in words]) != 0
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("pvae: error:")
    assert message in said


def a_ledger(size=40):
    torch.manual_seed(0)
    family, encoder = torch.rand(size).double(), 2 * torch.rand(size).double()
    zero = torch.zeros(size).double()
    noise = dict.fromkeys(
        ("log p(x)", "ELBO", "gap", "approximation", "amortisation", "estimation"), zero + 0.01
    )
    return Gaps(-zero, -family - encoder, -family, family, encoder, zero, noise, "exact", zero,
                (), 100, True, 50)  # fmt: skip


def test_picture_of_the_ledger():
    figure = plots.gap_ledger(a_ledger())
    assert "log p(x) − ELBO" in figure.axes[0].get_title()
    assert "40 data" in figure.axes[1].get_title()


def test_picture_of_the_latents():
    rows = tuple(
        Dimension("z", k, 1.0 / (k + 1), 0.1, None if k == 2 else 0.8 / (k + 1), 0.1, 0.1, 0.1,
                  0.5, k != 3, k == 3)
        for k in range(4)
    )  # fmt: skip
    figure = plots.latent_information(Information(rows, 2.0, 0.1, 1.8, 0.2, 0.1, 100))
    assert "3 of 4 active" in figure.axes[0].get_title()
    assert "collapsed" in [t.get_text() for t in figure.axes[0].get_legend().get_texts()]


def test_pictures_of_calibration_and_checks():
    torch.manual_seed(0)
    names = (*(f"z[{k}]" for k in range(20)), "log joint", "log q", "distance to a random point")
    found = Calibration(names, torch.randint(0, 100, (500, len(names))), 99)
    shown = [a.get_title() for a in plots.rank_histograms(found).axes if a.get_title()]
    assert len(shown) == 16
    assert shown[-3:] == list(names[-3:])
    assert plots.coverage_curves(found).axes[0].get_xlim() == (0, 100)
    checks = PredictiveChecks({"mean": 0.3}, {"mean": torch.randn(99).double()}, 10, True)
    assert "p = " in plots.predictive_histograms(checks).axes[0].get_title()
