"""Every gradient estimator against the exact gradient of the bound it claims to follow."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import (
    IDENTITY,
    SE,
    AffineGuide,
    DiscreteSite,
    ExactGuide,
    MixedSites,
    OneSite,
    TwoSites,
    exact_bound,
    exact_gradient,
    gradient_bias,
    gradient_samples,
    linear_gaussian,
    z_score,
)
from pyro import poutine
from torch import nn

import pvae
from pvae.bounds import elbo, iw_elbo, renyi
from pvae.gradients import (
    Resampled,
    ScoreFunction,
    doubly_reparameterized,
    mixed,
    pathwise,
    resampled,
    score_function,
    stick_the_landing,
)
from pvae.gradients.scores import _leave_one_out

BOUNDS = [elbo, iw_elbo, renyi(0.5)]
PATHWISE = [pathwise, stick_the_landing, doubly_reparameterized]


def sound(bound, gradient):
    return gradient is not stick_the_landing or bound is elbo


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize(
    ("bound", "gradient"),
    [p for p in itertools.product(BOUNDS, [*PATHWISE, score_function]) if sound(*p)],
    ids=repr,
)
@pytest.mark.parametrize("pair", [OneSite(), TwoSites()], ids=lambda p: type(p).__name__)
def test_unbiased_on_continuous_sites(pair, bound, gradient, beta):
    assert gradient_bias(pair, bound, gradient, beta=beta) < SE


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("gradient", [score_function, mixed], ids=repr)
@pytest.mark.parametrize("bound", BOUNDS, ids=repr)
@pytest.mark.parametrize("pair", [DiscreteSite(), MixedSites()], ids=lambda p: type(p).__name__)
def test_unbiased_on_discrete_sites(pair, bound, gradient, beta):
    assert gradient_bias(pair, bound, gradient, beta=beta) < SE


@pytest.mark.parametrize(
    ("subsample", "scale"), [(True, 1.0), (False, 0.1), (True, 4.0)], ids=["N/B", "scale", "both"]
)
@pytest.mark.parametrize(
    ("bound", "gradient"),
    [
        (elbo, pathwise),
        (elbo, stick_the_landing),
        (elbo, score_function),
        (iw_elbo, pathwise),
        (iw_elbo, doubly_reparameterized),
        (iw_elbo, score_function),
        (iw_elbo, resampled(2)),
        (iw_elbo, resampled(1, doubly=False)),
    ],
    ids=repr,
)
def test_plate_and_scale_multiply_the_gradient(bound, gradient, subsample, scale):
    assert gradient_bias(OneSite(), bound, gradient, subsample=subsample, scale=scale) < SE


class HalfCounted(DiscreteSite):
    """Its latent site counts half in model and guide: the ELBO with beta = 0.5."""

    def model(self, p, x):
        with poutine.scale(scale=0.5):
            c = pyro.sample("c", dist.Bernoulli(logits=p.r))
        pyro.sample("x", dist.Normal(p.w * c, 0.8), obs=x)

    def guide(self, p, x):
        with poutine.scale(scale=0.5):
            pyro.sample("c", dist.Bernoulli(logits=p.u))


@pytest.mark.parametrize("gradient", [score_function, mixed], ids=repr)
def test_scale_of_a_latent_site_does_not_enter_its_score(gradient):
    pair, size = HalfCounted(), 60_000
    truth = exact_gradient(DiscreteSite(), elbo, beta=0.5)
    objective = pvae.Objective(gradient=gradient, num_particles=3)
    samples = gradient_samples(pair, objective, size=size)
    assert max(float(z_score(samples[name], truth[name])) for name in truth) < SE


def test_quadrature_has_converged():
    fine = exact_gradient(TwoSites(), iw_elbo)
    pair, scalars = TwoSites(), TwoSites().scalars()
    pair.order = 14
    value = exact_bound(pair.nodes(scalars), iw_elbo, 2)
    coarse = torch.autograd.grad(value, list(scalars.values()))
    assert max(float((a - b).abs()) for a, b in zip(fine.values(), coarse, strict=True)) < 1e-5


def guide_gradient(objective, size=6):
    """The guide's gradient with the exact posterior as guide, its parameters apart."""
    model, x = linear_gaussian(size)
    posterior = model.posterior(x)
    loc = nn.Parameter(posterior.mean.detach().clone())
    tril = nn.Parameter(posterior.scale_tril.detach().clone())

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))

    layout = objective.prepare(model, guide, x)
    objective.evaluate(model, guide, x, layout=layout).loss.backward()
    return max(float(loc.grad.abs().max()), float(tril.grad.abs().max()))


@pytest.mark.parametrize(
    "objective",
    [
        pvae.stl(),
        pvae.stl(7),
        pvae.dreg(7),
        pvae.dreg(1),
        pvae.Objective(bound=renyi(0.5), gradient=doubly_reparameterized, num_particles=7),
        pvae.dreg(7, vectorize=False),
    ],
    ids=repr,
)
def test_path_derivatives_vanish_at_the_posterior_for_every_draw(objective):
    assert guide_gradient(objective) < IDENTITY


@pytest.mark.parametrize("objective", [pvae.vae(7), pvae.iwae(7)], ids=["vae", "iwae"])
def test_pathwise_gradient_is_noisy_at_the_posterior(objective):
    assert guide_gradient(objective) > 1e-3


@pytest.mark.parametrize("bound", BOUNDS, ids=repr)
def test_stick_the_landing_is_dreg_of_the_elbo_and_one_particle_has_one_bound(bound):
    pair = TwoSites()
    reference = pvae.stl(1)
    objective = pvae.Objective(bound=bound, gradient=doubly_reparameterized, num_particles=1)
    ours = gradient_samples(pair, objective, size=50)
    theirs = gradient_samples(pair, reference, size=50)
    assert all(torch.allclose(ours[n], theirs[n], rtol=0, atol=IDENTITY) for n in ours)


@pytest.mark.parametrize("objective", [pvae.dreg, pvae.iwae], ids=["dreg", "iwae"])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_one_by_one_gives_the_gradient_of_all_at_once(objective, num_particles):
    model, x = linear_gaussian(8)  # 8 x 2 numbers: torch fills in sixteens
    gradients = []
    for vectorize in (True, False):
        guide = AffineGuide().double()
        built = objective(num_particles, vectorize=vectorize)
        layout = built.prepare(model, guide, x)
        torch.manual_seed(3)
        model.zero_grad()
        built.evaluate(model, guide, x, layout=layout).loss.backward()
        gradients.append([p.grad.clone() for p in [*guide.parameters(), *model.parameters()]])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=IDENTITY)


def spread(pair, names, **options):
    samples = gradient_samples(
        pair, pvae.Objective(num_particles=pair.num_particles, **options), size=20_000
    )
    return sum(float(samples[name].var()) for name in names)


@pytest.mark.parametrize("pair", [OneSite(), TwoSites()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("bound", [iw_elbo, renyi(0.5)], ids=repr)
def test_dreg_is_quieter_than_pathwise(pair, bound):
    names = pair.guide_values
    quiet = spread(pair, names, bound=bound, gradient=doubly_reparameterized)
    assert quiet < 0.8 * spread(pair, names, bound=bound, gradient=pathwise)


@pytest.mark.parametrize("doubly", [False, True])
@pytest.mark.parametrize(
    ("pair", "kept"), [(OneSite(), 1), (OneSite(), 2), (TwoSites(), 1)], ids=lambda p: repr(p)[:9]
)
def test_resampled_gradients_are_unbiased(pair, kept, doubly):
    assert gradient_bias(pair, iw_elbo, resampled(kept, doubly=doubly)) < SE


@pytest.mark.parametrize(
    "weights",
    [
        lambda log_weights: torch.zeros_like(log_weights),  # any particle as well as another
        lambda log_weights: 2 * log_weights,
    ],
)
def test_particles_drawn_by_other_weights_are_caught(weights, monkeypatch):
    chosen = Resampled._choose
    monkeypatch.setattr(Resampled, "_choose", lambda self, w: chosen(self, weights(w)))
    assert gradient_bias(OneSite(), iw_elbo, resampled()) > 2 * SE


@pytest.mark.parametrize("kept", [1, 3, 8])
def test_kept_particles_are_drawn_systematically(kept):
    """Particle k is kept ``n v_k`` times, up to one, and that often on average."""
    torch.manual_seed(0)
    log_weights = torch.randn(8, 1, dtype=torch.float64).expand(8, 40_000)
    index = resampled(kept)._choose(log_weights)
    times = torch.nn.functional.one_hot(index, 8).sum(0).double()  # (B, K)
    wanted = kept * log_weights[:, 0].softmax(0)
    assert ((times - wanted).abs() < 1).all()
    error = (wanted % 1 * (1 - wanted % 1) / len(times)).sqrt()
    assert ((times.mean(0) - wanted).abs() <= SE * error + 1e-12).all()


def test_resampling_adds_noise_and_more_particles_or_dreg_take_it_off():
    names = OneSite().guide_values
    full = spread(OneSite(), names, bound=iw_elbo, gradient=pathwise)
    plain = {kept: resampled(kept, doubly=False) for kept in (1, 2)}
    one = spread(OneSite(), names, bound=iw_elbo, gradient=plain[1])
    two = spread(OneSite(), names, bound=iw_elbo, gradient=plain[2])
    doubly = spread(OneSite(), names, bound=iw_elbo, gradient=resampled(1))
    assert full < two < one
    assert doubly < 0.8 * one


def test_a_doubly_resampled_gradient_vanishes_at_the_posterior():
    assert guide_gradient(pvae.recipes.resampled_iwae(2, num_particles=7)) < IDENTITY


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: resampled(0), "at least 1"),
        (lambda: pvae.Objective(gradient=resampled(), num_particles=4), "bound=iw_elbo"),
        (lambda: pvae.recipes.resampled_iwae(4, num_particles=4), "fewer particles"),
        (lambda: pvae.recipes.resampled_iwae(beta=0.5), "leave beta"),
        (lambda: pvae.recipes.resampled_iwae(free_bits=0.5), "bound=elbo"),
    ],
)
def test_what_cannot_be_resampled_is_refused(build, match):
    with pytest.raises(pvae.PvaeError, match=match):
        build()


@pytest.mark.parametrize(
    ("layer", "options", "match"),
    [
        (nn.Dropout(0.1), {}, "Dropout.*would differ"),
        (nn.BatchNorm1d(3), {}, "BatchNorm1d.*would differ"),
        (nn.Dropout(0.0), {"vectorize": False}, "vectorize=False"),
        (nn.Dropout(0.0), {}, None),
    ],
)
def test_a_model_that_is_run_twice_is_the_same_both_times(layer, options, match):
    model, x = linear_gaussian(8)
    model.layer = layer
    objective = pvae.recipes.resampled_iwae(num_particles=4, **options)
    if match is None:
        objective.prepare(model, AffineGuide().double(), x)
        return
    with pytest.raises(pvae.PvaeError, match=match):
        objective.prepare(model, AffineGuide().double(), x)


class NoBaseline(ScoreFunction):
    """Every particle is rewarded with the bound itself."""

    def surrogate(self, bound, terms, beta, gate):
        value = bound(terms.log_joint - beta * terms.log_q)
        return value + (value.detach() * terms.score).sum(0)


@pytest.mark.parametrize("bound", [elbo, iw_elbo], ids=repr)
@pytest.mark.parametrize("pair", [OneSite(), DiscreteSite()], ids=lambda p: type(p).__name__)
def test_leaving_one_out_is_quieter_than_no_baseline(pair, bound):
    names = pair.guide_values
    quiet = spread(pair, names, bound=bound, gradient=score_function)
    assert quiet < 0.5 * spread(pair, names, bound=bound, gradient=NoBaseline())


@pytest.mark.parametrize("bound", [*BOUNDS, renyi(2.0)], ids=repr)
def test_leaving_one_out_replaces_each_particle_by_the_mean_of_the_others(bound):
    log_weights = 20 * torch.randn(6, 3, dtype=torch.float64)
    found = _leave_one_out(bound, log_weights)
    for k in range(6):
        replaced = log_weights.clone()
        replaced[k] = log_weights[[j for j in range(6) if j != k]].mean(0)
        torch.testing.assert_close(found[k], bound(replaced))
        torch.testing.assert_close(_leave_one_out(lambda w: bound(w), log_weights), found)


def test_a_particle_of_no_weight_is_left_out_like_any_other():
    log_weights = torch.tensor([[0.3], [-math.inf], [1.2]], dtype=torch.float64)
    found = _leave_one_out(iw_elbo, log_weights)
    replaced = torch.tensor([[0.3], [0.75], [1.2]], dtype=torch.float64)
    torch.testing.assert_close(found[1], iw_elbo(replaced))
    rest = torch.tensor([[1.2], [-math.inf], [-math.inf]], dtype=torch.float64)
    torch.testing.assert_close(found[0], iw_elbo(rest))


def test_leaving_one_out_takes_no_array_of_k_squared():
    log_weights = torch.randn(400, 10)
    with torch.profiler.profile(profile_memory=True) as profile:
        _leave_one_out(iw_elbo, log_weights)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 40 * log_weights.numel() * 4


def test_no_baseline_is_unbiased_too():
    assert gradient_bias(DiscreteSite(), elbo, NoBaseline()) < SE


def test_mixed_is_quieter_than_the_score_of_all_sites():
    pair = MixedSites()
    names = ("k", "v", "s")
    assert spread(pair, names, gradient=mixed) < 0.8 * spread(pair, names, gradient=score_function)


@pytest.mark.parametrize("gradient", [pathwise, stick_the_landing, doubly_reparameterized, mixed])
def test_global_site_is_unbiased(gradient):
    """``t ~ N(0, 1)``, ``x_b | t ~ N(t, 1)``: the ELBO is quadratic in (m, s)."""
    x = torch.tensor([0.3, 1.1, -0.4], dtype=torch.float64)
    m = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    s = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)

    def model(x):
        t = pyro.sample("t", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(t, 1.0), obs=x)

    def guide(x):
        pyro.sample("t", dist.Normal(m, s))

    exact = -0.5 * ((x - m) ** 2 + s**2).sum() - 0.5 * (m**2 + s**2) + s.log()
    truth = torch.stack(torch.autograd.grad(exact, [m, s]))
    objective = pvae.Objective(gradient=gradient, num_particles=2)
    layout = objective.prepare(model, guide, x)
    samples = []
    for _ in range(400):
        m.grad = s.grad = None
        (-len(x) * objective.evaluate(model, guide, x, layout=layout).loss).backward()
        samples.append(torch.stack([m.grad, s.grad]))
    assert float(z_score(torch.stack(samples), truth).max()) < SE


def test_exact_posterior_trains_the_model_alone_without_noise():
    model, x = linear_gaussian(8)
    truth = torch.autograd.grad(model.log_evidence(x).mean(), list(model.parameters()))
    guide = ExactGuide(model)
    objective = pvae.stl()
    layout = objective.prepare(model, guide, x)
    samples = []
    for _ in range(200):
        model.zero_grad()
        objective.evaluate(model, guide, x, layout=layout).loss.backward()
        samples.append(torch.cat([-p.grad.flatten() for p in model.parameters()]))
    flat = torch.cat([g.flatten() for g in truth])
    assert float(z_score(torch.stack(samples), flat).max()) < SE
