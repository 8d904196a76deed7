"""Objectives: values, Pyro's SVI, scales, schedules and refused combinations."""

from __future__ import annotations

import copy
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
    LinearGaussian,
    PyroStyleVAE,
    TwoSites,
    linear_gaussian,
)
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.optim import Adam, ClippedAdam
from torch import nn

import pvae
from pvae.bounds import cubo, elbo, iw_elbo, renyi
from pvae.errors import ObjectiveError
from pvae.gradients import (
    doubly_reparameterized,
    guide_by,
    mixed,
    pathwise,
    rebar,
    score_function,
    stick_the_landing,
)
from pvae.kl_terms import Balanced
from pvae.objectives import PyroObjective, as_objective
from pvae.schedules import Cyclical, Linear


def svi_loss(objective, model, guide, *args, seed=4, **kwargs):
    torch.manual_seed(seed)
    return objective(model, guide, *args, **kwargs).item()


def pyro_loss(elbo, model, guide, *args, seed=4):
    torch.manual_seed(seed)
    return elbo.differentiable_loss(model, guide, *args).item()


def evaluated(objective, model, guide, x, *, beta=None, seed=4, **options):
    layout = objective.prepare(model, guide, x)
    torch.manual_seed(seed)
    beta = objective.schedule(0) if beta is None else beta
    return objective.evaluate(model, guide, x, layout=layout, beta=beta, **options)


@pytest.fixture
def pair():
    model, x = linear_gaussian(8)
    return model, AffineGuide().double(), x


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_particles", [1, 4])
def test_vae_is_trace_elbo(pair, num_particles):
    theirs = Trace_ELBO(
        num_particles=num_particles, vectorize_particles=num_particles > 1, max_plate_nesting=1
    )
    ours = svi_loss(pvae.vae(num_particles), *pair)
    assert ours == pytest.approx(pyro_loss(theirs, *pair), abs=IDENTITY)


@pytest.mark.parametrize("num_particles", [1, 4])
def test_analytic_kl_is_trace_mean_field_elbo(pair, num_particles):
    theirs = TraceMeanField_ELBO(
        num_particles=num_particles, vectorize_particles=num_particles > 1, max_plate_nesting=1
    )
    ours = svi_loss(pvae.vae(num_particles, analytic_kl=True), *pair)
    assert ours == pytest.approx(pyro_loss(theirs, *pair), abs=IDENTITY)


def test_gradients_are_those_of_trace_elbo(pair):
    model, guide, x = pair
    gradients = []
    for loss in (pvae.vae(), Trace_ELBO().differentiable_loss):
        model.zero_grad()
        guide.zero_grad()
        torch.manual_seed(4)
        loss(model, guide, x).backward()
        gradients.append([p.grad.clone() for p in [*model.parameters(), *guide.parameters()]])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


@pytest.mark.parametrize("bound", [elbo, iw_elbo, renyi(0.5)], ids=repr)
@pytest.mark.parametrize("beta", [1.0, 0.3, 0.0])
def test_loss_tells_what_it_is_made_of(pair, bound, beta):
    objective = pvae.Objective(bound=bound, num_particles=5, beta=beta)
    loss = evaluated(objective, *pair)
    particles = loss.particles
    log_q = particles.log_q["z"]
    tempered = particles.log_likelihood + beta * (particles.log_prior - log_q)
    close = {"rtol": 0, "atol": IDENTITY}
    torch.testing.assert_close(loss.bound, bound(tempered).detach(), **close)
    torch.testing.assert_close(loss.loss.detach(), -loss.bound.mean(), **close)
    torch.testing.assert_close(loss.reconstruction, particles.log_likelihood.mean(0).detach())
    torch.testing.assert_close(loss.kl, (log_q - particles.log_prior).mean(0).detach(), **close)
    torch.testing.assert_close(loss.elbo, particles.log_weights.mean(0).detach(), **close)
    assert loss.bound.shape == loss.elbo.shape == loss.kl.shape == (8,)
    assert not any(t.requires_grad for t in (loss.bound, loss.elbo, loss.kl, loss.reconstruction))


@pytest.mark.parametrize(
    "gradient",
    [pathwise, stick_the_landing, doubly_reparameterized, score_function, mixed],
    ids=repr,
)
def test_every_estimator_quotes_the_bound_and_not_its_surrogate(pair, gradient):
    loss = evaluated(pvae.Objective(gradient=gradient, num_particles=3, beta=0.5), *pair)
    plain = evaluated(pvae.Objective(num_particles=3, beta=0.5), *pair)
    torch.testing.assert_close(loss.loss.detach(), plain.loss.detach(), rtol=0, atol=IDENTITY)


def test_analytic_kl_has_less_noise_and_the_same_mean(pair):
    model, guide, x = pair
    exact = evaluated(pvae.vae(4000, analytic_kl=True), model, guide, x)
    sampled = evaluated(pvae.vae(4000), model, guide, x)
    terms = sampled.particles.log_q["z"] - sampled.particles.log_p["z"]
    off = (terms.mean(0) - exact.kl).abs() / (terms.std(0) / 4000**0.5)
    assert float(off.detach().max()) < SE
    assert float(exact.particles.kl["z"].std(0).detach().max()) < IDENTITY


def test_analytic_kl_falls_back_where_none_is_known():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Laplace(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.StudentT(4.0, x, 1.0))

    x = torch.randn(5, dtype=torch.float64)
    ours = svi_loss(pvae.vae(3, analytic_kl=True), model, guide, x)
    assert ours == pytest.approx(svi_loss(pvae.vae(3), model, guide, x), abs=IDENTITY)


def test_analytic_kl_wants_the_order_of_the_model():
    model, guide, x = TwoSites().programs(4)
    with pytest.raises(pvae.PvaeError, match="same order: reorder the guide or use analytic_kl=F"):
        evaluated(pvae.vae(analytic_kl=True), model, guide, x)


def test_masked_kl_counts_nothing():
    ok = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", 3, dim=-1), poutine.mask(mask=ok):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 3, dim=-1), poutine.mask(mask=ok):
            pyro.sample("z", dist.Normal(x, 0.5))

    x = torch.randn(3, dtype=torch.float64)
    for analytic_kl in (True, False):
        loss = evaluated(pvae.vae(2, analytic_kl=analytic_kl), model, guide, x)
        assert float(loss.bound[1]) == 0
    ours = svi_loss(pvae.vae(analytic_kl=True), model, guide, x)
    assert ours == pytest.approx(pyro_loss(TraceMeanField_ELBO(), model, guide, x), abs=IDENTITY)


@pytest.mark.parametrize(
    ("of_model", "of_guide"),
    [(False, False), (torch.tensor([True, False, True]), True), (True, False)],
    ids=["neither", "model in part", "guide not"],
)
def test_masks_of_model_and_guide_each_count(of_model, of_guide):
    """The closed form holds where both sites count; elsewhere the KL is that of the draws."""

    def model(x):
        with pyro.plate("data", 3, dim=-1):
            with poutine.mask(mask=of_model):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 3, dim=-1), poutine.mask(mask=of_guide):
            pyro.sample("z", dist.Normal(x, 0.5))

    x = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    closed = evaluated(pvae.vae(20_000, analytic_kl=True), model, guide, x)
    drawn = evaluated(pvae.vae(20_000), model, guide, x)
    noise = drawn.particles.log_weights.std(0) / 20_000**0.5
    assert bool(((closed.kl - drawn.kl).abs() <= SE * noise).all())


def test_scale_of_the_likelihood_alone_is_in_the_quoted_bound(pair):
    model, guide, x = pair
    loss = evaluated(pvae.vae(2), scaled(model, x=0.3), guide, x)
    assert loss.loss.item() == pytest.approx(-loss.bound.mean().item(), abs=IDENTITY)


def test_free_bits_leave_cheap_sites_alone(pair):
    model, guide, x = pair
    with torch.no_grad():
        guide.map.zero_()
        guide.log_sd.zero_()  # q = p(z): a KL of zero
    for objective in (pvae.vae(3, free_bits=0.5), pvae.vae(3, free_bits=0.5, analytic_kl=True)):
        guide.zero_grad()
        evaluated(objective, model, guide, x).loss.backward()
        free = guide.log_sd.grad.clone()
        guide.zero_grad()
        evaluated(pvae.vae(3, beta=0.0), model, guide, x).loss.backward()
        torch.testing.assert_close(free, guide.log_sd.grad, rtol=0, atol=IDENTITY)


@pytest.mark.parametrize("gradient", [pathwise, stick_the_landing], ids=repr)
def test_free_bits_change_nothing_above_their_nats(pair, gradient):
    gradients = []
    for nats in (0.0, 1e-6):
        model, guide, x = copy.deepcopy(pair)
        with torch.no_grad():
            guide.shift.fill_(3.0)
        objective = pvae.Objective(gradient=gradient, num_particles=3, free_bits=nats)
        evaluated(objective, model, guide, x).loss.backward()
        gradients.append(guide.map.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)


def test_last_partial_batch_counts_by_its_rows(pair):
    """T3: with the exact posterior the SVI losses of uneven batches add up to the evidence."""
    model, _, x = pair
    guide, objective = ExactGuide(model), pvae.iwae(3)
    parts = sum(svi_loss(objective, model, guide, x[rows]) for rows in (slice(0, 5), slice(5, 8)))
    assert parts == pytest.approx(-model.log_evidence(x).sum().item(), abs=1e-8)


@pytest.mark.parametrize("options", [{"free_bits": 0.5}, {"kl_term": Balanced()}], ids=str)
def test_sites_of_the_guides_own_have_no_kl_of_their_own(options):
    """``log q`` of a joint site is the density of all latents drawn from it."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            u = pyro.sample("u", dist.Normal(x, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u))

    joint = AutoDiagonalNormal(model)
    x = torch.randn(4)
    joint(x)
    for program, site in ((guide, "'u'"), (joint, "'_AutoDiagonalNormal_latent'")):
        with pytest.raises(ObjectiveError, match=f"{site} is the guide's own"):
            evaluated(pvae.vae(**options), model, program, x)


# --- scales -------------------------------------------------------------------------------------


def scaled(program, **scales):
    """``program`` with ``poutine.scale`` on single sites."""

    class Scale(poutine.messenger.Messenger):
        def _pyro_sample(self, msg):
            msg["scale"] = msg["scale"] * scales.get(msg["name"], 1.0)

    return Scale()(program)


@pytest.mark.parametrize(
    ("model_scales", "guide_scales"),
    [
        ({"z": 0.3}, {"z": 0.3}),
        ({"x": 0.3}, {}),
        ({"z": 0.3, "x": 0.3}, {}),
        ({}, {"z": 2.0}),
        ({"z": 0.3}, {}),
        ({"z": 0.5, "x": 2.0}, {"z": 0.1}),
    ],
    ids=str,
)
def test_elbo_honours_the_scale_of_each_site_as_pyro_does(pair, model_scales, guide_scales):
    model, guide, x = pair
    model, guide = scaled(model, **model_scales), scaled(guide, **guide_scales)
    ours = svi_loss(pvae.vae(), model, guide, x)
    assert ours == pytest.approx(pyro_loss(Trace_ELBO(), model, guide, x), abs=IDENTITY)
    gradients = []
    for loss in (pvae.vae(), Trace_ELBO().differentiable_loss):
        for program in pair[:2]:
            program.zero_grad()
        torch.manual_seed(4)
        loss(model, guide, x).backward()
        gradients.append([p.grad.clone() for program in pair[:2] for p in program.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


def test_beta_is_a_scale_of_the_latent_sites(pair):
    model, guide, x = pair
    both = scaled(model, z=0.3), scaled(guide, z=0.3)
    by_scale = svi_loss(pvae.vae(2), *both, x)
    assert svi_loss(pvae.beta_vae(0.3, 2), *pair) == pytest.approx(by_scale, abs=IDENTITY)


# --- Pyro's SVI ---------------------------------------------------------------------------------


OPTIMISERS = [lambda: Adam({"lr": 0.02}), lambda: ClippedAdam({"lr": 0.02, "clip_norm": 10.0})]


@pytest.mark.parametrize("optimiser", OPTIMISERS, ids=["Adam", "ClippedAdam"])
def test_svi_trains_plain_modules(optimiser):
    model, x = linear_gaussian(60)
    with torch.no_grad():
        model.offset.add_(2.0)
    guide = AffineGuide().double()
    before = [p.detach().clone() for p in [*model.parameters(), *guide.parameters()]]
    svi = SVI(model, guide, optimiser(), loss=pvae.iwae(5))
    losses = [svi.step(x) for _ in range(120)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    after = [*model.parameters(), *guide.parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("optimiser", OPTIMISERS, ids=["Adam", "ClippedAdam"])
def test_svi_trains_programs_in_the_style_of_pyros_examples(optimiser):
    vae = PyroStyleVAE()
    x = torch.randn(60, 2) @ torch.randn(2, 5) + 2.0
    before = [p.detach().clone() for p in vae.parameters()]
    svi = SVI(vae.model, vae.guide, optimiser(), loss=pvae.iwae(5))
    losses = [svi.step(x) for _ in range(120)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert all(not torch.equal(a, b) for a, b in zip(before, vae.parameters(), strict=True))


class Modular(pyro.nn.PyroModule):
    """A PyroModule with a constrained parameter; ``model`` is a method as well as the call."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(5))
        self.sd = pyro.nn.PyroParam(torch.tensor(2.0), constraint=dist.constraints.positive)

    def forward(self, x):
        return self.model(x)

    def model(self, x):
        loc, sd = self.loc, self.sd
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(loc + z.sum(-1, keepdim=True), sd).to_event(1), obs=x)


@pytest.mark.parametrize("program", [lambda m: m, lambda m: m.model], ids=["call", "method"])
def test_svi_trains_pyro_modules(program):
    module, guide = Modular(), AffineGuide()
    x = torch.randn(30, 5) + 1.0
    svi = SVI(program(module), guide, Adam({"lr": 0.05}), loss=pvae.vae())
    for _ in range(60):
        svi.step(x)
    assert float(module.loc.detach().mean()) > 0.3
    assert float(module.sd.detach()) < 1.9


def test_svi_trains_through_handlers(pair):
    model, guide, x = pair
    before = model.offset.detach().clone()
    wrapped = [poutine.scale(program, scale=1 / len(x)) for program in (model, guide)]
    SVI(*wrapped, Adam({"lr": 0.02}), loss=pvae.iwae(3)).step(x)
    assert not torch.equal(before, model.offset)


def test_svi_leaves_frozen_parameters_alone(pair):
    model, guide, x = pair
    model.requires_grad_(False)
    before = model.offset.clone(), guide.shift.detach().clone()
    SVI(model, guide, Adam({"lr": 0.02}), loss=pvae.iwae(3)).step(x)
    assert torch.equal(before[0], model.offset)
    assert not torch.equal(before[1], guide.shift)


def test_svi_trains_a_model_under_its_exact_posterior():
    model, x = linear_gaussian(60)
    model.offset.data.add_(1.0)
    svi = SVI(model, ExactGuide(model), Adam({"lr": 0.02}), loss=pvae.vae())
    before = model.log_evidence(x).mean().item()
    for _ in range(80):
        svi.step(x)
    assert model.log_evidence(x).mean().item() > before + 0.2


def test_loss_is_counted_as_pyro_counts(pair):
    model, guide, x = pair
    loss = svi_loss(pvae.iwae(5), model, guide, x)
    bound = evaluated(pvae.iwae(5), model, guide, x).bound
    assert loss == pytest.approx(-float(bound.sum()), abs=IDENTITY)


@pytest.mark.parametrize("num_particles", [1, 3])
def test_subsampled_loss_is_counted_as_pyro_counts(pair, num_particles):
    model, guide, x = pair
    model.total = guide.total = 100
    theirs = Trace_ELBO(
        num_particles=num_particles, vectorize_particles=num_particles > 1, max_plate_nesting=1
    )
    ours = svi_loss(pvae.vae(num_particles), model, guide, x)
    assert ours == pytest.approx(pyro_loss(theirs, model, guide, x), abs=1e-8)


def test_arguments_reach_the_programs_as_svi_passes_them(pair):
    model, guide, x = pair
    expected = svi_loss(pvae.vae(), model, guide, x)

    def nested(program):
        return lambda batch: program(batch["x"] if isinstance(batch, dict) else batch[0])

    def keyword(program):
        return lambda x, scale=None: program(x * (1.0 if scale is None else scale))

    for batch in ((x, x), [x], {"x": x}):
        assert svi_loss(pvae.vae(), nested(model), nested(guide), batch) == expected
    half = svi_loss(pvae.vae(), model, guide, 0.5 * x)
    by_keyword = svi_loss(pvae.vae(), keyword(model), keyword(guide), x, scale=0.5)
    assert by_keyword == pytest.approx(half, abs=IDENTITY)
    assert svi_loss(pvae.vae(), keyword(model), keyword(guide), x=x) == expected


def test_schedules_advance_by_svi_steps(pair):
    model, guide, x = pair
    beta = []

    def record(step):
        beta.append(Linear(4)(step))
        return beta[-1]

    svi = SVI(model, guide, Adam({"lr": 1e-3}), loss=pvae.beta_vae(record))
    for _ in range(3):
        svi.step(x)
        svi.evaluate_loss(x)  # looks, and does not count
    assert beta == [0.0, 0.25, 0.25, 0.5, 0.5, 0.75]


def test_keyword_arguments_do_not_set_the_schedule_back(pair):
    model, guide, x = pair
    objective = pvae.beta_vae(Linear(4))

    def keyword(program):
        return lambda x, unused=None: program(x)

    programs = keyword(model), keyword(guide)
    losses = [svi_loss(objective, *programs, x, unused=1) for _ in range(5)]
    assert losses[0] < losses[1] < losses[4]


def test_one_objective_serves_two_pairs_each_at_its_own_step(pair):
    objective = pvae.beta_vae(Linear(4))
    other = LinearGaussian().double(), AffineGuide().double()
    first, second = [], []
    for _ in range(3):
        first.append(svi_loss(objective, *pair))
        second.append(svi_loss(objective, *other, pair[2]))
    assert first[0] < first[1] < first[2]
    assert second[0] < second[1] < second[2]


def test_two_models_in_one_process_share_no_parameters():
    x = torch.randn(20, 5)
    first, second = PyroStyleVAE(), PyroStyleVAE()
    second.load_state_dict(first.state_dict())
    frozen = copy.deepcopy(first.state_dict())
    SVI(second.model, second.guide, Adam({"lr": 0.1}), loss=pvae.vae()).step(x)
    for name, value in first.state_dict().items():
        assert torch.equal(value, frozen[name])
        assert not torch.equal(second.state_dict()[name], frozen[name])


def test_two_plain_models_trained_by_turns_share_no_parameters():
    x = torch.randn(20, 5)
    pairs = [(LinearGaussian(), AffineGuide()) for _ in range(2)]
    steps = [SVI(*pair, Adam({"lr": 0.1}), loss=pvae.vae()) for pair in pairs]
    steps[0].step(x)
    kept = copy.deepcopy(pairs[0][0].state_dict())
    for _ in range(3):
        steps[1].step(x)
    assert all(torch.equal(kept[n], v) for n, v in pairs[0][0].state_dict().items())
    steps[0].step(x)
    assert not torch.equal(kept["offset"], pairs[0][0].offset)


# --- Pyro's own objectives ----------------------------------------------------------------------


def test_pyro_elbos_stand_behind_the_same_interface(pair):
    objective = as_objective(Trace_ELBO())
    assert isinstance(objective, PyroObjective)
    loss = evaluated(objective, *pair)
    ours = evaluated(pvae.vae(), *pair)
    assert loss.loss.item() == pytest.approx(ours.loss.item(), abs=IDENTITY)
    assert loss.bound.shape == (8,)
    assert bool(loss.kl.isnan().all())


@pytest.mark.parametrize("grad", [True, False])
def test_enumeration_stands_behind_the_same_interface(grad):
    weight = torch.tensor(0.3, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            c = pyro.sample("c", dist.Bernoulli(weight), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    x = torch.randn(6)
    objective = as_objective(TraceEnum_ELBO(max_plate_nesting=1))
    with torch.set_grad_enabled(grad):  # a validation step has none
        loss = evaluated(objective, model, lambda x: None, x)
    assert loss.loss.requires_grad == grad
    both = [dist.Normal(c, 1.0).log_prob(x) for c in (0.0, 1.0)]
    exact = torch.logaddexp(both[0] + torch.tensor(0.7).log(), both[1] + torch.tensor(0.3).log())
    assert loss.loss.item() == pytest.approx(-float(exact.mean()), abs=1e-5)


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (pyro.infer.RenyiELBO(0.5, num_particles=7), r"pvae\.renyi_vae\(0\.5, num_particles=7\)"),
        (pyro.infer.TraceGraph_ELBO(), "no differentiable loss: use .*mixed"),
        (pyro.infer.TraceTailAdaptive_ELBO(), "failed on the batch .*vectorize_particles==True"),
    ],
    ids=["renyi", "graph", "tail-adaptive"],
)
def test_losses_that_pyro_does_not_differentiate_are_refused(pair, theirs, words):
    with pytest.raises(ObjectiveError, match=words):
        pvae.fit(*pair, objective=theirs, epochs=1, batch_size=4, progress=False)


def test_pyros_loss_of_a_subsampled_plate_is_per_datum_for_any_batch():
    """A shorter last batch, or one held out, is scaled up to N by another factor."""

    def model(x):
        with pyro.plate("data", 40, subsample=x, dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):  # the exact posterior
        with pyro.plate("data", 40, subsample=x, dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = torch.randn(8, dtype=torch.float64)
    objective = as_objective(Trace_ELBO())
    objective.prepare(model, guide, x)
    for rows in (8, 3):
        exact = dist.Normal(0.0, 2**0.5).log_prob(x[:rows]).mean().item()
        loss = objective.evaluate(model, guide, x[:rows]).loss.item()
        assert loss == pytest.approx(-exact, abs=1e-6)


def test_pyros_loss_is_read_in_double_precision(pair):
    objective = as_objective(Trace_ELBO())
    objective.prepare(*pair)
    with torch.no_grad():
        torch.manual_seed(4)
        bound = objective.evaluate(*pair).bound
    assert bound.dtype == torch.float64
    assert -8 * bound[0].item() == pytest.approx(pyro_loss(Trace_ELBO(), *pair), rel=1e-14)


def test_objectives_pass_as_they_are_and_others_are_refused():
    objective = pvae.iwae(5)
    assert as_objective(objective) is objective
    with pytest.raises(ObjectiveError, match=r"'elbo': try pvae\.vae\(\)"):
        as_objective("elbo")


# --- recipes and refusals -----------------------------------------------------------------------


def test_recipes_are_one_line_each():
    assert pvae.vae() == pvae.Objective()
    assert pvae.beta_vae(4.0) == pvae.Objective(beta=4.0)
    assert pvae.iwae(7) == pvae.Objective(bound=iw_elbo, num_particles=7)
    assert pvae.stl(2) == pvae.Objective(gradient=stick_the_landing, num_particles=2)
    assert pvae.dreg(7) == pvae.Objective(
        bound=iw_elbo, gradient=doubly_reparameterized, num_particles=7
    )
    assert hash(pvae.beta_vae(Cyclical(10))) == hash(pvae.beta_vae(Cyclical(10)))


def custom_bound(log_weights):
    return log_weights.median(0).values


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: pvae.iwae(5, gradient=stick_the_landing), ["iw_elbo", "doubly_reparam"]),
        (lambda: pvae.Objective(bound=cubo(2)), ["upper bound", "iw_elbo"]),
        (lambda: pvae.Objective(gradient=score_function), ["num_particles=1", "at least 2"]),
        (lambda: pvae.Objective(gradient=mixed), ["num_particles=1", "at least 2"]),
        (
            lambda: pvae.Objective(bound=custom_bound, gradient=doubly_reparameterized),
            ["custom_bound", "gradient=pathwise"],
        ),
        (
            lambda: pvae.Objective(bound=custom_bound, gradient=stick_the_landing),
            ["custom_bound", "bound=elbo"],
        ),
        (lambda: pvae.iwae(5, free_bits=0.5), ["free_bits", "bound=elbo"]),
        (lambda: pvae.iwae(5, analytic_kl=True), ["analytic_kl", "analytic_kl=False"]),
        (lambda: pvae.stl(analytic_kl=True), ["analytic_kl", "gradient=pathwise"]),
        (
            lambda: pvae.Objective(gradient=score_function, num_particles=2, free_bits=1.0),
            ["free_bits", "score_function"],
        ),
        (lambda: pvae.vae(0), ["at least 1", "0"]),
        (lambda: pvae.vae(-3), ["at least 1", "-3"]),
        (lambda: pvae.vae(2.5), ["whole number", "2.5"]),
        (lambda: pvae.vae("3"), ["whole number", "'3'"]),
        (lambda: pvae.beta_vae(-1.0), ["negative", "-1.0"]),
        (lambda: pvae.beta_vae(math.nan), ["finite", "nan"]),
        (lambda: pvae.beta_vae("linear"), ["schedule", "'linear'"]),
        (lambda: pvae.beta_vae(Linear), ["schedule step ->", "Linear"]),
        (lambda: pvae.Objective(bound="iwae"), ["(K, B) to (B,)", "'iwae'", "iw_elbo"]),
        (lambda: pvae.Objective(bound=renyi), ["(K, B) to (B,)", "with its arguments"]),
        (lambda: pvae.Objective(bound=torch.mean), ["(K, B) to (B,)", "mean"]),
        (lambda: pvae.vae(gradient="pathwise"), ["pvae.gradients", "'pathwise'"]),
        (lambda: pvae.vae(gradient=rebar), ["pvae.gradients", "with its arguments"]),
        (lambda: pvae.vae(penalty=pvae.penalties.mmd), ["pvae.penalties", "with its arguments"]),
        (lambda: pvae.vae(kl_term="capacity"), ["pvae.kl_terms", "'capacity'"]),
    ],
)
def test_unsound_combinations_are_refused_when_built(build, words):
    with pytest.raises(ObjectiveError) as caught:
        build()
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


def shared(x):
    t = pyro.sample("t", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(t, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def shared_guide(x):
    pyro.sample("t", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(x, 1.0))


class DropoutGuide(nn.Module):
    """Two sites behind dropout: the second weighing would see other units."""

    def __init__(self, *sites):
        super().__init__()
        self.drop, self.sites = nn.Dropout(0.5), sites

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            for name in self.sites:
                pyro.sample(name, dist.Normal(self.drop(x), 1.0))


def two_site_model(x):
    with pyro.plate("data", len(x), dim=-1):
        a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)


@pytest.mark.parametrize(
    ("objective", "model", "guide", "words"),
    [
        (pvae.iwae(5), shared, shared_guide, ["'t'", "iw_elbo", "bound=elbo"]),
        (pvae.dreg(5), shared, shared_guide, ["'t'", "iw_elbo", "bound=elbo"]),
        (
            pvae.Objective(gradient=score_function, num_particles=4),
            shared,
            shared_guide,
            ["'t'", "score_function", "pathwise"],
        ),
        (
            pvae.vae(4, gradient=guide_by(iw_elbo)),
            shared,
            shared_guide,
            ["'t'", "iw_elbo", "gradient=pathwise"],
        ),
        (
            pvae.stl(),
            two_site_model,
            DropoutGuide("a", "b"),
            ["Dropout", "'drop'", "gradient=pathwise"],
        ),
    ],
)
def test_unsound_pairs_are_refused_when_prepared(objective, model, guide, words):
    with pytest.raises(ObjectiveError) as caught:
        objective.prepare(model, guide, torch.randn(4))
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("objective", [pvae.vae(), pvae.stl(), pvae.dreg(3)], ids=repr)
def test_discrete_sites_have_no_path(objective):
    model, guide, x = DiscreteSite().programs(4)
    with pytest.raises(ObjectiveError, match=r"'c' \(Bernoulli\).*mixed.*TraceEnum_ELBO"):
        objective.prepare(model, guide, x)


def test_dropout_before_one_site_is_sound():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    pvae.stl().prepare(model, DropoutGuide("a"), torch.randn(4))


def test_scale_of_one_site_is_refused_inside_a_logarithm(pair):
    model, guide, x = pair
    scaled_pair = scaled(model, z=0.3), scaled(guide, z=0.3)
    with pytest.raises(ObjectiveError, match=r"'z'.*poutine\.scale.*guide_by\(iw_elbo\)"):
        evaluated(pvae.vae(3, gradient=guide_by(iw_elbo)), *scaled_pair, x)
    with pytest.raises(ObjectiveError, match=r"'z'.*poutine\.scale.*iw_elbo.*beta="):
        evaluated(pvae.iwae(3), *scaled_pair, x)
    evaluated(pvae.vae(3), *scaled_pair, x)
