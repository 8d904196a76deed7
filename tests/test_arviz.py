from __future__ import annotations

import math

import arviz
import numpy as np
import pytest
import torch

from pvae.arviz import posterior_draws, to_inference_data, to_netcdf
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
