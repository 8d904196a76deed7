from __future__ import annotations

import csv
import io
import json
import math
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import pvae
from pvae.comparison import compare
from pvae.data import Dataset, Split
from pvae.errors import DataError, NonFiniteError, OptionError, ProgramError, PvaeError
from pvae.guides.exact import Exact
from pvae.guides.gaussian import Gaussian
from pvae.models.factor_analysis import FactorAnalysis


class Normal:
    """A baseline: independent normals with a common mean and scale."""

    kind, name, num_parameters = "exact", "normal", 2

    def __init__(self, loc=0.0, scale=1.0):
        self.loc, self.scale = loc, scale

    def score_samples(self, x):
        return torch.distributions.Normal(self.loc, self.scale).log_prob(x.double()).sum(-1)


class Given:
    """A baseline whose densities are given."""

    def __init__(self, *values):
        self.values = values

    def score_samples(self, x):
        return torch.tensor(self.values, dtype=torch.float64)


def factor_analysis(x_dim=4, dtype=torch.float64):
    torch.manual_seed(0)
    return FactorAnalysis(x_dim, z_dim=2).to(dtype)


def rows(num_data=30, x_dim=4):
    return torch.randn(num_data, x_dim, generator=torch.Generator().manual_seed(1)).double()


def hidden(model):
    """The same program without its known evidence."""
    return lambda x: model(x)


def test_an_estimate_with_the_exact_posterior_equals_the_exact_row():
    model, x = factor_analysis(), rows()
    board = compare({"exact": model, "drawn": (hidden(model), Exact(model))}, x, num_particles=50)
    assert board["exact"].kind == "exact"
    assert board["drawn"].kind == "estimate"
    assert board["drawn"].mean == pytest.approx(board["exact"].mean, abs=1e-9)
    assert board["drawn"].elbo == pytest.approx(board["exact"].mean, abs=1e-9)
    assert board["drawn"].unreliable == 0
    assert board["exact"].elbo is None
    assert board["exact"].unreliable is None


def test_row_is_made_of_per_datum_values():
    model, x = factor_analysis(), rows()
    board = compare({"model": model, "normal": Normal()}, x)
    log_p = {"model": model.log_evidence(x).detach(), "normal": Normal().score_samples(x)}
    best, worst = sorted(log_p, key=lambda name: -log_p[name].mean())
    assert [row.name for row in board] == [best, worst]
    for name, values in log_p.items():
        assert torch.equal(board.evidence[name].log_evidence, values)
        assert board[name].mean == pytest.approx(float(values.mean()), rel=1e-12)
        assert board[name].stderr == pytest.approx(float(values.std()) / math.sqrt(30), rel=1e-12)
        assert board[name].bits_per_dim == pytest.approx(-board[name].mean / (4 * math.log(2)))
    difference = log_p[worst] - log_p[best]
    assert board[worst].difference == pytest.approx(float(difference.mean()), rel=1e-12)
    expected = float(difference.std()) / math.sqrt(30)
    assert board[worst].difference_stderr == pytest.approx(expected, rel=1e-12)
    assert (board[best].difference, board[best].difference_stderr) == (0, 0)


def test_paired_error_is_not_that_of_independent_means():
    board = compare({"a": Given(-1.0, -50.0, -9.0), "b": Given(-2.0, -51.0, -10.0)}, rows(3))
    assert board["b"].difference == -1
    assert board["b"].difference_stderr == 0
    assert board["b"].stderr > 10


def test_log_det_of_a_split_brings_densities_to_the_original_scale():
    x = rows()
    split = Split(x, torch.arange(30, dtype=torch.float64))
    plain, shifted = compare({"n": Normal()}, x), compare({"n": Normal()}, split)
    by_hand = compare({"n": Normal()}, x, log_det=split.log_det)
    assert shifted["n"].mean == pytest.approx(plain["n"].mean + 14.5)
    assert by_hand["n"].mean == shifted["n"].mean
    expected = Normal().score_samples(x) + split.log_det
    assert torch.allclose(shifted.evidence["n"].log_evidence, expected, atol=1e-12)
    assert "original scale" in shifted.data
    assert "original scale" not in plain.data


def test_of_a_data_set_the_test_split_is_scored():
    splits = {
        k: Split(rows(n), torch.zeros(n)) for k, n in (("train", 9), ("valid", 8), ("test", 7))
    }
    fields = dict.fromkeys(Dataset.__dataclass_fields__)
    board = compare({"n": Normal()}, Dataset(**(fields | splits)))
    assert board.num_data == 7


def test_a_run_brings_its_time_and_size():
    model, x = factor_analysis(), rows()
    guide = Gaussian(4, model.latents, hidden=(8,)).double()
    run = pvae.Run(hidden(model), guide, pvae.vae(), num_parameters=123, seconds=4.5)
    board = compare(
        {"run": run, "pair": (hidden(model), guide), "model": model, "n": Normal()},
        x,
        num_particles=8,
        fit_seconds={"n": 0.25},
    )
    assert (board["run"].num_parameters, board["run"].fit_seconds) == (123, 4.5)
    assert board["pair"].num_parameters == sum(p.numel() for p in guide.parameters())
    assert board["model"].num_parameters == sum(p.numel() for p in model.parameters())
    assert (board["n"].num_parameters, board["n"].fit_seconds) == (2, 0.25)
    assert board["pair"].fit_seconds is None
    assert all(row.score_seconds >= 0 for row in board)


def test_estimates_stay_below_the_truth_and_seeds_decide_alone():
    model, x = factor_analysis(), rows()
    guide = Gaussian(4, model.latents, hidden=(8,)).double()
    entries = {"exact": model, "drawn": (hidden(model), guide)}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = compare(entries, x, num_particles=64, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    again = compare(entries, x, num_particles=64, seed=3)
    other = compare(entries, x, num_particles=64, seed=4)
    assert first["drawn"].mean == again["drawn"].mean != other["drawn"].mean
    difference = first.evidence["drawn"].log_evidence - first.evidence["exact"].log_evidence
    assert float(difference.mean()) < 4.5 * float(difference.std()) / math.sqrt(len(x))
    assert first["drawn"].elbo < first["drawn"].mean


def test_training_mode_is_given_back():
    model = factor_analysis().train()
    compare({"m": model}, rows())
    assert model.training


def test_progress_names_the_entry():
    model, seen = factor_analysis(), []
    compare({"m": model, "n": Normal()}, rows(), progress=lambda *a: seen.append(a))
    assert seen == [("m", 30, 30), ("n", 30, 30)]


def test_saved_files_are_strict_and_complete(tmp_path):
    board = compare({"a": Given(-1.0, -3.0), "zero": Given(-1.0, -math.inf)}, rows(2))
    board.save(tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["board.csv", "board.json"]

    def refuse(word):
        raise AssertionError(word)

    content = json.loads((tmp_path / "new" / "board.json").read_text(), parse_constant=refuse)
    assert (content["num_data"], content["x_dim"]) == (2, 4)
    assert content["rows"][0]["mean"] == -2
    assert content["rows"][1]["mean"] is None
    lines = list(csv.DictReader(io.StringIO((tmp_path / "new" / "board.csv").read_text())))
    assert [line["name"] for line in lines] == ["a", "zero"]
    assert lines[1]["mean"] == "-inf"
    assert lines[0]["elbo"] == ""


def test_text_forms_show_every_row():
    names = ["a|b", "[red]c[/red]", "a rather long name of a model"]
    entries = {name: Given(-100.0 - k, -103.0 - k) for k, name in enumerate(names)}
    board = compare(entries, rows(2))
    console = Console(width=80, file=io.StringIO())
    console.print(board.table())
    table = console.file.getvalue()
    assert "[red]c" in table
    assert all(word in table for word in ("-101.50", "±", "1.50", "score", "best"))
    assert "…" not in table
    assert repr(board) == str(board)
    assert all(name in str(board) for name in names)
    assert "a\\|b" in board.markdown()
    columns = [line.replace("\\|", "").count("|") for line in board.markdown().splitlines()[:5]]
    assert set(columns) == {11}


def test_unknown_row_is_answered_with_the_nearest():
    with pytest.raises(OptionError, match="did you mean 'normal'"):
        compare({"normal": Normal()}, rows())["norml"]


def wrong():
    x, model = rows(), factor_analysis()
    guide = Gaussian(4, model.latents, hidden=(8,)).double()
    wide = Gaussian(9, model.latents, hidden=(8,)).double()
    failing = SimpleNamespace(score_samples=lambda x: torch.zeros(2, 3) @ x)
    return {
        "no entries": ({}, x, {}, OptionError, "at least one entry"),
        "one row": ({"n": Normal()}, x[:1], {}, DataError, "at least 2 test data, got 1"),
        "tuple": ({"n": Normal()}, (x, x), {}, DataError, "one tensor"),
        "nan": ({"n": Normal()}, x * math.nan, {}, DataError, "row 0"),
        "dtype": ({"m": model}, x.float(), {}, DataError, "'m'.*float64 parameters.*float32"),
        "width": ({"m": (hidden(model), wide)}, x, {}, PvaeError, "entry 'm': .*"),
        "model width": ({"m": factor_analysis(3)}, x, {}, DataError, "takes 3 features.*have 4"),
        "sites": (
            {"m": (lambda x: None, guide)}, x, {}, ProgramError, "entry 'm': .*no latent site"
        ),
        "object": ({"m": 3}, x, {}, OptionError, "entry 'm': expected a Run.*got int"),
        "class": ({"m": Normal}, x, {}, OptionError, "got the class Normal"),
        "particles": ({"m": (hidden(model), guide)}, x, {"num_particles": 0}, OptionError, "'m'"),
        "log_det": ({"n": Normal()}, x, {"log_det": torch.zeros(3)}, DataError, r"shape \(3,\)"),
        "two log_det": (
            {"n": Normal()}, Split(x, torch.zeros(30)), {"log_det": torch.zeros(30)},
            OptionError, "own log_det",
        ),
        "fit_seconds": ({"n": Normal()}, x, {"fit_seconds": {"m": 1.0}}, OptionError, "no entry"),
        "shape": ({"n": Given(0.0, 1.0)}, x, {}, DataError, "entry 'n': score_samples.*30"),
        "nan score": ({"n": Given(0.0, math.nan)}, x[:2], {}, NonFiniteError, "row 1 is nan"),
        "fails": ({"n": failing}, x, {}, ProgramError, "entry 'n' cannot score.*other data"),
    }  # fmt: skip


@pytest.mark.parametrize("case", wrong())
def test_wrong_arguments_are_told_in_one_sentence(case):
    entries, test, options, kind, message = wrong()[case]
    with pytest.raises(kind, match=message) as caught:
        compare(entries, test, **options)
    assert "\n" not in str(caught.value)
