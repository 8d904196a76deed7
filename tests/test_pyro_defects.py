"""Four faults of Pyro 1.9 that pvae must not have: plates and scales in logs, joint weights.

Where it is cheap, Pyro's own answer is shown to be wrong on the same program: the check would
notice an estimator that makes the same mistake.
"""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from programs import IDENTITY, SE, guide_near_posterior, linear_gaussian
from pyro import poutine
from pyro.infer import RenyiELBO
from pyro.infer.importance import psis_diagnostic, vectorized_importance_weights

import pvae
from pvae.bounds import elbo, iw_elbo, renyi
from pvae.log_weights import log_mean_exp, pareto_k

N, B = 20, 5


@pytest.fixture
def data():
    """A fixed model, all N data, and a guide a little off the posterior."""
    model, x = linear_gaussian(N)
    model.requires_grad_(False)
    return model, guide_near_posterior(model, move=0.7, widen=1.4), x


def summed(objective, model, guide, x, seed=3):
    torch.manual_seed(seed)
    return -objective(model, guide, x).item()


# --- V1: the plate's factor does not enter the logarithm ----------------------------------------


@pytest.mark.parametrize("bound", [elbo, iw_elbo, renyi(0.5)], ids=repr)
def test_subsampled_bound_is_the_plain_one_times_n_over_b(data, bound):
    model, guide, x = data
    objective = pvae.Objective(bound=bound, num_particles=20)
    plain = summed(objective, model, guide, x[:B])
    model.total = N
    assert summed(pvae.Objective(bound=bound, num_particles=20), model, guide, x[:B]) == (
        pytest.approx(N / B * plain, rel=IDENTITY)
    )


def test_subsampled_iw_elbo_approaches_the_evidence_from_below(data):
    model, guide, x = data
    batches = x.reshape(N // B, B, -1)
    evidence = float(model.log_evidence(x).sum())
    model.total = N
    objective = pvae.iwae(5000)
    bounds = [summed(objective, model, guide, batch) for batch in batches]
    mean = sum(bounds) / len(bounds)  # over all batches, so that subsampling adds no noise
    assert mean == pytest.approx(evidence, abs=0.5)
    for batch, bound in zip(batches, bounds, strict=True):
        assert bound == pytest.approx(N / B * float(model.log_evidence(batch).sum()), abs=1.0)
    theirs = RenyiELBO(alpha=0, num_particles=5000, vectorize_particles=True, max_plate_nesting=1)
    wrong = sum(-theirs.loss(model, guide, batch) for batch in batches) / len(batches)
    assert wrong > evidence + 10  # "bound" above the evidence: V1


def test_exact_posterior_gives_the_evidence_of_a_subsample_exactly(data):
    model, _, x = data
    exact = guide_near_posterior(model, move=0.0, widen=1.0)
    model.total = N
    bound = summed(pvae.iwae(7), model, exact, x[:B])
    assert bound == pytest.approx(N / B * float(model.log_evidence(x[:B]).sum()), abs=1e-8)


@pytest.mark.parametrize("bound", [elbo, iw_elbo, renyi(0.5)], ids=repr)
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("total", [None, N])
def test_bound_is_homogeneous_in_scale(data, bound, scale, total):
    model, guide, x = data
    model.total = total
    objective = pvae.Objective(bound=bound, num_particles=30)
    plain = summed(objective, model, guide, x[:B])
    both = [poutine.scale(program, scale=scale) for program in (model, guide)]
    scaled = summed(objective, *both, x[:B])
    assert scaled == pytest.approx(scale * plain, rel=1e-6)


def test_pyro_loses_the_particles_under_a_scale(data):
    """What the test above would catch: by 0.1, Pyro's IWAE hardly gains from its particles."""
    model, guide, x = data
    both = [poutine.scale(program, scale=0.1) for program in (model, guide)]
    theirs = RenyiELBO(alpha=0, num_particles=500, vectorize_particles=True, max_plate_nesting=1)
    torch.manual_seed(3)
    wrong = -theirs.loss(*both, x)
    right = summed(pvae.iwae(500), *both, x)
    assert abs(wrong - right) > 0.1


# --- V2 and V3: weights per datum ---------------------------------------------------------------


def test_weights_are_per_datum_and_never_joint(data):
    model, guide, x = data
    log_weights = pvae.draw(model, guide, x, 1000).log_weights
    assert log_weights.shape == (1000, N)
    per_datum = float(log_mean_exp(log_weights).sum())
    joint = float(log_mean_exp(log_weights.sum(1, keepdim=True)))
    evidence = float(model.log_evidence(x).sum())
    assert per_datum == pytest.approx(evidence, abs=1.0)
    assert joint < evidence - 3
    torch.manual_seed(3)
    theirs, _, _ = vectorized_importance_weights(
        model, guide, x, num_samples=1000, max_plate_nesting=1
    )
    assert theirs.shape == (1000,)  # V3: one weight for all data
    assert float(log_mean_exp(theirs[:, None])) < evidence - 3


def test_a_datum_does_not_feel_its_neighbours(data):
    """The mean weight of datum 0 is the same whatever stands beside it."""
    model, guide, x = data
    far = x.clone()
    far[1:] += 50.0
    torch.manual_seed(3)
    beside_near = pvae.draw(model, guide, x, 100).log_weights[:, 0]
    torch.manual_seed(3)
    beside_far = pvae.draw(model, guide, far, 100).log_weights[:, 0]
    assert torch.equal(beside_near, beside_far)


def test_estimate_has_the_standard_error_it_claims(data):
    model, guide, x = data
    log_weights = pvae.draw(model, guide, x, 20_000).log_weights
    error = log_mean_exp(log_weights) - model.log_evidence(x)
    z = error.abs() / pvae.evidence.importance(model, guide, x, 20_000).stderr
    assert float(z.max()) < SE


# --- V4: k-hat per datum ------------------------------------------------------------------------


def test_khat_is_per_datum(data):
    model, guide, x = data
    log_weights = pvae.draw(model, guide, x, 1000).log_weights
    khat = pareto_k(log_weights)
    assert khat.shape == (N,)
    assert float(khat.max()) < 0.7
    joint = psis_diagnostic(model, guide, x, num_particles=1000, max_plate_nesting=1)
    assert joint > 0.7  # V4: Pyro weighs all data as one


def test_khat_singles_out_the_datum_that_is_badly_guided(data):
    model, guide, x = data

    def one_bad(x):
        posterior = model.posterior(x)
        narrow = torch.ones(len(x), 1, 1, dtype=torch.float64)
        narrow[2] = 0.4
        with model.plate(x):
            pyro.sample(
                "z",
                pyro.distributions.MultivariateNormal(
                    posterior.mean, scale_tril=narrow * posterior.scale_tril
                ),
            )

    khat = pareto_k(pvae.draw(model, one_bad, x, 2000).log_weights)
    assert float(khat[2]) > 0.7
    others = torch.cat([khat[:2], khat[3:]])
    assert bool((others == -math.inf).all())
