"""Wrong estimators that must fail the very checks that the right ones pass.

Each check is a function from an implementation to None, raising AssertionError. A mutant that
survives its check means that the check is too weak.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from programs import (
    IDENTITY,
    SE,
    DiscreteSite,
    ExactGuide,
    MixedSites,
    OneSite,
    TwoSites,
    exact_bound,
    gradient_bias,
    guide_near_posterior,
    linear_gaussian,
    z_score,
)
from pyro import poutine

import pvae
from pvae import log_weights as algebra
from pvae import objectives, schedules
from pvae.bounds import elbo, iw_elbo, renyi
from pvae.gradients import (
    DoublyReparameterized,
    Pathwise,
    ScoreFunction,
    StickTheLanding,
    doubly_reparameterized,
    mixed,
    pathwise,
    score_function,
    stick_the_landing,
)

K = 3


# --- bounds -------------------------------------------------------------------------------------


def check_bound(bound, definition):
    """The mean over fresh draws is the expectation of the definition, exact by quadrature."""
    pair = OneSite()
    scalars = {n: v.detach() for n, v in pair.scalars().items()}
    truth = exact_bound(pair.nodes(scalars), definition, K)
    model, guide, x = pair.programs(40_000)
    log_weights = pvae.draw(model, guide, x, K).log_weights.detach()
    values = bound(log_weights)
    assert values.shape == (40_000,)
    assert float(z_score(values, truth)) < SE


def elbo_definition(log_weights):
    return log_weights.sum(0) / K


def iw_definition(log_weights):
    return (log_weights.exp().sum(0) / K).log()


def renyi_definition(log_weights):
    return 2 * (log_weights.exp().sqrt().sum(0) / K).log()


RIGHT_BOUNDS = [(elbo, elbo_definition), (iw_elbo, iw_definition), (renyi(0.5), renyi_definition)]

WRONG_BOUNDS = {
    "no -log K": (lambda w: w.logsumexp(0), iw_definition),
    "-log K twice": (lambda w: w.logsumexp(0) - 2 * math.log(K), iw_definition),
    "mean of logs": (lambda w: w.mean(0), iw_definition),
    "largest weight": (lambda w: w.max(0).values, iw_definition),
    "mean over data": (lambda w: algebra.log_mean_exp(w.T)[:1].expand(w.shape[1]), iw_definition),
    "self-normalised": (lambda w: (w.softmax(0) * w).sum(0), iw_definition),
    "sum for mean": (lambda w: w.sum(0), elbo_definition),
    "sign": (lambda w: -w.mean(0), elbo_definition),
    "order forgotten outside": (lambda w: algebra.log_mean_exp(0.5 * w), renyi_definition),
    "alpha for one minus alpha": (lambda w: renyi(0.7)(w), lambda w: renyi(0.3)(w)),
}


@pytest.mark.parametrize(
    ("bound", "definition"), RIGHT_BOUNDS, ids=lambda value: getattr(value, "__name__", repr(value))
)
def test_right_bounds_pass(bound, definition):
    check_bound(bound, definition)


@pytest.mark.parametrize("name", WRONG_BOUNDS)
def test_wrong_bounds_fail(name):
    with pytest.raises(AssertionError):
        check_bound(*WRONG_BOUNDS[name])


# --- log weights --------------------------------------------------------------------------------


def check_weights(weigh):
    """Under the exact posterior each weight is the evidence of its own datum, beta or not."""
    model, x = linear_gaussian(12)
    model.requires_grad_(False)
    model.total = 48
    particles = pvae.draw(model, ExactGuide(model), x, K)
    evidence = model.log_evidence(x)
    assert float((weigh(particles, 1.0) - evidence).abs().max()) < IDENTITY
    half = particles.log_likelihood + 0.5 * (particles.log_prior - particles.log_q["z"])
    assert float((weigh(particles, 0.5) - half).abs().max()) < IDENTITY


def split(particles):
    return particles.log_likelihood, particles.log_prior, particles.log_q["z"]


def right_weights(particles, beta):
    likelihood, prior, log_q = split(particles)
    return likelihood + beta * (prior - log_q) if beta != 1 else particles.log_weights


WRONG_WEIGHTS = {
    "sign of the entropy": lambda lik, prior, q, beta: lik + beta * (prior + q),
    "KL counted twice": lambda lik, prior, q, beta: lik + 2 * beta * (prior - q),
    "prior forgotten": lambda lik, prior, q, beta: lik - beta * q,
    "beta on the reconstruction": lambda lik, prior, q, beta: beta * lik + prior - q,
    "beta on the prior alone": lambda lik, prior, q, beta: lik + beta * prior - q,
    "joint over the batch": lambda lik, prior, q, beta: (
        (lik + beta * (prior - q)).sum(1, keepdim=True).expand_as(lik)
    ),
    "plate factor inside": lambda lik, prior, q, beta: 4 * (lik + beta * (prior - q)),
    "mean over the batch": lambda lik, prior, q, beta: (
        (lik + beta * (prior - q)).mean(1, keepdim=True).expand_as(lik)
    ),
    "detached from its datum": lambda lik, prior, q, beta: (lik + beta * (prior - q)).roll(1, 1),
}


def test_right_weights_pass():
    check_weights(right_weights)


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_wrong_weights_fail(name):
    with pytest.raises(AssertionError):
        check_weights(lambda particles, beta: WRONG_WEIGHTS[name](*split(particles), beta))


# --- scales -------------------------------------------------------------------------------------


def check_scale(total):
    """``total(particles)`` of N/B times s is N/B times s the plain one, at the same noise."""
    model, x = linear_gaussian(5)
    model.requires_grad_(False)
    guide = guide_near_posterior(model, move=0.5, widen=1.3)
    values = []
    for rows, scale in [(None, 1.0), (20, 1.0), (None, 0.1), (20, 4.0)]:
        model.total = rows
        torch.manual_seed(1)
        both = [poutine.scale(program, scale=scale) for program in (model, guide)]
        values.append(float(total(*both, x)) / (scale * (1 if rows is None else 4)))
    assert values == pytest.approx([values[0]] * 4, rel=1e-6)


def right_total(model, guide, x):
    return -pvae.iwae(20)(model, guide, x)


def scale_inside(model, guide, x):
    particles = pvae.draw(model, guide, x, 20)
    return iw_elbo(particles.scale * particles.log_weights).sum()


def scale_dropped(model, guide, x):
    return iw_elbo(pvae.draw(model, guide, x, 20).log_weights).sum()


def plate_factor_dropped(model, guide, x):
    particles = pvae.draw(model, guide, x, 20)
    return particles.scale / particles.plate_scale * iw_elbo(particles.log_weights).sum()


def test_right_scale_passes():
    check_scale(right_total)


@pytest.mark.parametrize("wrong", [scale_inside, scale_dropped, plate_factor_dropped])
def test_wrong_scale_fails(wrong):
    with pytest.raises(AssertionError):
        check_scale(wrong)


def test_plate_factor_counted_twice_fails(monkeypatch):
    monkeypatch.setattr(objectives, "_relative", lambda scale, plate_scale: scale)
    with pytest.raises(AssertionError):
        check_scale(right_total)


# --- gradients ----------------------------------------------------------------------------------


def check_gradient(pair, bound, gradient, *, beta=1.0):
    assert gradient_bias(pair, bound, gradient, beta=beta) < SE


def wrong(base, surrogate: Callable, **fields) -> object:
    """An estimator of the kind ``base`` with another surrogate, and no check of its own."""
    body = {"surrogate": surrogate, "check": lambda *_: None}
    return type("Wrong", (base,), body)(**fields)


def log_w(terms, beta):
    return terms.log_joint - beta * terms.log_q


def dreg_with_w(self, bound, terms, beta, gate):
    weights = bound.weights(log_w(terms, beta).detach())
    gate.open(torch.ones_like(weights))
    return (weights * (terms.log_joint - beta * terms.held)).sum(0)


def dreg_with_w_squared_for_the_model(self, bound, terms, beta, gate):
    weights = bound.weights(log_w(terms, beta).detach())
    gate.open(torch.ones_like(weights))
    return (weights**2 * (terms.log_joint - beta * terms.held)).sum(0)


def dreg_of_the_iw_elbo(self, bound, terms, beta, gate):
    return doubly_reparameterized.surrogate(iw_elbo, terms, beta, gate)


def dreg_without_beta(self, bound, terms, beta, gate):
    weights = bound.weights(log_w(terms, beta).detach())
    coefficient = 1 - (1 - bound.alpha) * (1 - weights)
    gate.open(coefficient)
    return (weights * (terms.log_joint - beta * coefficient * terms.held)).sum(0)


def dreg_without_gate(self, bound, terms, beta, gate):
    return doubly_reparameterized.surrogate(bound, terms, beta, None)


def held_without_log_q(self, bound, terms, beta, gate):
    return bound(terms.log_joint)


def held_without_its_path(self, bound, terms, beta, gate):
    return bound(terms.log_joint - beta * terms.log_q.detach())


def stick_the_landing_anyway(self, bound, terms, beta, gate):
    return bound(terms.log_joint - beta * terms.held)


def entropy_with_the_wrong_sign(self, bound, terms, beta, gate):
    return bound(terms.log_joint + beta * terms.log_q)


def weights_held(self, bound, terms, beta, gate):
    return (bound.weights(log_w(terms, beta).detach()) * log_w(terms, beta)).mean(0)


def kl_twice(self, bound, terms, beta, gate):
    return bound(terms.log_joint - 2 * beta * terms.log_q)


def with_reward(reward, score=lambda terms: terms.score):
    def surrogate(self, bound, terms, beta, gate):
        value = bound(log_w(terms, beta))
        weights = log_w(terms, beta).detach()
        return value + (reward(bound, value.detach(), weights) * score(terms)).sum(0)

    return surrogate


def leave_one_out(bound, value, weights):
    others = (weights.sum(0) - weights) / (len(weights) - 1)
    rows = [torch.cat([weights[:k], others[[k]], weights[k + 1 :]]) for k in range(len(weights))]
    return value - torch.stack([bound(row) for row in rows])


def own_weight_in_the_baseline(bound, value, weights):
    return (weights - weights.mean(0)) / len(weights)


score_mutants = {
    "score detached": (DiscreteSite, elbo, leave_one_out, lambda t: t.score.detach()),
    "own weight in the baseline": (DiscreteSite, elbo, own_weight_in_the_baseline, None),
    "sum over particles for the mean": (
        DiscreteSite,
        elbo,
        lambda bound, value, w: len(w) * leave_one_out(bound, value, w),
        None,
    ),
    "reward with the wrong sign": (
        DiscreteSite,
        iw_elbo,
        lambda bound, value, w: -leave_one_out(bound, value, w),
        None,
    ),
    "baseline added": (DiscreteSite, iw_elbo, lambda bound, value, w: w - value, None),
    "elbo's reward for the iw-elbo": (
        OneSite,
        iw_elbo,
        lambda bound, value, w: leave_one_out(elbo, value, w) - value + elbo(w),
        None,
    ),
    "score of one particle": (
        DiscreteSite,
        iw_elbo,
        leave_one_out,
        lambda t: torch.cat([t.score[:1], 0 * t.score[1:]]),
    ),
}

GRADIENT_MUTANTS = {
    "DReG with w": (OneSite, iw_elbo, wrong(DoublyReparameterized, dreg_with_w)),
    "DReG with w^2 for the model too": (
        OneSite,
        iw_elbo,
        wrong(DoublyReparameterized, dreg_with_w_squared_for_the_model),
    ),
    "DReG of another bound": (
        OneSite,
        renyi(0.5),
        wrong(DoublyReparameterized, dreg_of_the_iw_elbo),
    ),
    "DReG without its gate": (OneSite, iw_elbo, wrong(DoublyReparameterized, dreg_without_gate)),
    "held log q not subtracted": (OneSite, elbo, wrong(StickTheLanding, held_without_log_q)),
    "held log q without its path": (OneSite, elbo, wrong(StickTheLanding, held_without_its_path)),
    "held log q of the last site alone": (
        TwoSites,
        elbo,
        wrong(StickTheLanding, held_without_its_path),
    ),
    "STL for the iw-elbo": (OneSite, iw_elbo, wrong(StickTheLanding, stick_the_landing_anyway)),
    "STL for renyi": (TwoSites, renyi(0.5), wrong(StickTheLanding, stick_the_landing_anyway)),
    "sign of the entropy": (OneSite, elbo, wrong(Pathwise, entropy_with_the_wrong_sign)),
    "mean over particles of normalised weights": (OneSite, iw_elbo, wrong(Pathwise, weights_held)),
    "KL counted twice": (OneSite, elbo, wrong(Pathwise, kl_twice)),
    **{
        name: (
            pair,
            bound,
            wrong(ScoreFunction, with_reward(reward, score or (lambda terms: terms.score))),
        )
        for name, (pair, bound, reward, score) in score_mutants.items()
    },
}


@pytest.mark.parametrize(
    ("pair", "bound", "gradient"),
    [
        (OneSite, elbo, pathwise),
        (OneSite, elbo, stick_the_landing),
        (TwoSites, elbo, stick_the_landing),
        (OneSite, iw_elbo, doubly_reparameterized),
        (OneSite, renyi(0.5), doubly_reparameterized),
        (DiscreteSite, elbo, score_function),
        (DiscreteSite, iw_elbo, score_function),
        (MixedSites, elbo, mixed),
        (DiscreteSite, iw_elbo, wrong(ScoreFunction, with_reward(leave_one_out))),
    ],
    ids=repr,
)
def test_right_gradients_pass(pair, bound, gradient):
    check_gradient(pair(), bound, gradient)


@pytest.mark.parametrize("name", GRADIENT_MUTANTS)
def test_wrong_gradients_fail(name):
    pair, bound, gradient = GRADIENT_MUTANTS[name]
    with pytest.raises(AssertionError):
        check_gradient(pair(), bound, gradient)


def test_dreg_that_forgets_beta_fails():
    check_gradient(OneSite(), iw_elbo, doubly_reparameterized, beta=0.5)
    with pytest.raises(AssertionError):
        check_gradient(
            OneSite(), iw_elbo, wrong(DoublyReparameterized, dreg_without_beta), beta=0.5
        )


class AllPathsCut(ScoreFunction):
    """Cuts the paths of the continuous sites as well, and gives them no score instead."""

    def draw(self, *args, **options):
        return ScoreFunction().draw(*args, **options)


def test_mixed_without_its_paths_fails():
    with pytest.raises(AssertionError):
        check_gradient(MixedSites(), elbo, AllPathsCut(sites="discrete"))


def test_score_that_is_scaled_fails(monkeypatch):
    """The score of a site that counts half must not be halved."""
    right = objectives.Terms

    def halved(**terms):
        return right(**{**terms, "score": 0.5 * terms["score"]})

    check_gradient(DiscreteSite(), elbo, score_function)
    monkeypatch.setattr(objectives, "Terms", halved)
    with pytest.raises(AssertionError):
        check_gradient(DiscreteSite(), elbo, score_function)


def test_model_weighed_at_other_draws_fails(monkeypatch):
    from pvae.particles import drawing

    right = drawing.replay

    def other_draws(model, batch, values, num_particles, layout):
        moved = {
            n: v + 0.1 if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for n, v in values.items()
        }
        return right(model, batch, moved, num_particles, layout)

    check_gradient(OneSite(), elbo, pathwise)
    monkeypatch.setattr(drawing, "replay", other_draws)
    with pytest.raises(AssertionError):
        check_gradient(OneSite(), elbo, pathwise)


# --- diagnostics --------------------------------------------------------------------------------


def check_khat(khat):
    for shape in (0.2, 0.7):
        torch.manual_seed(7)
        log_weights = -shape * torch.rand(10_000, 40, dtype=torch.float64).log()
        values = khat(log_weights)
        assert values.shape == (40,)
        assert float(values.mean()) == pytest.approx(shape, abs=0.04)


WRONG_KHATS = {
    "negated weights": lambda w: algebra.pareto_k(-w),
    "weights for log weights": lambda w: algebra.pareto_k(w.exp()),
    "joint over the batch": lambda w: algebra.pareto_k(w.sum(1, keepdim=True)).expand(40),
    "normalised over data": lambda w: algebra.pareto_k(w - w.logsumexp(1, keepdim=True)),
    "particles and data exchanged": lambda w: algebra.pareto_k(w[:40].T.contiguous()),
    "half the log weights": lambda w: algebra.pareto_k(w / 2),
}


def test_right_khat_passes():
    check_khat(algebra.pareto_k)


@pytest.mark.parametrize("name", WRONG_KHATS)
def test_wrong_khats_fail(name):
    with pytest.raises(AssertionError):
        check_khat(WRONG_KHATS[name])


def check_stderr(stderr):
    """Lognormal weights, whose coefficient of variation is known."""
    torch.manual_seed(8)
    log_weights = 5.0 + 0.6 * torch.randn(2000, 500, dtype=torch.float64)
    exact = math.sqrt(math.expm1(0.36) / 2000)
    assert float(stderr(log_weights).mean()) == pytest.approx(exact, rel=0.01)


WRONG_STDERRS = {
    "spread of the logs": lambda w: w.std(0) / len(w) ** 0.5,
    "not over sqrt K": lambda w: w.exp().std(0) / w.exp().mean(0),
    "of the weight, not its log": lambda w: w.exp().std(0) / len(w) ** 0.5,
    "over K": lambda w: w.exp().std(0) / w.exp().mean(0) / len(w),
    "1 / sqrt ess": lambda w: algebra.ess(w) ** -0.5,
}


def test_right_stderr_passes():
    check_stderr(algebra.stderr)
    check_stderr(lambda w: w.exp().std(0) / w.exp().mean(0) / len(w) ** 0.5)


@pytest.mark.parametrize("name", WRONG_STDERRS)
def test_wrong_stderrs_fail(name):
    with pytest.raises(AssertionError):
        check_stderr(WRONG_STDERRS[name])


# --- free bits and beta through the objective ---------------------------------------------------


def check_free_bits(free_bits):
    kl = torch.tensor([[0.1, 1.2], [0.3, 0.8]], requires_grad=True)
    assert float(free_bits(kl, 0.5).detach()) == pytest.approx(0.6)
    assert float(free_bits(kl, 0.9).detach()) == pytest.approx(0.9)
    (slope,) = torch.autograd.grad(free_bits(kl, 0.5), kl)
    assert float(slope.sum()) == pytest.approx(1)
    (slope,) = torch.autograd.grad(free_bits(kl, 0.9).sum() + 0 * kl.sum(), kl)
    assert float(slope.abs().sum()) == 0


WRONG_FREE_BITS = {
    "at most for at least": lambda kl, nats: kl.mean().clamp(max=nats),
    "per particle": lambda kl, nats: kl.clamp(min=nats).mean(),
    "of the sum": lambda kl, nats: kl.sum().clamp(min=nats),
    "subtracted": lambda kl, nats: (kl.mean() - nats).clamp(min=0),
    "gradient kept": lambda kl, nats: kl.mean() + (nats - kl.mean()).clamp(min=0).detach(),
}


def test_right_free_bits_pass():
    check_free_bits(schedules.free_bits)


@pytest.mark.parametrize("name", WRONG_FREE_BITS)
def test_wrong_free_bits_fail(name):
    with pytest.raises(AssertionError):
        check_free_bits(WRONG_FREE_BITS[name])


class BetaOnTheReconstruction(pvae.Objective):
    """``beta log p(x|z) + log p(z) - log q``."""

    def _surrogate(self, particles, layout, beta):
        terms = {n: beta * t if n in particles.observed else t for n, t in particles.log_p.items()}
        return super()._surrogate(dataclasses.replace(particles, log_p=terms), layout, 1.0)


class BetaTwice(pvae.Objective):
    """``beta^2`` for beta."""

    def _surrogate(self, particles, layout, beta):
        return super()._surrogate(particles, layout, beta**2)


class BetaForgotten(pvae.Objective):
    """One for beta."""

    def _surrogate(self, particles, layout, beta):
        return super()._surrogate(particles, layout, 1.0)


def test_right_objective_honours_beta():
    assert gradient_bias(OneSite(), elbo, beta=0.5) < SE


@pytest.mark.parametrize("mutant", [BetaOnTheReconstruction, BetaTwice, BetaForgotten])
def test_objectives_that_garble_beta_fail(mutant):
    assert gradient_bias(OneSite(), elbo, beta=0.5, objective=mutant) > SE
