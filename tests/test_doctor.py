"""The doctor: each planted fault is named, and healthy trainings raise no finding over 20 seeds."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pvae
from pvae.doctor import Doctor, examine_data, examine_history, examine_pair, report, rising_k
from pvae.errors import NonFiniteError
from pvae.guides.flow import Flow
from pvae.guides.gaussian import Gaussian
from pvae.models.vae import VAE


def rows(size=240, seed=0):
    """Data with two directions in eight features."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(size, 2, generator=generator)
    weight = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    return torch.tanh(z @ weight) + 0.1 * torch.randn(size, 8, generator=generator)


X, HELD_OUT = rows(), rows(size=120, seed=9)


def pair(seed=0, activation="silu"):
    torch.manual_seed(seed)
    options = {"hidden": (16,), "activation": activation}
    model = VAE(8, z_dim=2, likelihood="gaussian", **options)
    return model, Gaussian(8, model.latents, **options)


def fit(model, guide, *, epochs=15, doctor=None, **options):
    doctor = Doctor() if doctor is None else doctor
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = pvae.fit(
            model, guide, X, valid=HELD_OUT, epochs=epochs, batch_size=40, progress=False,
            trackers=[doctor], **{"lr": 5e-3, "engine": "eager", **options},
        )  # fmt: skip
    said = [str(w.message) for w in caught if "jit" not in str(w.message)]
    return run, doctor, said


def names(findings):
    return {finding.name for finding in findings}


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_raises_nothing(seed):
    model, guide = pair(seed)
    _, doctor, said = fit(model, guide, doctor=Doctor(HELD_OUT, interval=5), seed=seed)
    assert said == []
    assert report(doctor.findings + examine_pair(model, guide, HELD_OUT)) == (
        "Nothing was found to be wrong."
    )
    assert examine_data(X) == []


def test_values_that_are_not_finite_are_placed():
    for bad, kind in ((torch.nan, "NaN"), (-torch.inf, "infinite")):
        x = X.clone()
        x[17, 3] = bad
        (finding,) = examine_data(x)
        assert finding.name == "values that are not finite"
        assert f"first {kind} in row 17, column 3" in finding.evidence


def test_a_column_that_never_varies_is_counted():
    x = X.clone()
    x[:, 5] = 0.25
    (finding,) = examine_data(x)
    assert finding.name == "columns that never vary"
    assert finding.evidence == "1 of 8, the first number 5"


def test_a_row_that_is_not_finite_stops_the_training_and_is_placed():
    x = X.clone()
    x[17, 3] = torch.nan
    model, guide = pair()
    with pytest.raises(pvae.PvaeError, match=r"17"):
        pvae.fit(model, guide, x, epochs=1, progress=False)


def test_a_learning_rate_of_ten_is_named_one_way_or_the_other():
    model, guide = pair()
    doctor = Doctor()
    said = ""
    try:
        fit(model, guide, doctor=doctor, lr=10.0)
    except NonFiniteError as error:
        said = str(error)
    told = doctor.findings + examine_pair(model, guide, HELD_OUT)
    assert "lower lr" in said or any("lower lr" in finding.remedy for finding in told)


def test_a_kl_weight_that_never_reaches_one():
    model, guide = pair()
    _, doctor, said = fit(model, guide, objective=pvae.beta_vae(0.1))
    assert "the KL weight does not end at 1" in names(doctor.findings)
    (text,) = [text for text in said if "KL weight" in text]
    assert "0.1" in text


class Bypassed(nn.Module):
    """Its decoder takes x itself, so z is of no use to it."""

    latents = {"z": (2,)}

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(8, 8)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(self.decoder(x), 0.1).to_event(1), obs=x)


def test_a_decoder_that_bypasses_z():
    torch.manual_seed(0)
    model = Bypassed()
    guide = Gaussian(8, model.latents, hidden=(16,))
    _, doctor, said = fit(model, guide, epochs=40)
    told = names(doctor.findings + examine_pair(model, guide, HELD_OUT))
    assert "the decoder ignores the latents" in told
    assert "posterior collapse" in told
    assert any("posterior collapse" in text for text in said)


def test_dead_units():
    model, guide = pair(activation="relu")
    fit(model, guide, epochs=2)
    assert "dead units" not in names(examine_pair(model, guide, HELD_OUT))
    with torch.no_grad():
        model.decoder[0].bias[:8] = -100.0
    (finding,) = [f for f in examine_pair(model, guide, HELD_OUT) if f.name == "dead units"]
    assert finding.evidence == "50% of the 16 units of model.decoder.1 have one value for all data"


def test_a_flow_can_be_examined():
    """Its density is asked for at the draws of all other data."""
    model, _ = pair()
    guide = Flow(8, model.latents, hidden=(16,), transform_hidden=(8,))
    assert names(examine_pair(model, guide, HELD_OUT)) <= {"the decoder ignores the latents"}


def history(elbo, valid=None, **more):
    rows = [{"epoch": i + 1, "elbo": e, "beta": 1.0, "kl": 3.0} for i, e in enumerate(elbo)]
    for row, value in zip(rows, valid or [], strict=bool(valid) and len(valid) == len(rows)):
        row["valid_elbo"] = value
    return [{**row, **more} for row in rows]


def test_divergence_and_over_fitting_from_the_figures_alone():
    rising = [-100 + 10 * min(i, 8) for i in range(12)]
    assert examine_history(history(rising, rising)) == []
    fallen = [*rising[:8], -400, -420, -390, -410]
    assert names(examine_history(history(fallen))) == {"the training diverges"}
    assert examine_history(history([*rising[:8], -400, *rising[9:]])) == [], "one dip is none"
    turned = [-100, -60, -50, -48, -50, -53, -56, -58, -60, -61, -62, -63]
    told = examine_history(history(rising, turned))
    assert names(told) == {"over-fitting"}
    assert "since epoch 4" in told[0].evidence


def test_k_hat_that_rises():
    assert rising_k([(1, 0.3), (2, 0.4), (3, 0.5), (4, 0.6)]) == []
    assert rising_k([(1, 0.9), (2, 0.9), (3, 0.95), (4, 0.9)]) == [], "high, but not rising"
    told = rising_k([(1, 0.3), (2, 0.8), (3, 0.85), (4, 0.9)])
    assert names(told) == {"k-hat rises"}


def test_each_thing_is_said_once():
    doctor = Doctor()
    finding = examine_history(history([1.0] * 3, kl=0.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        doctor._tell(finding)
        doctor._tell(finding)
    assert "posterior collapse" in str(caught[0].message)
    assert len(caught) == 1
    assert len(doctor.findings) == 1
    assert report(doctor.findings).startswith("1. posterior collapse\n   seen: ")
