"""Log weights: against brute force, known tails and ArviZ 0.23."""

from __future__ import annotations

import math

import arviz
import numpy as np
import pytest
import torch
from programs import IDENTITY, SE, z_score
from scipy.special import logsumexp

from pvae.log_weights import ess, log_mean_exp, pareto_k, psis, stderr


def normal_log_weights(particles, data, sd=1.0):
    return sd * torch.randn(particles, data, dtype=torch.float64)


def pareto_log_weights(shape, particles, data):
    """``w = u^-shape``: a tail of that index exactly."""
    return -shape * torch.rand(particles, data, dtype=torch.float64).log()


def test_log_mean_exp_is_the_log_of_a_mean():
    log_weights = normal_log_weights(7, 4)
    expected = log_weights.exp().mean(0).log()
    torch.testing.assert_close(log_mean_exp(log_weights), expected, rtol=0, atol=IDENTITY)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_log_mean_exp_survives_what_exp_does_not(offset):
    log_weights = normal_log_weights(7, 4)
    shifted = log_mean_exp(log_weights + offset) - offset
    torch.testing.assert_close(shifted, log_mean_exp(log_weights), rtol=0, atol=1e-8)


def test_weights_of_zero_are_weights():
    log_weights = torch.tensor([[-math.inf, -math.inf], [0.0, -math.inf]], dtype=torch.float64)
    assert log_mean_exp(log_weights).tolist() == [-math.log(2), -math.inf]
    assert float(ess(log_weights)[0]) == pytest.approx(1)


def test_effective_sample_size():
    log_weights = normal_log_weights(50, 6, sd=2.0)
    weights = log_weights.exp()
    expected = weights.sum(0) ** 2 / (weights**2).sum(0)
    torch.testing.assert_close(ess(log_weights), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(ess(log_weights + 1e4), expected, rtol=1e-8, atol=0)
    assert float(ess(torch.zeros(9, 1))) == pytest.approx(9)


def test_stderr_is_the_spread_of_the_estimate():
    """Lognormal weights: log w ~ N(0, s^2), so that the coefficient of variation is known."""
    sd, particles, repeats = 0.6, 400, 4000
    log_weights = normal_log_weights(particles, repeats, sd)
    exact = math.sqrt(math.expm1(sd**2) / particles)
    spread = log_mean_exp(log_weights)
    squared = (spread - spread.mean()) ** 2
    bias_of_delta_method = 0.02 * exact**2
    assert float(z_score(squared, exact**2).max()) < SE + bias_of_delta_method / exact**2
    assert float(stderr(log_weights).mean()) == pytest.approx(exact, rel=0.02)


def test_stderr_is_that_of_a_bootstrap():
    log_weights = normal_log_weights(300, 1, 0.8)
    picks = torch.randint(300, (300, 20_000))
    bootstrapped = log_mean_exp(log_weights[:, 0][picks]).std()
    assert float(stderr(log_weights)) == pytest.approx(float(bootstrapped), rel=0.05)


def test_stderr_of_one_and_of_constant_weights():
    assert stderr(torch.zeros(1, 2)).tolist() == [math.inf, math.inf]
    assert stderr(torch.full((5, 2), -3.0)).tolist() == [0, 0]


@pytest.mark.parametrize("reduction", [log_mean_exp, ess, stderr, pareto_k])
def test_data_do_not_mix(reduction):
    log_weights = normal_log_weights(200, 5, 1.5)
    alone = torch.cat([reduction(log_weights[:, [b]]) for b in range(5)])
    torch.testing.assert_close(reduction(log_weights), alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", [ess, stderr, pareto_k])
def test_evidence_does_not_matter_to_diagnostics(reduction):
    log_weights = normal_log_weights(200, 5, 1.5)
    shifted = reduction(log_weights - 1234.5)
    torch.testing.assert_close(shifted, reduction(log_weights), rtol=1e-7, atol=0)


@pytest.mark.parametrize("particles", [21, 22, 25, 100, 999, 5000])
@pytest.mark.parametrize("sd", [0.1, 1.0, 5.0, 40.0])
def test_psis_equals_arviz(particles, sd):
    log_weights = normal_log_weights(particles, 6, sd)
    smoothed, khat = psis(log_weights)
    theirs, their_khat = arviz.psislw(log_weights.T.numpy())
    np.testing.assert_allclose(khat.numpy(), their_khat, rtol=0, atol=1e-10)
    ours = smoothed.T.numpy()
    ours = ours - logsumexp(ours, axis=-1, keepdims=True)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)


def test_psis_equals_arviz_with_ties_and_weights_of_zero():
    log_weights = normal_log_weights(400, 3, 2.0)
    log_weights[:300, 0] = log_weights[:300, 0].round(decimals=0)
    log_weights[:200, 1] = -900.0
    log_weights[:50, 2] = log_weights[50:100, 2]
    smoothed, khat = psis(log_weights)
    theirs, their_khat = arviz.psislw(log_weights.T.numpy())
    np.testing.assert_allclose(khat.numpy(), their_khat, rtol=0, atol=1e-10)
    ours = smoothed.T.numpy()
    ours = ours - logsumexp(ours, axis=-1, keepdims=True)
    # which of two equal weights gets the larger quantile is a matter of the sort
    np.testing.assert_allclose(np.sort(ours), np.sort(theirs), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.7, 1.0])
def test_khat_finds_known_tails(shape):
    assert float(pareto_k(pareto_log_weights(shape, 10_000, 200)).mean()) == pytest.approx(
        shape, abs=0.04
    )


def test_smoothing_shortens_the_spread_of_heavy_tails():
    log_weights = pareto_log_weights(0.8, 1000, 400)
    smoothed, _ = psis(log_weights)
    assert float(log_mean_exp(smoothed).std()) < 0.9 * float(log_mean_exp(log_weights).std())
    assert bool((smoothed <= log_weights.max(0).values + 1e-12).all())


def test_smoothing_keeps_order_and_small_weights():
    log_weights = pareto_log_weights(0.5, 500, 3)
    smoothed, _ = psis(log_weights)
    for b in range(3):
        order = log_weights[:, b].argsort()
        assert bool((smoothed[order, b].diff() >= 0).all())
        # the tail of 500 weights is the 68 largest: ceil(3 sqrt(500))
        torch.testing.assert_close(smoothed[order[:-68], b], log_weights[order[:-68], b])


def test_constant_weights_have_no_tail():
    assert pareto_k(torch.full((100, 2), -7.5)).tolist() == [-math.inf, -math.inf]
    jitter = 1e-13 * torch.randn(100, 1, dtype=torch.float64)
    assert pareto_k(-7.5 + jitter).tolist() == [-math.inf]


@pytest.mark.parametrize("particles", [1, 2, 5, 15, 20])
def test_too_few_particles_for_a_tail(particles):
    log_weights = normal_log_weights(particles, 2)
    smoothed, khat = psis(log_weights)
    assert khat.tolist() == [math.inf, math.inf]
    torch.testing.assert_close(smoothed, log_weights, rtol=0, atol=IDENTITY)


def test_a_tail_shorter_than_five_weights_is_no_tail():
    log_weights = torch.zeros(100, 1, dtype=torch.float64)
    log_weights[:3] = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    assert pareto_k(log_weights).tolist() == [math.inf]


def test_float32_weights_are_smoothed_in_float64():
    smoothed, khat = psis(torch.randn(100, 2))
    assert smoothed.dtype == khat.dtype == torch.float64
    assert log_mean_exp(torch.randn(3, 2)).dtype == torch.float32
