"""A fitted prior: what is fitted, the evidence of the new model, and what is refused."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import IDENTITY, SE, AffineGuide, ExactGuide, Mixture, linear_gaussian

import pvae
from pvae.data import load
from pvae.errors import OptionError, ProgramError
from pvae.evidence import importance
from pvae.guides.gaussian import Gaussian
from pvae.latent_density import LatentDensity, fit_latent_density, with_prior
from pvae.models.vae import VAE


@pytest.fixture(scope="module")
def shifted():
    """A float64 pair whose data were made by ``z ~ N((2, -1), 0.5^2)``: train and test."""
    torch.manual_seed(1)
    model, _ = linear_gaussian()
    z = torch.tensor([2.0, -1.0]) + 0.5 * torch.randn(3000, 2, dtype=torch.float64)
    with torch.no_grad():
        x = z @ model.weight.T + model.offset
        x = x + model.log_noise.exp() * torch.randn_like(x)
    return model, ExactGuide(model), x[:2500], x[2500:]


@pytest.fixture(scope="module")
def fitted(shifted):
    model, guide, train, _ = shifted
    return fit_latent_density(model, guide, train, n_components=1)


def by_hand(distribution):
    return LatentDensity(None, None, "z", (2,), "mixture", lambda device: distribution, {})


def gain(model, guide, density, x, num_particles=50):
    """Mean paired gain of evidence, and how many of its own standard errors it is."""
    new = importance(with_prior(model, density), guide, x, num_particles).log_evidence
    difference = new - importance(model, guide, x, num_particles).log_evidence
    return float(difference.mean()), float(
        difference.mean() / (difference.std() / math.sqrt(len(difference)))
    )


def test_the_mixture_of_one_is_the_aggregate_posterior(shifted, fitted):
    """Mean and covariance of the aggregate: those of the means, plus the posterior's own."""
    model, _, train, _ = shifted
    kept = torch.arange(len(train)) % 10 != 9
    with torch.no_grad():
        posterior = model.posterior(train[kept])
        aggregate = torch.cov(posterior.mean.T, correction=0) + posterior.covariance_matrix[0]
    component = fitted.build(torch.device("cpu")).component_distribution
    size = 4 * int(kept.sum())
    error = (component.mean[0] - posterior.mean.mean(0)).abs()
    assert float((error / (aggregate.diagonal() / size).sqrt()).max()) < SE
    spread = component.covariance_matrix[0] / aggregate - 1
    assert float(spread.diagonal().abs().max()) < SE * math.sqrt(2 / size)
    means_alone = torch.cov(posterior.mean.T, correction=0) / aggregate - 1
    assert float(means_alone.diagonal().abs().max()) > SE * math.sqrt(2 / size)


def test_the_evidence_is_that_of_the_new_model(shifted, fitted):
    model, guide, _, test = shifted
    component = fitted.build(torch.device("cpu")).component_distribution
    with torch.no_grad():
        noise = (2 * model.log_noise).exp() * torch.eye(5).double()
        covariance = model.weight @ component.covariance_matrix[0] @ model.weight.T + noise
        loc = component.mean[0] @ model.weight.T + model.offset
    exact = dist.MultivariateNormal(loc, covariance).log_prob(test)
    found = importance(with_prior(model, fitted), guide, test, 500)
    off = (found.log_evidence - exact) / found.stderr
    assert float(off.abs().max()) < SE + 1  # 500 data
    assert float((found.log_evidence - model.log_evidence(test).detach()).abs().max()) > 0.5


def test_the_models_own_prior_put_back_changes_nothing(shifted):
    model, guide, _, test = shifted
    own = dist.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    found = importance(with_prior(model, by_hand(own)), guide, test[:50], 7).log_evidence
    expected = importance(model, guide, test[:50], 7).log_evidence
    torch.testing.assert_close(found, expected, atol=IDENTITY, rtol=0)


@pytest.mark.parametrize("kind", ["mixture", "flow"])
def test_held_out_evidence_rises(shifted, kind):
    model, guide, train, test = shifted
    flow = {"max_epochs": 2, "hidden": (16,), "transforms": 1, "num_draws": 1, "lr": 1e-2}
    options = flow if kind == "flow" else {"n_components": (1, 3)}
    density = fit_latent_density(model, guide, train, kind=kind, **options)
    nats, errors = gain(model, guide, density, test)
    assert nats > 0.5
    assert errors > SE
    # A prior in the wrong place is seen to be worse.
    far = dist.MultivariateNormal(torch.tensor([-2.0, 1.0]).double(), torch.eye(2).double())
    assert gain(model, guide, by_hand(far), test)[1] < -SE


@pytest.mark.parametrize("kind", ["mixture", "flow"])
def test_staged_programs_give_the_same(shifted, kind):
    """The evidence of the new model, and two epochs of training with the fitted prior held."""
    model, guide, train, test = shifted
    flow = {"max_epochs": 1, "hidden": (8,), "transforms": 1}
    options = flow if kind == "flow" else {"n_components": 2}
    density = fit_latent_density(model, guide, train[:200], kind=kind, num_draws=1, **options)
    eager, staged = (
        importance(with_prior(model, density), guide, test[:40], 8, engine=engine).log_evidence
        for engine in ("eager", "staged")
    )
    torch.testing.assert_close(eager, staged, atol=IDENTITY, rtol=0)
    bounds = []
    for engine in ("eager", "staged"):
        again, _ = linear_gaussian()
        run = pvae.fit(
            with_prior(again, density), AffineGuide().double(), train[:200], epochs=2,
            batch_size=50, engine=engine, progress=False,
        )  # fmt: skip
        bounds.append([row["bound"] for row in run.history])
    assert bounds[0] == pytest.approx(bounds[1], abs=1e-6)


def test_held_out_evidence_of_digits_rises():
    data = load("digits", binarize="threshold")
    torch.manual_seed(0)
    model = VAE(64, z_dim=4, hidden=(64,))
    guide = Gaussian(64, model.latents, hidden=(64,))
    pvae.fit(model, guide, data.train, epochs=10, batch_size=128, lr=5e-3, engine="staged")
    density = fit_latent_density(model, guide, data.train, n_components=10, num_draws=2)
    nats, errors = gain(model, guide, density, data.test)
    assert nats > 0
    assert errors > SE
    drawn = density.sample(300, seed=1)
    assert drawn.shape == (300, 64)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("kind", ["mixture", "flow"])
def test_samples_are_of_the_density(shifted, fitted, kind):
    model, guide, train, _ = shifted
    density = fitted
    if kind == "flow":
        density = fit_latent_density(
            model, guide, train[:300], kind=kind, max_epochs=2, hidden=(16,), transforms=2
        )
    draws = density.sample_latents(40_000, seed=3)
    assert torch.equal(draws[:5], density.sample_latents(40_000, seed=3)[:5])
    # E exp(log N - log r) over draws of r is one for any normalised N with lighter tails.
    narrow = dist.MultivariateNormal(draws.mean(0), 0.5 * torch.cov(draws.T))
    ratio = (narrow.log_prob(draws) - density.log_prob(draws)).exp()
    assert abs(float(ratio.mean()) - 1) < SE * float(ratio.std()) / 200
    data = density.sample(5000, seed=3, like=train[:1])
    with torch.no_grad():
        mean = draws.mean(0) @ model.weight.T + model.offset
    off = (data.mean(0) - mean).abs() / (data.std(0) / math.sqrt(5000))
    assert float(off.max()) < SE + 0.5  # the mean of 40,000 draws is itself a little off


def test_one_site_of_several_is_replaced():
    """``a ~ N(0, 1)``, ``b | a ~ N(a, 1)``: with another prior of a, b still follows from it."""

    def model(x=None, size=1):
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(a.sum(-1), 1.0))
            return pyro.sample("x", dist.Normal(b, 0.1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("b", dist.Normal(x, 0.1))
            a = (x / 4).unsqueeze(-1).expand(*x.shape, 3)
            pyro.sample("a", dist.Normal(a, 0.8).to_event(1))

    x = 12 + torch.randn(400, dtype=torch.float64)
    with pytest.raises(ProgramError, match="latent sites a, b: say which one"):
        fit_latent_density(model, guide, x)
    density = fit_latent_density(model, guide, x, site="a", n_components=1)
    assert density.event_shape == (3,)
    assert gain(model, guide, density, x)[1] > SE
    scalar = fit_latent_density(model, guide, x, site="b", n_components=1)
    assert scalar.event_shape == ()
    assert gain(model, guide, scalar, x)[1] > SE
    drawn = density.sample(1000)
    assert abs(float(drawn.mean()) - 9) < 1  # three means of x / 4


def positive(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Gamma(torch.ones(2), 1.0).to_event(1))
        pyro.sample("x", dist.Poisson(z).to_event(1), obs=x)


def positive_guide(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Gamma(1 + x, 1.0).to_event(1))


def test_latents_that_are_not_real_are_refused():
    x = torch.ones(30, 2)
    with pytest.raises(ProgramError, match="does not take all real values"):
        fit_latent_density(positive, positive_guide, x)
    mixture = Mixture()
    with pytest.raises(ProgramError, match="does not take all real values"):
        fit_latent_density(mixture, mixture.posterior_guide, torch.randn(30, 3))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "gan"}, OptionError, "no latent density is called 'gan'"),
        ({"num_draws": 0}, OptionError, "must be at least 1 and lr positive, got 0"),
        ({"site": "y"}, ProgramError, "no latent site is called 'y'"),
        ({"n_components": 0}, OptionError, "whole number of at least 1"),
    ],
)
def test_wrong_options_get_one_sentence(shifted, options, error, message):
    model, guide, train, _ = shifted
    with pytest.raises(error, match=message):
        fit_latent_density(model, guide, train[:40], **options)


def test_wrong_data_get_one_sentence(shifted, fitted):
    model, guide, train, _ = shifted
    with pytest.raises(OptionError, match="needs at least 20 data, got 5"):
        fit_latent_density(model, guide, train[:5])
    with pytest.raises(OptionError, match="n must be at least 1"):
        fitted.sample(0, like=train[:1])
    with pytest.raises(OptionError, match="like must have one row or 3"):
        fitted.sample(3, like=train[:2])
    with pytest.raises(ProgramError, match="does not generate"):
        fitted.sample(3)
    other = VAE(5, z_dim=3, hidden=(4,), likelihood="gaussian")
    guide = Gaussian(5, other.latents, hidden=(4,))
    with pytest.raises(ProgramError, match=r"shape \(3,\), the density is one of \(2,\)"):
        importance(with_prior(other, fitted), guide, train[:3].float(), 3)
