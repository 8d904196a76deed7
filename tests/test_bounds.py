"""Bounds: their algebra, their order, and known answers."""

from __future__ import annotations

import math

import pytest
import torch
from programs import (
    IDENTITY,
    SE,
    OneSite,
    exact_bound,
    guide_near_posterior,
    linear_gaussian,
    z_score,
)

import pvae
from pvae.bounds import RenyiBound, cubo, elbo, iw_elbo, renyi
from pvae.errors import OptionError


@pytest.fixture
def log_weights():
    return torch.randn(9, 4, dtype=torch.float64)


def test_every_bound_is_written_out(log_weights):
    weights = log_weights.exp()
    for bound, expected in [
        (elbo, log_weights.mean(0)),
        (iw_elbo, weights.mean(0).log()),
        (renyi(0.5), 2 * weights.sqrt().mean(0).log()),
        (renyi(2.0), -(1 / weights).mean(0).log()),
        (cubo(2), 0.5 * (weights**2).mean(0).log()),
    ]:
        torch.testing.assert_close(bound(log_weights), expected, rtol=0, atol=IDENTITY)


def test_one_particle_has_one_bound(log_weights):
    for bound in (elbo, iw_elbo, renyi(0.3), cubo(3)):
        one = log_weights[:1]
        torch.testing.assert_close(bound(one), one[0], rtol=0, atol=IDENTITY)


def test_elbo_and_iw_elbo_are_members_of_the_family(log_weights):
    assert renyi(1) == elbo
    assert renyi(0) == iw_elbo
    near = renyi(1 - 1e-6)(log_weights)
    torch.testing.assert_close(near, elbo(log_weights), rtol=0, atol=1e-5)


def test_bounds_fall_with_alpha(log_weights):
    values = [renyi(a)(log_weights) for a in (-2, -1, 0, 0.5, 0.9, 1, 2, 5)]
    for larger, smaller in zip(values, values[1:], strict=False):
        assert bool((larger >= smaller - 1e-12).all())


def test_bounds_shift_with_the_evidence(log_weights):
    for bound in (elbo, iw_elbo, renyi(0.5), cubo(2)):
        shifted = bound(log_weights + 1e3) - 1e3
        torch.testing.assert_close(shifted, bound(log_weights), rtol=0, atol=IDENTITY * 1e3)


@pytest.mark.parametrize("bound", [elbo, iw_elbo, renyi(0.5), cubo(2)], ids=repr)
def test_weights_are_the_derivative(log_weights, bound):
    log_weights.requires_grad_()
    (gradient,) = torch.autograd.grad(bound(log_weights).sum(), log_weights)
    torch.testing.assert_close(bound.weights(log_weights.detach()), gradient, rtol=0, atol=1e-10)


def test_iw_elbo_rises_with_particles_to_the_evidence():
    model, x = linear_gaussian(50)
    model.requires_grad_(False)
    guide = guide_near_posterior(model, move=0.5, widen=1.4)
    evidence = model.log_evidence(x)
    pool = pvae.draw(model, guide, x, 64 * 40).log_weights
    gaps = []
    for k in (1, 4, 16, 64):
        chunks = pool.reshape(k, -1, 50)
        gap = (evidence - torch.logsumexp(chunks, 0) + math.log(k)).mean(1)
        gaps.append((float(gap.mean()), float(gap.std()) / len(gap) ** 0.5))
    for (gap, error), (next_gap, next_error) in zip(gaps, gaps[1:], strict=False):
        assert gap - next_gap > -SE * math.hypot(error, next_error)
    assert all(gap > -SE * error for gap, error in gaps)
    assert gaps[0][0] > 10 * abs(gaps[-1][0])


def test_elbo_gap_is_the_kl_to_the_posterior():
    model, x = linear_gaussian(20)
    model.requires_grad_(False)
    move, widen = 0.3, 1.3
    guide = guide_near_posterior(model, move=move, widen=widen)
    posterior = model.posterior(x)
    wide = torch.distributions.MultivariateNormal(
        posterior.mean + move * posterior.variance.sqrt(), scale_tril=widen * posterior.scale_tril
    )
    gap = torch.distributions.kl_divergence(wide, posterior)
    log_weights = pvae.draw(model, guide, x, 20_000).log_weights
    assert float(z_score(log_weights, model.log_evidence(x) - gap).max()) < SE


@pytest.mark.parametrize("bound", [elbo, iw_elbo, renyi(0.5), renyi(2.0)], ids=repr)
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_expected_bound_by_quadrature(bound, beta):
    pair = OneSite()
    scalars = {n: v.detach() for n, v in pair.scalars().items()}
    truth = exact_bound(pair.nodes(scalars), bound, pair.num_particles, beta=beta)
    model, guide, x = pair.programs(60_000)
    objective = pvae.Objective(bound=bound, num_particles=pair.num_particles, beta=beta)
    layout = objective.prepare(model, guide, x)
    values = objective.evaluate(model, guide, x, layout=layout, beta=beta).bound
    assert float(z_score(values, truth)) < SE


def test_cubo_lies_above_the_evidence():
    model, x = linear_gaussian(10)
    model.requires_grad_(False)
    guide = guide_near_posterior(model, move=0.3, widen=1.3)
    log_weights = pvae.draw(model, guide, x, 20_000).log_weights
    assert bool((cubo(2)(log_weights) > model.log_evidence(x)).all())


def test_properties_and_names():
    assert [b.additive for b in (elbo, iw_elbo, renyi(0.5))] == [True, False, False]
    assert [b.is_upper for b in (elbo, iw_elbo, cubo(2))] == [False, False, True]
    assert [repr(b) for b in (elbo, iw_elbo, renyi(0.5), cubo(2))] == [
        "elbo",
        "iw_elbo",
        "renyi(0.5)",
        "renyi(-1)",
    ]
    assert RenyiBound(0.5) == renyi(0.5)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf])
def test_orders_that_are_no_numbers_are_refused(alpha):
    with pytest.raises(OptionError, match="finite order, got alpha="):
        renyi(alpha)


@pytest.mark.parametrize("n", [1, 0.5, -2, math.nan, math.inf])
def test_cubo_of_low_order_is_no_upper_bound(n):
    with pytest.raises(OptionError, match=r"n > 1 only, got n="):
        cubo(n)
