"""Particle filters against the Kalman filter, and against themselves without resampling."""

from __future__ import annotations

import pytest
import torch
from linear_chains import FEATURES, STEPS, kalman, linear_model

import pvae
from pvae.evidence import filtering
from pvae.evidence.smc import ancestors, group_means
from pvae.guides.forward_backward import ForwardBackward
from pvae.models.vae import VAE


def setting(size: int = 3):
    model = linear_model()
    x = model(size=size).detach()
    return model, x, kalman(model, x.reshape(size, STEPS, FEATURES))


def trained_guide(model, x):
    torch.manual_seed(3)
    guide = ForwardBackward(model, hidden=16).double()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    pvae.fit(model, guide, x, epochs=30, batch_size=32, lr=1e-2, engine="eager", progress=False)
    return guide


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_bootstrap_filter_is_unbiased_for_the_evidence(threshold):
    model, x, truth = setting()
    groups, size = 4000, 8
    torch.manual_seed(5)
    with torch.no_grad():
        weights = filtering._filter(model, None, x, groups * size, size, threshold)
    ratio = (group_means(weights, size) - truth).exp()
    error = ratio.std(0) / groups**0.5
    assert ((ratio.mean(0) - 1).abs() < 4.5 * error).all()
    assert (error < 0.1).all()


def test_a_filter_that_forgets_to_average_is_caught(monkeypatch):
    """Resampling that keeps the largest weight instead of the mean one is biased."""

    def planted(log_weights, size, threshold):
        after, index = ancestors(log_weights, size, threshold)
        return after + 0.05 * (after != log_weights), index

    monkeypatch.setattr(filtering, "ancestors", planted)
    model, x, truth = setting()
    groups, size = 4000, 8
    torch.manual_seed(5)
    with torch.no_grad():
        weights = filtering._filter(model, None, x, groups * size, size, 0.5)
    ratio = (group_means(weights, size) - truth).exp()
    error = ratio.std(0) / groups**0.5
    assert ((ratio.mean(0) - 1).abs() > 4.5 * error).any()


def test_guided_filter_gives_the_evidence_and_the_bounds_are_in_order():
    model = linear_model()
    x = model(size=64).detach()
    truth = kalman(model, x.reshape(-1, STEPS, FEATURES))
    guide = trained_guide(model, x)
    found = pvae.evidence.filtered(model, guide, x, num_particles=400, num_groups=50)
    error = (found.stderr.square().sum().sqrt() / len(x)).item()
    assert abs(found.mean - float(truth.mean())) < 4.5 * error
    together = pvae.evidence.filtered(
        model, guide, x, num_particles=400, num_groups=50, ess_threshold=0.0
    )
    elbo = pvae.evidence.importance(model, guide, x, 400).elbo.mean()
    assert elbo < together.elbo.mean() < found.elbo.mean() + 0.02
    assert found.elbo.mean() < truth.mean()


def test_filter_beats_importance_sampling_where_the_guide_knows_nothing():
    model, x, truth = setting(16)
    options = {"num_particles": 160, "num_groups": 20}
    filter_bound = pvae.evidence.filtered(model, None, x, **options).elbo
    importance_bound = pvae.evidence.filtered(model, None, x, ess_threshold=0.0, **options).elbo
    assert importance_bound.mean() < filter_bound.mean() < truth.mean()


def test_the_last_weights_are_diagnosed_and_not_resampled_away():
    """A spike of an observation at the end, which one particle in many explains."""
    model, x, _ = setting(4)
    steps = x.reshape(4, STEPS, FEATURES).clone()
    lengths = torch.tensor([5, 3, 1, 4])
    for row, length in zip(steps, lengths, strict=True):
        row[length - 1] = 8.0
    found = pvae.evidence.filtered(model, None, (steps, lengths), num_particles=400, num_groups=4)
    assert bool((found.ess < 100).all())
    assert bool((found.pareto_k > 0.5).all())


def test_padding_never_changes_a_filter():
    model, x, _ = setting(4)
    steps = x.reshape(4, STEPS, FEATURES).clone()
    lengths = torch.tensor([5, 3, 1, 4])
    first = pvae.evidence.filtered(model, None, (steps, lengths), num_particles=200)
    for row, length in zip(steps, lengths, strict=True):
        row[length:] = 100.0
    second = pvae.evidence.filtered(model, None, (steps, lengths), num_particles=200)
    assert torch.equal(first.log_evidence, second.log_evidence)
    truth = kalman(model, steps, lengths)
    assert ((first.log_evidence - truth).abs() < 6 * first.stderr + 0.1).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_particles": 10, "num_groups": 3}, "multiple of num_groups"),
        ({"ess_threshold": 2.0}, "between 0 and 1"),
    ],
)
def test_wrong_options_are_one_sentence(options, match):
    model, x, _ = setting()
    with pytest.raises(pvae.PvaeError, match=match):
        pvae.evidence.filtered(model, None, x, **options)


def test_models_and_guides_without_time_are_refused():
    model, x, _ = setting()
    with pytest.raises(pvae.PvaeError, match="no state-space model"):
        pvae.evidence.filtered(VAE(15), None, x)
    guide = ForwardBackward(model, hidden=4, structured=False).double()
    with pytest.raises(pvae.PvaeError, match="given the one before"):
        pvae.evidence.filtered(model, guide, x)
