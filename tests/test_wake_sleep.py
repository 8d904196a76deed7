"""Wake-sleep, reweighted wake-sleep and Monte-Carlo EM: each half's gradient against its truth."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import (
    IDENTITY,
    SE,
    AffineGuide,
    DiscreteSite,
    LinearGaussian,
    MixedSites,
    Mixture,
    Pair,
    TwoSites,
    exact_gradient,
    gradient_samples,
    guide_near_posterior,
    linear_gaussian,
    z_score,
)

import pvae
import pvae.particles
from pvae.bounds import elbo, iw_elbo, renyi
from pvae.engine import Eager, Problem, Staged, build_optimizer
from pvae.errors import ObjectiveError, ProgramError
from pvae.gradients import (
    WakeSleep,
    guide_held,
    pathwise,
    sleep_phi,
    wake_phi,
    wake_sleep_phi,
)
from pvae.guides.exact import Exact
from pvae.models.factor_analysis import FactorAnalysis
from pvae.models.gaussian_mixture import GaussianMixture
from pvae.objectives import as_objective
from pvae.particles import drawing, parameters, simulation


class Affine(Pair):
    """``z ~ N(m, 1)``, ``x | z ~ N(w z, e^n)``; ``q(z|x) = N(a x + c, e^s)``."""

    model_values = {"w": 1.3, "m": 0.2, "n": -0.4}
    guide_values = {"a": 0.4, "c": 0.1, "s": -0.2}

    def model(self, p, x):
        z = pyro.sample("z", dist.Normal(p.m, 1.0))
        pyro.sample("x", dist.Normal(p.w * z, p.n.exp()), obs=x)

    def guide(self, p, x):
        pyro.sample("z", dist.Normal(p.a * x + p.c, p.s.exp()))

    def dream_gradient(self) -> dict[str, torch.Tensor]:
        """``E_p(z,x)[dlog q(z|x)]`` from the moments of the joint Gaussian."""
        p = self.scalars()
        mean_z, mean_x = p["m"], p["w"] * p["m"]
        zz = 1 + p["m"] ** 2
        zx, xx = p["w"] * zz, p["w"] ** 2 * zz + (2 * p["n"]).exp()
        moments = [t.detach() for t in (mean_z, mean_x, zz, zx, xx)]
        mean_z, mean_x, zz, zx, xx = moments
        a, c, variance = p["a"], p["c"], (2 * p["s"]).exp()
        square = zz - 2 * a * zx - 2 * c * mean_z + a**2 * xx + 2 * a * c * mean_x + c**2
        expected = -0.5 * square / variance - p["s"]
        names = list(self.guide_values)
        gradients = torch.autograd.grad(expected, [p[name] for name in names])
        return dict(zip(names, gradients, strict=True))


def wake_gradient(pair: DiscreteSite, num_particles: int) -> torch.Tensor:
    """``E[sum_k w~_k dlog q(c_k)]`` over all K-tuples of the two values, without Pyro."""
    scalars = pair.scalars()
    nodes = pair.nodes(scalars)
    index = torch.tensor(list(itertools.product((0, 1), repeat=num_particles))).T
    weights = torch.softmax(nodes.log_weights(1.0)[index], 0).detach()
    mass = nodes.mass.detach()[index].prod(0)
    value = (mass * (weights * nodes.log_q[index]).sum(0)).sum()
    return torch.autograd.grad(value, scalars["u"])[0]


def inclusive_gradient(pair: DiscreteSite) -> torch.Tensor:
    """``-d KL(p(c|x) || q(c))``, exactly."""
    scalars = pair.scalars()
    nodes = pair.nodes(scalars)
    posterior = torch.softmax(nodes.likelihood + nodes.prior, 0).detach()
    return torch.autograd.grad((posterior * nodes.log_q).sum(), scalars["u"])[0]


def check_wake(gradient, num_particles=3):
    pair = DiscreteSite()
    objective = pvae.Objective(bound=iw_elbo, gradient=gradient, num_particles=num_particles)
    samples = gradient_samples(pair, objective, size=60_000)
    truth = exact_gradient(pair, iw_elbo)
    assert float(z_score(samples["u"], wake_gradient(pair, num_particles))) < SE
    assert max(float(z_score(samples[name], truth[name])) for name in pair.model_values) < SE


def check_sleep(gradient):
    pair = Affine()
    samples = gradient_samples(pair, pvae.Objective(gradient=gradient), size=100_000)
    truth = pair.dream_gradient()
    assert max(float(z_score(samples[name], truth[name])) for name in truth) < SE


# --- the guide's half ---------------------------------------------------------------------------


def test_wake_phi_is_what_its_particles_say_at_every_k():
    """The bias of K = 3 included: both halves against all K-tuples, enumerated."""
    check_wake(wake_phi)


def test_wake_phi_comes_to_the_inclusive_kl_as_one_over_k():
    truth = inclusive_gradient(DiscreteSite())
    off = {k: float((wake_gradient(DiscreteSite(), k) - truth).abs()) for k in (2, 4, 8, 16)}
    assert off[2] > off[4] > off[8] > off[16]
    assert off[16] == pytest.approx(off[8] / 2, rel=0.1)


def test_sleep_phi_is_unbiased():
    check_sleep(sleep_phi)


def test_both_is_the_mean_of_the_two():
    pair = Affine()

    def guide_gradient(gradient):
        objective = pvae.Objective(bound=iw_elbo, gradient=gradient, num_particles=4)
        return gradient_samples(pair, objective, size=50)

    wake, sleep, both = (guide_gradient(g) for g in (wake_phi, sleep_phi, wake_sleep_phi))
    for name in pair.guide_values:
        assert torch.allclose(both[name], (wake[name] + sleep[name]) / 2, rtol=0, atol=IDENTITY)


@pytest.mark.parametrize("gradient", [wake_phi, sleep_phi, wake_sleep_phi, guide_held], ids=repr)
@pytest.mark.parametrize("bound", [elbo, iw_elbo, renyi(0.5)], ids=repr)
@pytest.mark.parametrize("pair", [DiscreteSite(), MixedSites(), TwoSites()],
                         ids=lambda p: type(p).__name__)  # fmt: skip
def test_the_model_follows_the_bound_whatever_the_guide_does(pair, bound, gradient):
    objective = pvae.Objective(bound=bound, gradient=gradient, num_particles=pair.num_particles)
    model, guide, x = pair.programs(20_000)
    objective(model, guide, x).backward()
    truth = exact_gradient(pair, bound)
    assert max(float(z_score(-p.grad, truth[n])) for n, p in model.named_parameters()) < SE


def test_guide_held_gives_the_guide_nothing():
    model, guide, x = DiscreteSite().programs(8)
    pvae.mcem(4)(model, guide, x).backward()
    assert all(p.grad is None for p in guide.parameters())
    assert all(p.grad is not None for p in model.parameters())


def test_at_the_posterior_the_guide_is_at_rest():
    """Both kinds of guide gradient have mean zero where the guide is the exact posterior."""
    torch.manual_seed(3)
    model = FactorAnalysis(4, z_dim=2).double()
    with torch.no_grad():
        x = model(size=4000)
        posterior = model.posterior(x[:1])["z"]
        covariance = posterior.covariance_matrix[0]
        gain = covariance @ model.loadings.T * (-2 * model.log_noise).exp()
    weight = gain.clone().requires_grad_()

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            loc = (x - model.offset.detach()) @ weight.T
            pyro.sample("z", dist.MultivariateNormal(loc, covariance))

    for objective in (pvae.rws(5), pvae.wake_sleep()):
        layout = objective.prepare(model, guide, x)
        samples = []
        for _ in range(100):
            loss = objective.evaluate(model, guide, x, layout=layout).loss
            samples.append(torch.autograd.grad(loss, weight)[0].flatten())
        assert float(z_score(torch.stack(samples), 0.0).max()) < SE


def test_one_datum_is_pyros_reweighted_wake_sleep():
    """Pyro's weights are joint over a batch, so that the two agree on a single datum only."""
    model, x = linear_gaussian(1)
    theirs = pyro.infer.ReweightedWakeSleep(
        num_particles=4, insomnia=1.0, vectorize_particles=True, max_plate_nesting=1
    )
    found = []
    for backward in (theirs.loss_and_grads, lambda *pair: pvae.rws(4)(*pair).backward()):
        guide = AffineGuide().double()
        model.zero_grad()
        torch.manual_seed(5)
        backward(model, guide, x)
        found.append([p.grad.clone() for p in [*model.parameters(), *guide.parameters()]])
    for ours, pyros in zip(*found, strict=True):
        assert torch.allclose(ours, pyros, rtol=0, atol=IDENTITY)


# --- Monte-Carlo EM -----------------------------------------------------------------------------


def em_gradient(model, x):
    """The gradient of EM's auxiliary function at the E-step's own parameters."""
    return torch.autograd.grad(model.log_evidence(x).mean(), list(model.parameters()))


def test_fishers_identity():
    """``d log p(x) = E_p(c|x)[d log p(x, c)]``: EM's gradient is the tight bound's gradient."""
    model = Mixture().double()
    x = torch.randn(7, 3).double()
    joint = model.log_joint(x)
    auxiliary = (joint.softmax(-1).detach() * joint).sum(-1).mean()
    ours = torch.autograd.grad(auxiliary, list(model.parameters()))
    for a, b in zip(ours, em_gradient(model, x), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["factor analysis", "mixture"])
def test_mcem_with_the_exact_posterior_is_em(kind):
    torch.manual_seed(1)
    model = FactorAnalysis(4, z_dim=2) if kind == "factor analysis" else GaussianMixture(4)
    model = model.double()
    x, guide, objective = torch.randn(20, 4).double(), Exact(model), pvae.mcem(3)
    layout = objective.prepare(model, guide, x)
    samples = []
    for _ in range(200):
        model.zero_grad()
        loss = objective.evaluate(model, guide, x, layout=layout)
        loss.loss.backward()
        samples.append(torch.cat([-p.grad.flatten() for p in model.parameters()]))
    truth = torch.cat([g.flatten() for g in em_gradient(model, x)])
    assert float(z_score(torch.stack(samples), truth).max()) < SE
    assert torch.allclose(loss.bound, model.log_evidence(x).detach(), atol=IDENTITY)


def test_mcem_with_another_guide_is_consistent():
    """Self-normalised weights: at K = 2000 what is left of the bias is below the noise."""
    model, x = linear_gaussian(6)
    guide, objective = guide_near_posterior(model, move=0.5, widen=1.5), pvae.mcem(2000)
    layout = objective.prepare(model, guide, x)
    samples = []
    for _ in range(100):
        model.zero_grad()
        objective.evaluate(model, guide, x, layout=layout).loss.backward()
        samples.append(torch.cat([-p.grad.flatten() for p in model.parameters()]))
    truth = torch.cat([g.flatten() for g in em_gradient(model, x)])
    assert float(z_score(torch.stack(samples), truth).max()) < SE


# --- in every engine, and end to end ------------------------------------------------------------

RECIPES = {
    "wake-sleep": pvae.wake_sleep(),
    "rws": pvae.rws(4),
    "rws both": pvae.rws(4, wake_sleep_phi),
    "mcem": pvae.mcem(4),
}


def take_steps(kind, objective, make):
    torch.manual_seed(0)
    model = GaussianMixture(4, num_components=3) if kind == "mixture" else LinearGaussian(4)
    model = model.double()
    guide = Exact(model) if kind == "mixture" else AffineGuide(4).double()
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1)).double()
    layout = objective.prepare(model, guide, x[:10])
    weights = parameters(model, guide, x[:10])
    optimizer = build_optimizer("adam", list(weights.values()), lr=1e-2)
    cpu = torch.device("cpu")
    problem = Problem(model, guide, objective, optimizer, weights, layout, x, cpu, 0, 40)
    step = make(problem)
    found = [step((torch.arange(10) * (n + 1)) % 40, n, 1.0) for n in range(5)]
    return torch.cat([*found, *[p.detach().flatten() for p in weights.values()]])


@pytest.mark.parametrize(
    ("name", "kind"),
    [("wake-sleep", "linear"), ("wake-sleep", "mixture"), ("rws both", "linear"),
     ("mcem", "mixture")],
)  # fmt: skip
def test_staged_equals_eager(name, kind, monkeypatch):
    monkeypatch.setattr("pvae.engine.staged.lower", lambda graph, inputs: graph)
    eager = take_steps(kind, RECIPES[name], Eager)
    for compiled in (False, True):  # True: with the optimiser in the graph, but no compiler
        make = lambda p, c=compiled: Staged(p, torch.arange(10), compiled=c)  # noqa: E731
        assert torch.allclose(take_steps(kind, RECIPES[name], make), eager, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["wake-sleep", "rws both"])
def test_wake_sleep_learns_data_of_its_own_kind(name):
    """A pair that can be exact: the evidence comes within 0.1 nat of the maximum."""
    torch.manual_seed(2)
    x = FactorAnalysis(5, z_dim=1).double()(size=400).detach()
    model = FactorAnalysis(5, z_dim=1).double()
    best = FactorAnalysis(5, z_dim=1).double()
    best.load_state_dict(model.state_dict())
    options = {"batch_size": 200, "lr_schedule": "cosine", "progress": False, "lr": 5e-2}
    pvae.fit(best, Exact(best), x, objective=pvae.stl(), epochs=50, **options)
    guide = AffineGuide(5, 1).double()
    pvae.fit(model, guide, x, objective=RECIPES[name], epochs=80, **options)
    short = best.log_evidence(x).mean() - model.log_evidence(x).mean()
    assert float(short.detach()) < 0.1


def test_particles_one_by_one_are_dreamt_with_too():
    model, x = linear_gaussian(3)
    guide, objective = AffineGuide().double(), pvae.wake_sleep(2, vectorize=False)
    layout = objective.prepare(model, guide, x)
    particles = objective.evaluate(model, guide, x, layout=layout).particles
    assert particles.dreams.shape == (1, 3)


def test_labels_stay_and_data_are_dreamt():
    """What the model observes is replaced; a conditioning tensor is passed on as it is."""
    seen = []

    def model(x, label):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(label, 1.0))
            pyro.sample("x", dist.Normal(100 + z, 0.1), obs=x)

    def guide(x, label):
        seen.append((x, label))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x - 100 + label, 1.0))

    batch = (torch.zeros(6), torch.arange(6.0))
    objective = pvae.wake_sleep()
    layout = objective.prepare(model, guide, batch)
    seen.clear()
    particles = objective.evaluate(model, guide, batch, layout=layout).particles
    (real, _), (dreamt, label) = seen
    assert bool((real == 0).all())
    assert bool((dreamt > 90).all())
    assert torch.equal(label, batch[1])
    assert particles.dreams.shape == (1, 6)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: pvae.rws(1), ["wake_phi", "num_particles=1", "sleep_phi"]),
        (lambda: pvae.rws(1, wake_sleep_phi), ["at least 2"]),
        (lambda: pvae.rws(5, beta=2.0), ["beta=2.0", "leave beta at 1"]),
        (lambda: pvae.wake_sleep(free_bits=0.5), ["free_bits", "sleep_phi"]),
        (lambda: pvae.wake_sleep(analytic_kl=True), ["analytic_kl=False"]),
        (lambda: as_objective(pyro.infer.ReweightedWakeSleep()), ["pvae.rws()"]),
    ],
)
def test_unsound_combinations_are_refused_when_built(build, words):
    with pytest.raises(ObjectiveError) as caught:
        build()
    assert "\n" not in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


def plain_guide(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(x, 1.0))


def test_model_that_reads_its_data_does_not_dream():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z + 0.5 * x, 1.0), obs=x)

    with pytest.raises(ProgramError, match="reads its data"):
        pvae.wake_sleep().prepare(model, plain_guide, torch.randn(4))
    pvae.rws().prepare(model, plain_guide, torch.randn(4))


def test_data_that_are_computed_from_the_batch_are_not_dreamt():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=2 * x)

    with pytest.raises(ProgramError, match="not a tensor of the batch"):
        pvae.wake_sleep().prepare(model, plain_guide, torch.randn(4))


def test_site_of_the_guide_alone_has_no_posterior():
    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(x, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(a, 1.0))

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ObjectiveError, match="'a' is none of the model's"):
        pvae.rws().prepare(model, guide, torch.randn(4))


# --- mutants ------------------------------------------------------------------------------------


def wrong(surrogate, guide="wake"):
    return type("Wrong", (WakeSleep,), {"surrogate": surrogate})(guide)


def held(bound, terms):
    return bound(terms.log_joint - terms.log_q.detach())


def log_w(terms):
    return (terms.log_joint - terms.log_q).detach()


WRONG_WAKE = {
    "plain mean": lambda self, bound, terms, *_: held(bound, terms) + terms.score.mean(0),
    "no weights": lambda self, bound, terms, *_: held(bound, terms) + terms.score.sum(0),
    "the other sign": lambda self, bound, terms, *_: (
        held(bound, terms) - (log_w(terms).softmax(0) * terms.score).sum(0)
    ),
    "weights over data": lambda self, bound, terms, *_: (
        held(bound, terms) + (log_w(terms).softmax(1) * terms.score).sum(0)
    ),
    "weights upside down": lambda self, bound, terms, *_: (
        held(bound, terms) + ((-log_w(terms)).softmax(0) * terms.score).sum(0)
    ),
    "weights not held": lambda self, bound, terms, *_: (
        held(bound, terms) + ((terms.log_joint - terms.log_q).softmax(0) * terms.score).sum(0)
    ),
    "log q not held in the bound": lambda self, bound, terms, *_: (
        bound(terms.log_joint - terms.log_q) + (log_w(terms).softmax(0) * terms.score).sum(0)
    ),
    "prior forgotten in the weights": lambda self, bound, terms, *_: (
        held(bound, terms) + (terms.log_joint.detach().softmax(0) * terms.score).sum(0)
    ),
}


@pytest.mark.parametrize("name", WRONG_WAKE)
def test_wrong_wake_phi_fails(name):
    with pytest.raises(AssertionError):
        check_wake(wrong(WRONG_WAKE[name]))


def test_gradient_of_the_bound_is_not_wake_phi():
    with pytest.raises((AssertionError, ObjectiveError)):
        check_wake(pvae.gradients.score_function)


def awake(model, guide, batch, layout):
    """Dreams of the model's latents beside the data of the batch."""
    latents, _ = simulation.simulated(model, batch, layout.entries, {})
    return pvae.particles.log_guide(guide, batch, latents, 1, layout)


def of_the_guide(model, guide, batch, layout):
    """The guide's own latents, and data that the model draws given them."""
    latents, _ = simulation.simulated(guide, batch, {}, {})
    _, dreamt = simulation.simulated(model, batch, layout.entries, latents)
    return pvae.particles.log_guide(guide, dreamt, latents, 1, layout)


def two_nights(model, guide, batch, layout):
    """Latents of one dream beside the data of another."""
    latents, _ = simulation.simulated(model, batch, layout.entries, {})
    _, dreamt = simulation.simulated(model, batch, layout.entries, {})
    return pvae.particles.log_guide(guide, dreamt, latents, 1, layout)


@pytest.mark.parametrize("mutant", [awake, of_the_guide, two_nights])
def test_wrong_dreams_fail(mutant, monkeypatch):
    monkeypatch.setattr(drawing, "log_dreams", mutant)
    with pytest.raises(AssertionError):
        check_sleep(sleep_phi)


def test_mcem_through_its_draws_is_not_em():
    """With pathwise draws of a shared posterior the model's gradient would be counted twice."""

    def through(self, bound, terms, beta, gate):
        return bound(terms.log_joint)

    def draw(self, *args, **options):
        return pathwise.draw(*args, **options)

    torch.manual_seed(1)
    model = FactorAnalysis(4, z_dim=2).double()
    x, guide = torch.randn(20, 4).double(), Exact(model)
    mutant = type("Through", (WakeSleep,), {"surrogate": through, "draw": draw})("none")
    objective = pvae.Objective(bound=elbo, gradient=mutant, num_particles=3)
    layout = objective.prepare(model, guide, x)
    samples = []
    for _ in range(200):
        model.zero_grad()
        objective.evaluate(model, guide, x, layout=layout).loss.backward()
        samples.append(torch.cat([-p.grad.flatten() for p in model.parameters()]))
    truth = torch.cat([g.flatten() for g in em_gradient(model, x)])
    assert float(z_score(torch.stack(samples), truth).max()) > SE
