"""Escalation and the curve of L_k."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import SE, AffineGuide, linear_gaussian

import pvae
from pvae.errors import NonFiniteError, OptionError
from pvae.evidence import (
    Evidence,
    Rung,
    auto,
    escalation_report,
    importance,
    log_evidence_curve,
    measured_curve,
    standard_ladder,
)
from pvae.evidence.escalation import pareto_limit


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(20)
    model, x = linear_gaussian(40)
    return model.requires_grad_(False), x


def scaled_guide(model, scale, rows=None):
    """The posterior with its sd multiplied by ``scale``, for x with a positive first entry."""

    def guide(x):
        posterior = model.posterior(x)
        narrow = torch.where(x[:, 0] > model.offset[0], scale, 1.4)
        tril = posterior.scale_tril * narrow[:, None, None]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(posterior.mean, scale_tril=tril))

    return guide


def strong_rung(model, cost=2000, calls=None):
    """A stand-in for annealing: importance sampling from a wide, sound guide."""

    def estimate(model, guide, x, *, seed):
        if calls is not None:
            calls.append(len(x))
        wide = scaled_guide(model, 1.4)
        return importance(model, wide, x, cost, seed=seed)

    return Rung("strong", cost, estimate)


def test_limit_depends_on_the_number_of_weights():
    assert pareto_limit(100) == pytest.approx(0.5)
    assert pareto_limit(1000) == pytest.approx(2 / 3)
    assert pareto_limit(10**6) == 0.7


def test_the_standard_ladder_reaches_annealing_where_the_guide_is_far_too_narrow(pair):
    model, x = pair[0], pair[1][:15]
    found = auto(model, scaled_guide(model, 0.25), x, tolerance=0.1, budget=None, num_particles=500)
    methods = [name for name in found.methods if not name.endswith("not met")]
    assert sum(name.startswith("annealed") for name in methods) > 2
    assert len(methods) > 0.9 * len(x)
    annealed = torch.tensor([name.startswith("annealed") for name in found.methods])
    error = (found.log_evidence - model.log_evidence(x))[annealed]
    assert error.square().mean().sqrt() < 0.1
    plain = importance(model, scaled_guide(model, 0.25), x, 500).log_evidence
    assert error.abs().mean() < (plain - model.log_evidence(x))[annealed].abs().mean()


def test_narrow_guides_are_escalated_and_the_error_meets_the_tolerance(pair):
    model, x = pair
    guide, calls = scaled_guide(model, 0.25), []
    ladder = [standard_ladder(1000)[0], strong_rung(model, calls=calls)]
    found = auto(model, guide, x, tolerance=0.05, budget=None, ladder=ladder)
    first = importance(model, guide, x, 1000)
    narrow = x[:, 0] > model.offset[0]
    flagged = (first.pareto_k > pareto_limit(1000)) | (first.stderr > 0.05)
    assert bool(flagged[narrow].double().mean() > 0.9)
    assert calls == [int(flagged.sum())]
    assert [m == "strong" for m in found.methods] == flagged.tolist()
    assert found.method == "auto"
    assert float(found.stderr.max()) <= 0.05
    z = (found.log_evidence - model.log_evidence(x)).abs() / found.stderr
    assert float(z[flagged].max()) < SE
    error = (found.log_evidence - model.log_evidence(x))[flagged]
    assert float(error.square().mean().sqrt()) < 0.05
    before = (first.log_evidence - model.log_evidence(x))[flagged]
    assert float(before.square().mean().sqrt()) > 0.05
    report = escalation_report(found)
    assert "strong" in report
    assert "importance" in report


def test_budget_is_respected_and_the_rest_is_marked(pair):
    model, x = pair
    guide, calls = scaled_guide(model, 0.25), []
    ladder = [standard_ladder(1000)[0], strong_rung(model, calls=calls)]
    budget = 1000 + 5 * 2000 / len(x)  # pays for five data on the second rung
    found = auto(model, guide, x, tolerance=0.05, budget=budget, ladder=ladder)
    assert calls == [5]
    assert 1000 * len(x) + 2000 * sum(calls) <= budget * len(x)
    unmet = [m for m in found.methods if m.endswith("; tolerance not met")]
    narrow = int((x[:, 0] > model.offset[0]).sum())
    assert len(unmet) >= 0.8 * narrow - 5
    assert found.methods.count("strong") == 5
    only_first = auto(model, guide, x, budget=1000, ladder=ladder)
    assert {m.partition(";")[0] for m in only_first.methods} == {"importance"}


def test_a_weaker_later_rung_does_not_replace_a_better_estimate(pair):
    model, x = pair

    def useless(model, guide, x, *, seed):
        nothing = torch.full((len(x),), 99.0, dtype=torch.float64)
        return Evidence(nothing, nothing, nothing, nothing, nothing, 100)

    ladder = [standard_ladder(1000)[0], strong_rung(model), Rung("useless", 1, useless)]
    found = auto(model, scaled_guide(model, 0.25), x, tolerance=1e-6, budget=None, ladder=ladder)
    assert not any("useless" in m for m in found.methods)
    assert all(m.endswith("not met") for m in found.methods)


def test_sound_guides_stay_on_the_first_rung(pair):
    model, x = pair
    found = auto(model, scaled_guide(model, 1.3), x, tolerance=0.1)
    assert set(found.methods) == {"importance"}


def test_methods_survive_a_change_of_scale(pair):
    model, x = pair
    found = auto(model, scaled_guide(model, 1.3), x).shifted(torch.ones(40))
    assert found.methods == ("importance",) * 40


def test_smoothing_agrees_with_the_truth_where_tails_are_light(pair):
    model, x = pair
    found = importance(model, scaled_guide(model, 1.4), x, 4000, smooth=True)
    z = (found.log_evidence - model.log_evidence(x)).abs() / found.stderr
    assert float(z.max()) < SE
    assert found.method == "psis"


def test_curve_from_one_set_of_weights(pair):
    model, x = pair
    torch.manual_seed(0)
    weights = pvae.draw(model, AffineGuide().double(), x, 300).log_weights.detach()
    curve = log_evidence_curve(weights)
    assert curve.sizes == (1, 2, 4, 8, 16, 32, 64, 128)
    used = weights[:256]
    assert curve.bounds[0] == pytest.approx(float(used.mean()))
    pairs = torch.logsumexp(used.reshape(128, 2, -1), 1) - math.log(2)
    assert curve.bounds[1] == pytest.approx(float(pairs.mean()))
    assert curve.gain_stderr[0] < math.hypot(*curve.stderr[:2])  # paired
    assert all(gain > 0 for gain in curve.gains)
    assert "L_k" in str(curve)


def test_curve_of_a_pair_rises_to_the_evidence(pair):
    model, x = pair
    curve = measured_curve(model, scaled_guide(model, 1.6), x[:20], sizes=(1, 8, 64, 512),
                           num_draws=1024)  # fmt: skip
    truth = float(model.log_evidence(x[:20]).mean())
    assert curve.bounds[0] < truth - 0.1
    assert abs(curve.bounds[-1] - truth) < SE * curve.stderr[-1] + 0.01


def test_curve_holds_few_rows_of_particles_at_once(pair):
    model, x = pair
    held = []

    def counting(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).to(x), 1.0).to_event(1))
            loc = z @ model.weight.T + model.offset
            held.append(loc.shape[:-1].numel())
            pyro.sample("x", dist.Normal(loc, model.log_noise.exp()).to_event(1), obs=x)

    rows = x.repeat(5, 1)
    measured_curve(counting, scaled_guide(model, 1.6), rows, sizes=(4, 64, 512))
    assert 1024 < max(held) <= 2048
    held.clear()
    measured_curve(counting, scaled_guide(model, 1.6), x[:3], sizes=(4, 4096))
    assert max(held) == 4096  # all of one datum, of three one after another


def test_stderr_of_the_curve_is_its_spread(pair):
    model, x = pair
    torch.manual_seed(3)
    guide = scaled_guide(model, 1.6)
    curves = [log_evidence_curve(pvae.draw(model, guide, x, 64).log_weights) for _ in range(60)]
    for place in range(4):
        spread = torch.tensor([c.bounds[place] for c in curves]).double().var()
        stated = torch.tensor([c.stderr[place] for c in curves]).double().square().mean()
        assert abs(float(spread / stated) - 1) < SE * math.sqrt(2 / 59)


def test_a_falling_curve_is_an_error(pair):
    model, x = pair
    torch.manual_seed(0)
    weights = pvae.draw(model, scaled_guide(model, 1.6), x, 256).log_weights
    with pytest.raises(NonFiniteError, match="L_2 is .* nats below L_1"):
        log_evidence_curve(weights, estimate=lambda w: w.logsumexp(0) - 2 * math.log(len(w)))
    with pytest.raises(NonFiniteError):
        log_evidence_curve(weights, estimate=lambda w: w.logsumexp(0) * math.nan)


def test_draws_of_density_zero_are_no_fault():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Poisson(3 * z.relu()), obs=x)  # zero where z < 0 and x > 0

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.2 * x, 1.0))

    curve = measured_curve(model, guide, torch.arange(8.0), sizes=(1, 4, 256))
    assert curve.bounds[0] == -math.inf
    assert math.isfinite(curve.bounds[-1])
    torch.manual_seed(0)
    weights = pvae.draw(model, guide, torch.arange(8.0), 256).log_weights
    assert log_evidence_curve(weights).bounds[:2] == (-math.inf, -math.inf)
    with pytest.raises(NonFiniteError):
        log_evidence_curve(-weights)  # plus infinity


def test_a_program_that_mixes_its_particles_is_an_error(pair):
    """Batch statistics over the particles: each k is another model."""
    model, x = pair

    def mixing(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).to(x), 1.0).to_event(1))
            centred = z - z.mean(0, keepdim=True) if z.dim() == 3 and len(z) > 1 else z
            loc = centred @ model.weight.T + model.offset
            pyro.sample("x", dist.Normal(loc, model.log_noise.exp()).to_event(1), obs=x)

    with pytest.raises(NonFiniteError, match="mixes its particles"):
        measured_curve(mixing, scaled_guide(model, 1.0), x, sizes=(1, 4, 16))


def test_wrong_use_gets_one_sentence(pair):
    model, x = pair
    guide = scaled_guide(model, 1.0)
    with pytest.raises(OptionError, match="positive tolerance"):
        auto(model, guide, x, tolerance=0)
    with pytest.raises(OptionError, match="does not pay for importance"):
        auto(model, guide, x, budget=10)
    with pytest.raises(OptionError, match="at least one rung"):
        auto(model, guide, x, ladder=[])
    with pytest.raises(OptionError, match="at least 2 particles"):
        log_evidence_curve(torch.zeros(1, 3))
    with pytest.raises(OptionError, match="sizes must grow"):
        measured_curve(model, guide, x, sizes=(4, 2))
