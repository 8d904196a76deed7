from __future__ import annotations

import math
import subprocess
import sys
import warnings

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pvae.arviz import posterior_draws, stream_netcdf, to_inference_data, to_netcdf
from pvae.errors import DataError, OptionError
from pvae.evidence import Evidence
from pvae.guides.exact import Exact
from pvae.models.factor_analysis import FactorAnalysis


def evidence(num_data=5):
    values = torch.arange(num_data, dtype=torch.float64)
    return Evidence(-values, values / 10, values + 1, values / 5, -values - 1, 64)


def test_file_round_trip(tmp_path):
    z, x = torch.randn(7, 5, 2, 3), torch.randn(5, 4).double()
    labels = torch.tensor([3, 1, 4, 1, 5])
    path = to_netcdf(
        tmp_path / "new" / "evidence.nc",
        posterior={"z": z, "s": z[..., 0, 0]},
        evidence=evidence(),
        observed=x,
        labels=labels,
        attrs={"run": "first"},
    )
    assert [p.name for p in path.parent.iterdir()] == ["evidence.nc"]
    data = arviz.from_netcdf(str(path))
    posterior = data["posterior"]
    assert posterior["z"].dims == ("chain", "draw", "datum", "z_dim_0", "z_dim_1")
    assert posterior["s"].dims == ("chain", "draw", "datum")
    assert np.array_equal(posterior["z"].values[0], z.numpy())
    assert np.array_equal(data["observed_data"]["x"].values, x.numpy())
    assert np.array_equal(data["observed_data"]["label"].values, labels.numpy())
    group = data["marginal_evidence"]
    for name in ("log_evidence", "stderr", "ess", "pareto_k", "elbo"):
        assert np.array_equal(group[name].values, getattr(evidence(), name).numpy())
    wanted = {"method": "importance", "num_particles": 64, "kind": "estimate", "units": "nats"}
    assert {key: group.attrs[key] for key in wanted} == wanted
    assert group.attrs["run"] == "first"


def test_exact_evidence_keeps_its_infinite_k(tmp_path):
    path = to_netcdf(tmp_path / "e.nc", evidence=Evidence.exact(torch.zeros(3)))
    khat = arviz.from_netcdf(str(path))["marginal_evidence"]["pareto_k"].values
    assert (khat == -math.inf).all()


def test_evidence_of_several_entries_is_stacked(tmp_path):
    entries = {"vae": evidence(), "gmm": Evidence.exact(torch.ones(5))}
    path = to_netcdf(tmp_path / "e.nc", evidence=entries)
    group = arviz.from_netcdf(str(path))["marginal_evidence"]
    assert group["log_evidence"].dims == ("entry", "datum")
    assert list(group["kind"].sel(entry=["gmm", "vae"]).values) == ["exact", "estimate"]
    assert (group["log_evidence"].sel(entry="gmm").values == 1).all()


def test_posterior_of_the_first_data_only():
    data = to_inference_data(
        posterior={"z": torch.zeros(2, 9, 1)}, observed=torch.zeros(9, 1), max_data=4
    )
    assert data["posterior"].sizes["datum"] == 4
    assert data["observed_data"].sizes["datum"] == 9


def test_arviz_without_inference_data_gives_a_tree(monkeypatch):
    import xarray

    monkeypatch.delattr(arviz, "InferenceData", raising=False)
    tree = to_inference_data(evidence=evidence(), observed=torch.zeros(5, 2))
    assert isinstance(tree, xarray.DataTree)
    assert sorted(tree.children) == ["marginal_evidence", "observed_data"]
    assert tree["marginal_evidence"].attrs["units"] == "nats"


def test_tree_is_written_and_read_too(monkeypatch, tmp_path):
    import xarray

    monkeypatch.delattr(arviz, "InferenceData", raising=False)
    path = to_netcdf(tmp_path / "e.nc", evidence=evidence())
    with xarray.open_datatree(path, engine="h5netcdf") as tree:
        assert tree["marginal_evidence"]["ess"].values.tolist() == [1, 2, 3, 4, 5]


def test_failed_write_leaves_the_old_file(tmp_path):
    path = to_netcdf(tmp_path / "e.nc", evidence=evidence())
    before = path.read_bytes()
    with pytest.raises(DataError):
        to_netcdf(path, evidence=evidence(), observed=torch.zeros(5, 2), labels=torch.zeros(3))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["e.nc"]


def test_draws_follow_the_guide():
    torch.manual_seed(0)
    model = FactorAnalysis(3, z_dim=2).double()
    x = torch.randn(6, 3).double()
    draws = posterior_draws(model, Exact(model), x, 2000, max_data=4, seed=1)["z"]
    assert draws.shape == (2000, 4, 2)
    assert draws.dtype == torch.float64
    expected = model.posterior(x[:4])["z"].mean.detach()
    error = (draws.mean(0) - expected).abs() / (draws.std(0) / math.sqrt(2000))
    assert float(error.max()) < 4.5
    again = posterior_draws(model, Exact(model), x, 2000, max_data=4, seed=1)["z"]
    assert torch.equal(draws, again)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to keep"),
        ({"posterior": {"z": torch.zeros(3)}}, r"\(draw, datum, ...\), got shape \(3,\)"),
        (
            {"posterior": {"z": torch.zeros(2, 3), "y": torch.zeros(2, 4)}},
            "disagree about the data",
        ),
        ({"observed": torch.zeros(3, 1), "labels": torch.zeros(2)}, "disagree about the data"),
        ({"evidence": {"a": evidence(3), "b": evidence(4)}}, "same data"),
        ({"evidence": {}}, "same data"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(DataError, match=message):
        to_inference_data(**options)


def test_no_draws_are_refused():
    model = FactorAnalysis(3, z_dim=2)
    with pytest.raises(OptionError, match="at least 1, got 0"):
        posterior_draws(model, Exact(model), torch.zeros(2, 3), 0)


# --- streaming, and what ArviZ says of it --------------------------------------------------------


def streamed(tmp_path, num_data=30, **options):
    torch.manual_seed(0)
    model = FactorAnalysis(4, z_dim=2).double().requires_grad_(False)
    x = model(size=num_data)
    path = stream_netcdf(tmp_path / "all.nc", model, Exact(model), x, num_draws=200, **options)
    return model, x, arviz.from_netcdf(str(path))


def test_streamed_groups_hold_the_draws_and_what_they_weigh(tmp_path):
    found = importance_like(30)
    labels = torch.arange(30) % 3
    model, x, data = streamed(tmp_path, predictive=True, evidence=found, labels=labels,
                              attrs={"run": "first"})  # fmt: skip
    posterior = data["posterior"]
    assert posterior["z"].dims == ("chain", "draw", "datum", "z_dim_0")
    assert posterior["z"].shape == (1, 200, 30, 2)
    assert data["posterior_predictive"]["x"].shape == (1, 200, 30, 4)
    z = torch.tensor(posterior["z"].values[0])
    expected = model.decode(z).log_prob(x)
    assert np.allclose(data["log_likelihood"]["x"].values[0], expected.numpy())
    assert np.array_equal(data["observed_data"]["x"].values, x.numpy())
    assert np.array_equal(posterior["label"].values, labels.numpy())
    assert posterior.attrs["run"] == "first"
    group = data["marginal_evidence"]
    assert list(group["estimator"].values) == list(found.methods)
    assert np.array_equal(group["pareto_k"].values, found.pareto_k.numpy())
    assert [p.name for p in tmp_path.iterdir()] == ["all.nc"]


def importance_like(num_data):
    methods = tuple("psis" if k % 2 else "importance" for k in range(num_data))
    values = torch.arange(num_data, dtype=torch.float64)
    return Evidence(-values, values, values, values, values, 9, method="auto", methods=methods)


def test_blocks_do_not_show(tmp_path, monkeypatch):
    monkeypatch.setattr("pvae.arviz._BLOCK", 900)
    model, x, data = streamed(tmp_path)
    mean = torch.tensor(data["posterior"]["z"].values[0]).mean(0)
    posterior = model.posterior(x)["z"]
    z = (mean - posterior.mean) / (posterior.stddev / math.sqrt(200))
    assert float(z.abs().max()) < 4.5


def test_what_the_model_makes_of_a_block_is_no_larger_than_the_block(tmp_path, monkeypatch):
    monkeypatch.setattr("pvae.arviz._BLOCK", 2**14)
    made = []

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            loc = z[..., None].expand(*z.shape, 50)
            made.append(loc.numel())
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(1), 1.0))

    stream_netcdf(tmp_path / "x.nc", model, guide, torch.zeros(200, 50), num_draws=10)
    assert 2**13 < max(made) <= 2**14


def test_summary_is_of_the_posterior(tmp_path):
    model, x, data = streamed(tmp_path, 3)
    table = arviz.summary(data["posterior"], kind="stats")
    truth = model.posterior(x)["z"].mean.flatten().numpy()
    assert np.abs(table["mean"].to_numpy() - truth).max() < 4.5 / math.sqrt(200) + 0.001


def test_conditional_loo_answers_another_question(tmp_path):
    """It leaves out x_n of its own latent, not of the model: far from the sum of log p(x_n)."""
    model, x, data = streamed(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loo = arviz.loo(data)
    evidence = float(model.log_evidence(x).sum())
    assert loo.n_data_points == 30
    assert abs(float(loo.elpd_loo) - evidence) > 3


def test_a_failed_stream_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match="labels are of 7 data|disagree about the data"):
        streamed(tmp_path, labels=torch.zeros(7))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OptionError, match="at least 1, got 0"):
        stream_netcdf(tmp_path / "x.nc", None, None, torch.zeros(2, 3), num_draws=0)


def test_twenty_thousand_data_never_stand_in_memory(tmp_path):
    code = (
        "import resource, sys, torch\n"
        "from pvae.arviz import stream_netcdf\n"
        "from pvae.guides.exact import Exact\n"
        "from pvae.models.factor_analysis import FactorAnalysis\n"
        "torch.manual_seed(0)\n"
        "model = FactorAnalysis(8, z_dim=16).requires_grad_(False)\n"
        "x = model(size=20_000)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "stream_netcdf(sys.argv[1], model, Exact(model), x[:200])\n"
        "before = peak()\n"
        "stream_netcdf(sys.argv[1], model, Exact(model), x)\n"
        "print(peak() - before)"
    )
    path = tmp_path / "big.nc"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True,
                          check=True)  # fmt: skip
    assert path.stat().st_size > 128e6
    assert float(done.stdout) < 60
