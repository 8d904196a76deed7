"""Calibration: exact posteriors pass, wrong ones are caught, at stated rates."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import SE, LinearGaussian, Mixture
from pyro import poutine
from scipy import stats

from pvae import particles
from pvae.errors import DataError, OptionError, ProgramError
from pvae.evidence import Calibration, calibration, predictive_checks
from pvae.evidence.calibration import ranks_of, uniformity

ALPHA = 5e-4


def model(x):
    with pyro.plate("data", len(x)):
        theta = pyro.sample("theta", dist.Normal(torch.zeros_like(x), 1.0))
        pyro.sample("x", dist.Normal(theta, 1.0), obs=x)


def guide_with(widen=1.0, move=0.0):
    """The posterior N(x/2, 1/2) with its sd multiplied and its mean moved by sd's."""

    def guide(x):
        sd = 0.5**0.5
        with pyro.plate("data", len(x)):
            pyro.sample("theta", dist.Normal(x / 2 + move * sd, widen * sd))

    return guide


TEMPLATE = torch.zeros(50, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(1, 6))
def test_exact_posteriors_pass(seed):
    found = calibration(model, guide_with(), TEMPLATE, seed=seed)
    assert len(found) == 2000
    assert found.rejected == ()
    assert "no quantity is rejected" in found.report()
    assert found.false_alarm == pytest.approx(2 * len(found.names) * ALPHA)


@pytest.mark.parametrize(("options", "words"), [({"widen": 0.8}, "too narrow"),
                                                ({"widen": 1.25}, "too wide"),
                                                ({"move": 0.2}, "biased high"),
                                                ({"move": -0.2}, "biased low")])  # fmt: skip
def test_wrong_posteriors_are_rejected_and_described(options, words):
    for seed in range(3):
        found = calibration(model, guide_with(**options), TEMPLATE, seed=seed)
        assert "theta" in found.rejected
        assert found.rows()[0]["verdict"] == words


def test_coverage_of_exact_posteriors_is_nominal():
    levels = (0.5, 0.8, 0.95)
    found = calibration(model, guide_with(), TEMPLATE)
    error = torch.tensor([math.sqrt(c * (1 - c) / 2000) for c in levels])[:, None]
    deviation = (found.coverage(levels) - torch.tensor(levels)[:, None]).abs()
    assert bool((deviation < SE * error).all())


@pytest.mark.parametrize("widen", [0.8, 1.3])
def test_coverage_of_a_wrong_sd_is_what_it_must_be(widen):
    """The central c interval of a posterior times w covers ``2 Phi(w Phi^-1((1+c)/2)) - 1``."""
    found = calibration(model, guide_with(widen), TEMPLATE)
    normal = stats.norm
    for level, observed in zip((0.5, 0.8, 0.95), found.coverage()[:, 0].tolist(), strict=True):
        truth = 2 * normal.cdf(widen * normal.ppf((1 + level) / 2)) - 1
        discrete = 0.005  # 99 draws stand in for the interval
        assert abs(observed - truth) < SE * math.sqrt(truth * (1 - truth) / 2000) + discrete


def test_the_prior_as_guide_is_caught_by_the_log_joint():
    """Every latent coordinate passes: the failure that plain SBC cannot see."""

    def prior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("theta", dist.Normal(torch.zeros_like(x), 1.0))

    found = calibration(model, prior, TEMPLATE)
    assert "theta" not in found.rejected
    assert "log joint" in found.rejected


def test_importance_correction_mends_a_wide_guide():
    wide = guide_with(1.3, 0.3)
    assert calibration(model, wide, TEMPLATE).rejected != ()
    mended = calibration(model, wide, TEMPLATE, importance=2000)
    assert mended.rejected == ()
    assert mended.corrected


def test_several_coordinates_full_covariance_and_discrete_latents():
    linear = LinearGaussian().double().requires_grad_(False)

    def exact(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", linear.posterior(x))

    found = calibration(linear, exact, torch.zeros(10, 5, dtype=torch.float64))
    assert found.names[:2] == ("z[0]", "z[1]")
    assert found.rejected == ()
    mixture = Mixture().double().requires_grad_(False)
    found = calibration(mixture, mixture.posterior_guide, torch.zeros(10, 3, dtype=torch.float64))
    assert found.names[0] == "c"
    assert found.rejected == ()


def test_false_alarms_are_as_rare_as_stated():
    """p-values of uniform ranks are uniform: 1,000 tests of each kind."""
    torch.manual_seed(0)
    ranks = torch.randint(0, 100, (2000, 1000))
    for p in uniformity(ranks, 99):
        for rate in (0.05, 0.2, 0.5):
            error = SE * math.sqrt(rate * (1 - rate) / 1000)
            assert abs(float((p < rate).double().mean()) - rate) < error + 0.01


def test_p_values_are_those_of_scipy():
    torch.manual_seed(1)
    ranks = torch.randint(0, 100, (500, 4)).clamp(max=96)
    chi_square, kolmogorov = uniformity(ranks, 99)
    found = Calibration(("a", "b", "c", "d"), ranks, 99)
    for q in range(4):
        counts = np.bincount(ranks[:, q] // 5, minlength=20)
        assert float(chi_square[q]) == pytest.approx(stats.chisquare(counts).pvalue, rel=1e-8)
    from pvae.evidence.calibration import _positions

    for q in range(4):
        theirs = stats.kstest(_positions(ranks, 99)[:, q].numpy(), "uniform").pvalue
        assert float(kolmogorov[q]) == pytest.approx(theirs, rel=0.05)
    assert found.p_values[0].tolist() == chi_square.tolist()


def test_ties_are_broken_by_a_coin():
    torch.manual_seed(0)
    ranks = ranks_of(torch.zeros(40_000), torch.zeros(9, 40_000))
    counts = torch.bincount(ranks, minlength=10).double()
    assert len(counts) == 10
    assert stats.chisquare(counts.numpy()).pvalue > ALPHA
    assert ranks_of(torch.ones(3), torch.zeros(9, 3)).tolist() == [9, 9, 9]
    assert ranks_of(-torch.ones(3), torch.zeros(9, 3)).tolist() == [0, 0, 0]


def test_simulated_data_follow_the_model():
    linear = LinearGaussian().double().requires_grad_(False)
    torch.manual_seed(0)
    latents, x = particles.simulate(linear, torch.zeros(20_000, 5, dtype=torch.float64))
    assert latents["z"].shape == (20_000, 2)
    noise = x - latents["z"] @ linear.weight.T - linear.offset
    assert float((noise.std(0) / linear.log_noise.exp() - 1).abs().max()) < 0.03
    covariance = linear.weight @ linear.weight.T + torch.eye(5) * (2 * linear.log_noise).exp()
    assert float((torch.cov(x.T) - covariance).abs().max()) < 0.1 * float(covariance.max())


def test_what_the_model_does_not_observe_is_passed_on():
    def conditional(x, label):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z + 10.0 * label, 1.0), obs=x)

    def guide(x, label):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - 10.0 * label) / 2, 0.5**0.5))

    label = torch.arange(7) % 2
    _, (x, kept) = particles.simulate(conditional, (torch.zeros(7), label))
    assert torch.equal(kept, label)
    assert (x > 5).tolist() == (label == 1).tolist()
    batch = (torch.zeros(7), label)
    assert calibration(conditional, guide, batch, num_runs=1000).rejected == ()


def test_a_site_that_is_masked_out_is_not_judged():
    def model(x, known):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=known):
                pyro.sample("extra", dist.Normal(torch.zeros(()), 1.0))
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, known):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=known):
                pyro.sample("extra", dist.Normal(x, 0.1))
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))

    x, none = torch.zeros(100), torch.zeros(100, dtype=torch.bool)
    found = calibration(model, guide, (x, none), num_runs=400, num_draws=19)
    assert found.names[0] == "z"
    assert found.rejected == ()
    with pytest.raises(ProgramError, match="'extra' is masked out for some"):
        calibration(model, guide, (x, torch.arange(100) < 50), num_runs=100, num_draws=19)
    with pytest.raises(ProgramError, match="'extra' is masked out for some"):
        calibration(model, guide, (x[:4], torch.arange(4) < 2), num_runs=4, num_draws=2**13 - 1,
                    num_bins=2)  # fmt: skip


def test_models_that_cannot_be_simulated_are_refused():
    def autoregressive(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            before = torch.cat([torch.zeros(len(x), 1), x[:, :-1]], 1)
            pyro.sample("x", dist.Normal(before + z[..., None], 1.0).to_event(1), obs=x)

    def computed(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0] * 2)

    with pytest.raises(ProgramError, match="reads its data.*pass simulator="):
        particles.simulate(autoregressive, torch.randn(4, 3))
    with pytest.raises(ProgramError, match="computed from the batch.*pass simulator="):
        particles.simulate(computed, torch.randn(4, 3))


def test_a_simulator_of_ones_own():
    def simulator(rows):
        theta = torch.randn(len(rows), dtype=rows.dtype)
        return {"theta": theta}, theta + torch.randn(len(rows), dtype=rows.dtype)

    found = calibration(model, guide_with(), TEMPLATE, simulator=simulator, seed=1)
    assert found.rejected == ()
    with pytest.raises(ProgramError, match="no values of site 'theta'"):
        calibration(model, guide_with(), TEMPLATE, simulator=lambda rows: ({}, rows))


def test_predictive_checks_catch_what_the_model_lacks():
    torch.manual_seed(5)
    good = math.sqrt(2) * torch.randn(300, dtype=torch.float64)
    statistics = {"mean": torch.mean, "spread": torch.std, "largest": torch.max}
    fine = predictive_checks(model, good, statistics)
    assert min(fine.p_values.values()) > 0.01
    assert not fine.posterior
    heavy = good * (1 + 4 * (torch.rand(300) < 0.05))
    found = predictive_checks(model, heavy, statistics, num_replicates=399)
    assert found.p_values["largest"] <= 0.005 + 1e-9
    assert found.p_values["spread"] <= 0.01
    posterior = predictive_checks(model, good, statistics, guide=guide_with())
    assert posterior.posterior
    assert "posterior predictive, 300 data" in posterior.report()


def test_predictive_p_values_are_uniform_under_the_prior():
    torch.manual_seed(6)
    p = []
    for seed in range(40):
        x = math.sqrt(2) * torch.randn(40, dtype=torch.float64)
        p.append(predictive_checks(model, x, {"mean": torch.mean}, num_replicates=39,
                                   seed=seed).p_values["mean"])  # fmt: skip
    assert stats.kstest(p, "uniform").pvalue > ALPHA


def test_wrong_use_gets_one_sentence():
    with pytest.raises(OptionError, match="multiple of num_bins.*take num_draws=99"):
        calibration(model, guide_with(), TEMPLATE, num_draws=100)
    with pytest.raises(OptionError, match="importance at least num_draws"):
        calibration(model, guide_with(), TEMPLATE, importance=50)
    with pytest.raises(OptionError, match="at least one statistic"):
        predictive_checks(model, TEMPLATE, {})
    with pytest.raises(DataError, match="'all' must return one finite number.*shape"):
        predictive_checks(model, TEMPLATE, {"all": lambda x: x})
