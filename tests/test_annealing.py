"""AIS, SMC and two-sided bounds against exact evidence.

Known answers are judged on the mean over a pair's data, within 3 of its own standard errors: 21
such checks (7 pairs, 3 estimators) raise a false alarm 5.5 % of the time, once, since seeds are
fixed. What is exact in expectation (``E[w / p(x)] = 1``) is judged within 4.5.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_pairs import PAIRS, columns, factor_analysis, gamma_poisson, two_modes
from programs import SE, guide_near_posterior, linear_gaussian
from pyro import poutine

from pvae.errors import NonFiniteError, OptionError, ProgramError
from pvae.evidence import (
    annealed,
    annealing,
    importance,
    importance_upper,
    sandwich,
    simulate,
    smc,
)
from pvae.evidence.annealing import geometric, linear, sigmoidal
from pvae.guides.gaussian import Gaussian
from pvae.models.gaussian_mixture import GaussianMixture
from pvae.models.vae import VAE

QUICK = {"num_temperatures": 24, "num_leapfrog": 3, "max_pairs": 10**5}
WITHIN = 3.0


def ratio_z(log_ratio):
    """How many standard errors over the data the mean of ``exp(log_ratio)`` is off one."""
    ratio = log_ratio.exp()
    return float((ratio.mean() - 1).abs() / (ratio.std() / math.sqrt(len(ratio))))


# --- known answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_estimates_lie_within_their_own_standard_errors(name):
    pair = PAIRS[name]()
    x = pair.data(25)
    truth = pair.log_evidence(x)
    estimates = [
        importance(pair.model, pair.guide, x, 4000),
        annealed(pair.model, pair.guide, x, num_chains=64, **{**QUICK, "max_pairs": 16 * 25}),
        smc(pair.model, None, x, num_particles=128, num_groups=32, start="prior", **QUICK),
    ]
    for found in estimates:
        error = found.log_evidence - truth
        assert found.log_evidence.dtype == torch.float64
        assert abs(float(error.sum())) < WITHIN * float(found.stderr.square().sum().sqrt()), found
        assert 0.6 < float((error / found.stderr).std()) < 1.6, found


@pytest.mark.parametrize("name", ["factor analysis", "gamma-Poisson", "two modes", "inner plate"])
def test_the_sandwich_holds_the_truth_and_both_weights_are_unbiased(name):
    pair = PAIRS[name]()
    lower, upper = found = sandwich(pair.model, pair.guide, 150, num_chains=16, **QUICK)
    truth = pair.log_evidence(found.simulated.x)
    assert ratio_z(lower.log_evidence - truth) < SE
    assert ratio_z(truth - upper.log_evidence) < SE
    for below in (truth - lower.log_evidence, upper.log_evidence - truth, found.gap):
        assert float(below.mean()) > -SE * float(below.std()) / math.sqrt(len(below))
    assert (lower.kind, upper.kind) == ("lower bound", "upper bound")
    assert float(found.gap.mean()) == pytest.approx(found.mean_gap)
    assert found.gap_stderr.shape == (150,)
    assert f"gap {found.mean_gap:.3f}" in repr(found)


def test_ten_latents_in_a_poor_guides_hands():
    """Where 100 times as many importance weights fail, the annealed ones do not."""
    pair = factor_analysis(10, move=1.5, widen=0.6)
    x = pair.data(20)
    truth = pair.log_evidence(x)
    found = annealed(
        pair.model, pair.guide, x, num_chains=32, num_temperatures=100, num_leapfrog=5,
        max_pairs=10**5,
    )  # fmt: skip
    plain = importance(pair.model, pair.guide, x, 3200)
    assert float(plain.pareto_k.median()) > 0.7
    error = found.log_evidence - truth
    assert abs(float(error.sum())) < WITHIN * float(found.stderr.square().sum().sqrt())
    assert float((plain.log_evidence - truth).square().mean().sqrt()) > 3 * float(
        error.square().mean().sqrt()
    )


def test_more_temperatures_close_the_gap_as_one_over_t():
    pair = factor_analysis(8, move=0.8, widen=1.3)
    gaps = [
        sandwich(
            pair.model, pair.guide, 200, num_chains=16, num_temperatures=number, num_leapfrog=4,
            max_pairs=10**5,
        ).mean_gap
        for number in (8, 32)
    ]  # fmt: skip
    assert gaps[1] < 0.5 * gaps[0]


def test_an_exact_guide_leaves_nothing_to_anneal():
    model, x = linear_gaussian(5)
    guide = guide_near_posterior(model, move=0.0, widen=1.0)
    for estimator in (annealed, smc):
        found = estimator(model, guide, x, num_temperatures=5, num_leapfrog=2)
        assert (found.log_evidence - model.log_evidence(x)).abs().max() < 1e-9
        assert found.stderr.max() < 1e-6


def test_ordering_of_the_importance_weighted_bounds():
    """RELIABILITY C12: both rows of its table, on data of the model and a guide made as there.

    Its model was another draw of W, so the values are compared with this model's own ELBO gap and
    with each other, and the table's pattern (monotone, gone at k = 256) within errors.
    """
    torch.manual_seed(2)
    pair = factor_analysis(2)
    model = pair.model
    guide = importance_guide(model)
    simulated = simulate(model, guide, 4000)
    truth = model.log_evidence(simulated.x)
    below, above = [], []
    for k in (1, 4, 16, 64, 256):
        lower = truth - importance(model, guide, simulated.x, k, max_pairs=10**6).log_evidence
        upper = importance_upper(model, guide, simulated, k, max_pairs=10**6).log_evidence - truth
        assert ratio_z(-upper) < SE
        below.append(lower)
        above.append(upper)
    for side in (below, above):
        for gap in side:
            assert float(gap.mean()) > -SE * float(gap.std()) / math.sqrt(len(gap))
        for worse, better in zip(side, side[1:], strict=False):
            change = better - worse
            assert float(change.mean()) < SE * float(change.std()) / math.sqrt(len(change))
        assert float(side[0].mean()) > 0.15
        assert abs(float(side[-1].mean())) < SE * float(side[-1].std()) / math.sqrt(4000) + 2e-3


def importance_guide(model):
    """The posterior with each mean moved by 0.3 marginal sd and its covariance times 1.3^2."""

    def guide(x):
        exact = model.posterior(x)["z"]
        loc = exact.mean + 0.3 * exact.variance.sqrt()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=1.3 * exact.scale_tril))

    return guide


def test_elbo_and_its_mirror_have_closed_forms():
    """k = 1: ``KL(q || p)`` below and ``KL(p || q)`` above, exact for Gaussians."""
    model = factor_analysis(2).model
    guide = importance_guide(model)
    simulated = simulate(model, guide, 20_000)
    x, truth = simulated.x, model.log_evidence(simulated.x)
    posterior = model.posterior(x[:1])["z"]
    shift = 0.3 * posterior.variance.sqrt()
    moved = dist.MultivariateNormal(posterior.mean + shift, scale_tril=1.3 * posterior.scale_tril)
    kl = torch.distributions.kl_divergence
    below = truth - importance(model, guide, x, 1, max_pairs=10**6).log_evidence
    above = importance_upper(model, guide, simulated, 1, max_pairs=10**6).log_evidence - truth
    for found, exact in ((below, kl(moved, posterior)), (above, kl(posterior, moved))):
        assert abs(float(found.mean() - exact)) < SE * float(found.std()) / math.sqrt(len(found))


# --- how it is run ------------------------------------------------------------------------------


def test_same_seed_same_numbers_and_the_callers_stream_is_untouched():
    pair = gamma_poisson()
    x = pair.data(6)
    few = {"num_temperatures": 6, "num_leapfrog": 2}
    torch.manual_seed(11)
    expected = torch.rand(2)
    torch.manual_seed(11)
    first = annealed(pair.model, pair.guide, x, seed=5, **few)
    assert torch.equal(torch.rand(2), expected)
    again = annealed(pair.model, pair.guide, x, seed=5, **few)
    assert torch.equal(first.log_evidence, again.log_evidence)
    other = annealed(pair.model, pair.guide, x, seed=6, **few)
    assert not torch.equal(first.log_evidence, other.log_evidence)


def test_pieces_cover_all_chains_and_data_and_progress_is_told():
    pair = gamma_poisson()
    x = pair.data(7)
    seen, held = [], []

    def watched(x=None, size=1):
        with pyro.plate("data", size if x is None else len(x)):
            z = pyro.sample("z", dist.Gamma(torch.tensor(2.0).double(), 0.5))
            held.append(z.numel())
            rates = z.unsqueeze(-1).expand(*z.shape, 3)
            return pyro.sample("x", dist.Poisson(rates).to_event(1), obs=x)

    found = annealed(
        watched, pair.guide, x, num_chains=50, num_temperatures=4, num_leapfrog=1, max_pairs=48,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(3, 7), (6, 7), (7, 7)]
    assert max(held) <= 48
    assert (found.num_particles, len(found)) == (50, 7)
    error = (found.log_evidence - pair.log_evidence(x)) / found.stderr
    assert error.abs().max() < SE


def test_one_by_one_agrees_in_distribution(monkeypatch):
    monkeypatch.setattr(annealing, "_PILOTS", 3)
    pair = columns()
    x = pair.data(30)
    found = annealed(
        pair.model, pair.guide, x, num_chains=4, num_temperatures=3, num_leapfrog=1,
        vectorize=False,
    )  # fmt: skip
    assert ratio_z(found.log_evidence - pair.log_evidence(x)) < SE


@pytest.mark.parametrize("schedule", ["geometric", linear, [0, 0.1, 0.4, 1]])
def test_any_rising_schedule_is_unbiased(schedule):
    pair = gamma_poisson()
    x = pair.data(200)
    found = annealed(
        pair.model, pair.guide, x, num_chains=16, num_temperatures=10, num_leapfrog=2,
        schedule=schedule, max_pairs=10**5,
    )  # fmt: skip
    assert ratio_z(found.log_evidence - pair.log_evidence(x)) < SE


def test_schedules_rise_from_zero_to_one():
    for schedule in (linear, sigmoidal, geometric):
        betas = schedule(20)
        assert betas.shape == (21,)
        assert (float(betas[0]), float(betas[-1])) == (0, pytest.approx(1))
        assert (betas.diff() > 0).all()


def test_float32_programs_and_data_in_a_tuple():
    torch.manual_seed(0)
    model = VAE(12, z_dim=2, hidden=(8,))
    guide = Gaussian(12, model.latents, hidden=(8,))
    x = (torch.rand(40, 12) < 0.5).float()
    batch = (x, torch.zeros(len(x)))
    found = annealed(lambda x, _: model(x), lambda x, _: guide(x), batch, **QUICK)
    exact = importance(model, guide, x, 50_000)
    error = (found.log_evidence - exact.log_evidence) / torch.hypot(found.stderr, exact.stderr)
    assert found.log_evidence.dtype == torch.float64
    assert error.abs().max() < SE


def test_a_program_that_cannot_be_traced_is_annealed_as_written():
    pair = gamma_poisson()
    x = pair.data(10)

    def branching(x=None, size=1):
        if x is not None and float(x.sum()) < 0:
            return None
        return pair.model(x, size)

    def shy(x):
        float(x.sum())
        pair.guide(x)

    with pytest.warns(UserWarning, match="as written, not as a traced graph") as said:
        found = annealed(branching, shy, x, num_temperatures=5, num_leapfrog=2, max_pairs=80)
    assert len(said) == 1
    traced = annealed(pair.model, pair.guide, x, num_temperatures=5, num_leapfrog=2, max_pairs=80)
    assert torch.allclose(found.log_evidence, traced.log_evidence, atol=1e-8)


def test_compiled_densities_give_the_same_numbers():
    pair = factor_analysis()
    x = pair.data(16)
    few = {"num_chains": 16, "num_temperatures": 5, "num_leapfrog": 2}
    plain = annealed(pair.model, pair.guide, x, **few)
    with_compiler = annealed(pair.model, pair.guide, x, compiled=True, **few)
    assert torch.allclose(plain.log_evidence, with_compiler.log_evidence, atol=1e-6)


# --- data that the model draws ------------------------------------------------------------------


def test_latents_of_simulated_data_are_posterior_draws():
    """Standardised by the exact posterior they are standard normal."""
    pair = factor_analysis()
    simulated = simulate(pair.model, pair.guide, 5000)
    posterior = pair.model.posterior(simulated.x)["z"]
    standard = torch.linalg.solve_triangular(
        posterior.scale_tril, (simulated.latents["z"][0] - posterior.mean)[..., None], upper=False
    )[..., 0]
    assert float((standard.mean(0) * math.sqrt(5000)).abs().max()) < SE
    assert float(((standard.var(0) - 1) * math.sqrt(2500)).abs().max()) < SE


def test_a_model_that_only_scores_generates_from_example_data():
    model, x = linear_gaussian(400)
    model.requires_grad_(False)
    guide = guide_near_posterior(model, move=0.3, widen=1.3)
    lower, upper = found = sandwich(
        model, guide, 300, example=x, num_chains=4, num_temperatures=10, num_leapfrog=2,
        max_pairs=10**5,
    )  # fmt: skip
    assert not torch.equal(found.simulated.x, x[:300])
    truth = model.log_evidence(found.simulated.x)
    assert ratio_z(lower.log_evidence - truth) < SE
    assert ratio_z(truth - upper.log_evidence) < SE


def test_covariates_stay_and_their_own_data_are_drawn():
    pair = gamma_poisson()

    def model(x, exposure):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.tensor(2.0).double(), 0.5))
            pyro.sample("x", dist.Poisson(z * exposure), obs=x)

    def guide(x, exposure):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(x + 2, exposure + 0.6))

    exposure = torch.rand(200).double() + 0.5
    found = sandwich(
        model, guide, 200, example={"x": torch.zeros(200).double(), "exposure": exposure},
        num_chains=4, num_temperatures=8, num_leapfrog=2, max_pairs=10**5,
    )  # fmt: skip
    x = found.simulated.x["x"]
    assert torch.equal(found.simulated.x["exposure"], exposure)
    truth = dist.NegativeBinomial(2.0, probs=exposure / (exposure + 0.5)).log_prob(x)
    assert ratio_z(found.lower.log_evidence - truth) < SE
    assert ratio_z(truth - found.upper.log_evidence) < SE
    assert pair.model(size=2).shape == (2, 3)


def test_discrete_latents_have_an_importance_weighted_upper_bound():
    torch.manual_seed(3)
    model = GaussianMixture(4, num_components=3).double().requires_grad_(False)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("component", dist.Categorical(logits=0.5 * model.log_joint(x)))

    simulated = simulate(model, guide, 3000)
    upper = importance_upper(model, guide, simulated, 8)
    truth = model.log_evidence(simulated.x)
    assert ratio_z(truth - upper.log_evidence) < SE
    assert upper.kind == "upper bound"
    assert upper.mean > float(truth.mean())


# --- wrong use ----------------------------------------------------------------------------------


def test_impossible_numbers_get_one_sentence():
    pair = gamma_poisson()
    x = pair.data(3)
    wrong = [
        ({"num_chains": 0}, "num_chains must be at least 1, got 0"),
        ({"num_temperatures": 1}, "num_temperatures must be at least 2, got 1: .* importance"),
        ({"num_leapfrog": 0}, "num_leapfrog must be at least 1"),
        ({"max_pairs": 0}, "max_pairs must be at least 1"),
        ({"target_acceptance": 1.0}, "lies between 0 and 1, got 1.0: 0.65 is usual"),
        ({"start": "posterior"}, "start is 'guide' or 'prior', got 'posterior'"),
        ({"schedule": "sigmoid"}, "did you mean 'sigmoidal'"),
        ({"schedule": [0.0, 1.0]}, "at least three temperatures"),
        ({"schedule": [0.0, 0.6, 0.5, 1.0]}, "rises from 0 to 1"),
        ({"schedule": [0.0, 0.6, 0.9]}, "rises from 0 to 1"),
    ]
    for options, message in wrong:
        with pytest.raises(OptionError, match=message) as caught:
            annealed(pair.model, pair.guide, x, **options)
        assert "\n" not in str(caught.value)
    for options, message in [
        ({"num_particles": 100, "num_groups": 16}, "multiple of num_groups"),
        ({"num_groups": 1}, "at least two groups"),
        ({"num_particles": 16}, "at least two groups of two"),
        ({"ess_threshold": 1.5}, "ess_threshold lies between 0 and 1"),
        ({"num_temperatures": 1}, "importance sampling"),
    ]:
        with pytest.raises(OptionError, match=message):
            smc(pair.model, pair.guide, x, **options)
    with pytest.raises(OptionError, match="needs a guide, got None"):
        annealed(pair.model, None, x)
    with pytest.raises(OptionError, match="num_data must be at least 1"):
        sandwich(pair.model, pair.guide, 0)
    with pytest.raises(OptionError, match="more than the 3 example rows"):
        sandwich(pair.model, pair.guide, 4, example=x)
    with pytest.raises(OptionError, match="num_particles must be at least 1"):
        importance_upper(pair.model, pair.guide, simulate(pair.model, pair.guide, 3), 0)


def test_discrete_latents_get_one_sentence():
    model = GaussianMixture(3)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("component", dist.Categorical(logits=torch.zeros(10)))

    for estimator in (annealed, smc):
        with pytest.raises(ProgramError, match="'component' .* is discrete .* importance sampl"):
            estimator(model, guide, torch.randn(4, 3))


def test_shared_latents_get_one_sentence():
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + w, 1.0), obs=x)

    def guide(x):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(ProgramError, match="'w' is shared by all data"):
        annealed(model, guide, torch.randn(4))


def test_a_guide_on_part_of_the_support_gets_one_sentence():
    pair = two_modes()

    def positive(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(0.0 * x, 1.0))

    def box(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(x - 0.5, x + 0.5))

    x = pair.data(5)
    for narrow in (positive, box):
        with pytest.raises(ProgramError, match="part of the model's support.*start='prior'"):
            annealed(pair.model, narrow, x)
    found = annealed(pair.model, box, x, start="prior", num_temperatures=30, num_leapfrog=4)
    error = (found.log_evidence - pair.log_evidence(x)) / found.stderr
    assert error.abs().max() < SE


def test_guides_with_sites_of_their_own_get_one_sentence():
    pair = two_modes()

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(x + a, 1.0))

    with pytest.raises(ProgramError, match="'a'.*not known: .*start='prior'"):
        annealed(pair.model, guide, pair.data(5))


def test_plates_that_pick_their_own_rows_get_one_sentence():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=4) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=4) as rows:
            pyro.sample("z", dist.Normal(x[rows], 1.0))

    with pytest.raises(ProgramError, match="picks 4 of 10 rows"):
        annealed(model, guide, torch.randn(10))


def test_models_that_do_not_generate_get_one_sentence():
    model, x = linear_gaussian(6)
    guide = guide_near_posterior(model, move=0.3, widen=1.3)
    with pytest.raises(ProgramError, match=r"model\(size=5\) does not generate .* example data"):
        sandwich(model, guide, 5)

    def silent(x=None, size=1):
        with pyro.plate("data", size if x is None else len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def mean(x=None, size=1):
        silent(x, size)
        return torch.zeros(size if x is None else len(x))

    def near(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, 1.0))

    with pytest.raises(ProgramError, match="returns NoneType, not data"):
        sandwich(silent, near, 5)
    with pytest.raises(ProgramError, match="let it return the values of its observed sites"):
        sandwich(mean, near, 5)
    with pytest.raises(ProgramError, match="'x' is not a tensor of the batch itself"):
        sandwich(lambda x: silent(x + 1), near, 5, example=torch.randn(5))

    def leaning(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + x.roll(1), 1.0), obs=x)

    with pytest.raises(ProgramError, match="no site depend on the data but through them"):
        sandwich(leaning, near, 5, example=torch.randn(5))


def test_a_nan_in_a_weight_gets_one_sentence():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal((z - 9).sqrt(), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(NonFiniteError, match="a log weight of datum 0"):
        annealed(model, guide, torch.zeros(3), num_temperatures=3)


def test_handlers_and_scales_do_not_enter_the_weights():
    pair = two_modes()
    x = pair.data(6)
    few = {"num_temperatures": 5, "num_leapfrog": 2}
    plain = annealed(pair.model, pair.guide, x, **few)
    scaled = annealed(
        poutine.scale(pair.model, scale=0.1), poutine.scale(pair.guide, scale=0.1), x, **few
    )
    assert torch.equal(plain.log_evidence, scaled.log_evidence)
