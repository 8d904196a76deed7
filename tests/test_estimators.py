"""MIWAE, PIWAE, CIWAE, the TVO, VIMCO and CHIVI against exact bounds and exact gradients."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import (
    IDENTITY,
    SE,
    DiscreteSite,
    ExactGuide,
    MixedSites,
    Mixture,
    Nodes,
    OneSite,
    Pair,
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
from pvae import recipes
from pvae.bounds import ThermodynamicBound, ciwae, elbo, iw_elbo, miwae, renyi, tvo
from pvae.errors import ObjectiveError, OptionError
from pvae.gradients import (
    Covariance,
    GuideBy,
    Rebar,
    WakeSleep,
    chi_phi,
    covariance,
    disarm,
    doubly_reparameterized,
    guide_by,
    mixed,
    pathwise,
    rebar,
    relax,
    relaxed,
    score_function,
    wake_phi,
)


class FourDraws(OneSite):
    """One site with four particles, so that they fall into two groups."""

    num_particles = 4

    def nodes(self, p):
        full = super().nodes(p)
        keep = full.mass > 1e-9  # 44 nodes to the fourth would be 3.7 million
        return type(full)(*(getattr(full, f.name)[keep] for f in dataclasses.fields(full)))


def by_hand(bound, log_weights):
    """A bound's first derivative, and the elasticity of it, by autograd."""
    column = log_weights.clone().requires_grad_()
    (first,) = torch.autograd.grad(bound(column).sum(), column, create_graph=True)
    if not first.requires_grad:
        return first, torch.zeros_like(first)
    second = [
        torch.autograd.grad(first[k].sum(), column, retain_graph=True)[0][k]
        for k in range(len(column))
    ]
    return first.detach(), (torch.stack(second) / first).detach()


# --- bounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bound", [elbo, iw_elbo, renyi(0.5), miwae(1), miwae(3), miwae(6), ciwae(0.3)], ids=repr
)
def test_weights_and_elasticity_are_the_derivatives(bound):
    log_weights = 2 * torch.randn(6, 4, dtype=torch.float64)
    first, second = by_hand(bound, log_weights)
    torch.testing.assert_close(bound.weights(log_weights), first, rtol=0, atol=IDENTITY)
    torch.testing.assert_close(bound.elasticity(log_weights), second, rtol=0, atol=1e-8)


def test_bounds_are_ordered_for_the_same_particles():
    log_weights = 3 * torch.randn(12, 500, dtype=torch.float64)
    chain = [elbo, miwae(6), miwae(2), iw_elbo]
    for lower, upper in itertools.pairwise(chain):
        assert bool((lower(log_weights) < upper(log_weights)).all())
    between = ciwae(0.4)(log_weights)
    assert bool((elbo(log_weights) < between).all())
    assert bool((between < iw_elbo(log_weights)).all())


def test_ends_of_the_families_are_elbo_and_iw_elbo():
    log_weights = torch.randn(6, 5, dtype=torch.float64)
    close = {"rtol": 0, "atol": IDENTITY}
    torch.testing.assert_close(miwae(6)(log_weights), elbo(log_weights), **close)
    torch.testing.assert_close(miwae(1)(log_weights), iw_elbo(log_weights), **close)
    torch.testing.assert_close(tvo(1)(log_weights), elbo(log_weights), **close)


def evidence(pair):
    """``log p(x)`` of a pair of single numbers, by quadrature."""
    nodes = pair.nodes(pair.scalars())
    return (nodes.mass * nodes.log_weights(1.0).exp()).sum().log().detach()


def exact_tvo(nodes, bound):
    """The Riemann sum with exact expectations under ``pi_b``."""
    log_weights = nodes.log_weights(1.0)
    value = 0.0
    for exponent, width in bound.points:
        tilted = torch.softmax(nodes.mass.log() + exponent * log_weights, 0)
        value = value + width * (tilted * log_weights).sum()
    return value


@pytest.mark.parametrize("pair", [OneSite(), TwoSites(), DiscreteSite()],
                         ids=lambda p: type(p).__name__)  # fmt: skip
def test_thermodynamic_bounds_enclose_the_evidence_and_close_in(pair):
    nodes = pair.nodes({n: v.detach() for n, v in pair.scalars().items()})
    truth, gaps = float(evidence(pair)), []
    for partitions in (1, 2, 5, 20, 200):
        lower, upper = (
            float(exact_tvo(nodes, tvo(partitions, 0.02, upper=up))) for up in (False, True)
        )
        assert lower < truth < upper
        gaps.append(upper - lower)
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 0.05 * gaps[0]


@pytest.mark.parametrize("upper", [False, True])
def test_many_particles_estimate_the_exact_thermodynamic_bound(upper):
    pair, bound = OneSite(), tvo(4, 0.1, upper=upper)
    nodes = pair.nodes({n: v.detach() for n, v in pair.scalars().items()})
    model, guide, x = pair.programs(400)
    log_weights = pvae.draw(model, guide, x, 4000).log_weights.detach()
    values = bound(log_weights)
    # The bias is O(1/K) and the standard error of the mean over 400 data O(1/sqrt(400 K)).
    assert float(z_score(values, exact_tvo(nodes, bound))) < SE + 0.5
    assert float(values.std()) < 0.1


def test_at_the_posterior_every_bound_is_the_evidence():
    model, x = linear_gaussian(8)
    log_weights = pvae.draw(model, ExactGuide(model), x, 6).log_weights
    truth = model.log_evidence(x)
    for bound in (miwae(3), ciwae(0.5), tvo(5), tvo(5, upper=True)):
        torch.testing.assert_close(bound(log_weights), truth, rtol=0, atol=1e-9)


def test_miwae_falls_with_the_number_of_groups_and_ciwae_lies_between():
    pair = FourDraws()
    nodes = pair.nodes({n: v.detach() for n, v in pair.scalars().items()})
    values = [float(exact_bound(nodes, b, 4)) for b in (elbo, miwae(2), iw_elbo)]
    assert values == sorted(values)
    mixture = float(exact_bound(nodes, ciwae(0.25), 4))
    assert mixture == pytest.approx(0.25 * values[0] + 0.75 * values[2], abs=1e-9)


# --- gradients: unbiased ------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [pathwise, doubly_reparameterized, score_function], ids=repr)
@pytest.mark.parametrize("bound", [miwae(2), ciwae(0.3)], ids=repr)
def test_unbiased_on_a_continuous_site(bound, gradient):
    assert gradient_bias(FourDraws(), bound, gradient, beta=0.7, particles=60_000) < SE


def test_unbiased_on_two_sites():
    assert gradient_bias(TwoSites(), ciwae(0.3), doubly_reparameterized, particles=60_000) < SE


@pytest.mark.parametrize("gradient", [score_function, mixed], ids=repr)
@pytest.mark.parametrize("bound", [ciwae(0.3), tvo(3, 0.1)], ids=repr)
@pytest.mark.parametrize("pair", [DiscreteSite(), MixedSites()], ids=lambda p: type(p).__name__)
def test_unbiased_on_discrete_sites(pair, bound, gradient):
    """The TVO's estimate counts as a bound of its own here: its mean over K-tuples."""
    assert gradient_bias(pair, bound, gradient, particles=60_000) < SE


def halves(pair, gradient, *, beta=1.0, size=20_000, bound=iw_elbo):
    """Deviation of the model's gradient from the objective's bound, the guide's from its own."""
    objective = pvae.Objective(
        bound=bound, gradient=gradient, num_particles=pair.num_particles, beta=beta
    )
    samples = gradient_samples(pair, objective, size=size)
    of_model, of_guide = (exact_gradient(pair, b, beta=beta) for b in (bound, gradient.bound))
    off_model = max(float(z_score(samples[n], of_model[n])) for n in pair.model_values)
    off_guide = max(float(z_score(samples[n], of_guide[n])) for n in pair.guide_values)
    return off_model, off_guide


@pytest.mark.parametrize(
    ("pair", "beta"), [(FourDraws(), 0.5), (TwoSites(), 1.0)], ids=["one site", "two sites"]
)
def test_piwae_raises_the_iw_elbo_by_the_model_and_miwae_by_the_guide(pair, beta):
    assert max(halves(pair, guide_by(miwae(2)), beta=beta)) < SE


def test_guide_by_the_same_bound_is_pathwise_for_every_draw():
    pair = FourDraws()
    for bound in (iw_elbo, miwae(2), renyi(0.5)):
        split, plain = (
            gradient_samples(
                pair, pvae.Objective(bound=bound, gradient=g, num_particles=4), size=50
            )
            for g in (guide_by(bound), pathwise)
        )
        for name, samples in plain.items():
            torch.testing.assert_close(split[name], samples, rtol=0, atol=IDENTITY)


def test_weights_that_underflow_do_no_harm_to_piwae():
    """A group 200 nats below the other: its weight in the model's gradient is no float32."""
    log_joint = torch.tensor([[0.0], [-200.0], [0.3], [-200.5]], requires_grad=True)
    gate = pvae.particles.Gate()
    terms = pvae.gradients.Terms(log_joint, torch.zeros(4, 1), None, torch.zeros(4, 1))
    surrogate = guide_by(miwae(2)).surrogate(iw_elbo, terms, 1.0, gate)
    (of_model,) = torch.autograd.grad(surrogate.sum(), log_joint)
    of_guide = gate.coefficient * of_model
    torch.testing.assert_close(of_guide, miwae(2).weights(log_joint.detach()))
    torch.testing.assert_close(of_model, iw_elbo.weights(log_joint.detach()))


# --- gradients: the TVO -------------------------------------------------------------------------


def tvo_gradient(pair, bound):
    """The exact gradient of the exact Riemann sum: all nodes as particles, no Monte Carlo."""
    scalars = pair.scalars()
    value = exact_tvo(pair.nodes(scalars), bound)
    if isinstance(pair, DiscreteSite):  # its mass moves with q already
        return dict(zip(scalars, torch.autograd.grad(value, scalars.values()), strict=True))
    return {n: _numeric(pair, bound, n) for n in scalars}


def _numeric(pair, bound, name, step=1e-5):
    ends = []
    for sign in (1, -1):
        values = {n: v.detach().clone() for n, v in pair.scalars().items()}
        values[name] += sign * step
        ends.append(exact_tvo(pair.nodes(values), bound))
    return (ends[0] - ends[1]) / (2 * step)


def tvo_bias(pair, gradient, bound, num_particles, size):
    objective = pvae.Objective(bound=bound, gradient=gradient, num_particles=num_particles)
    samples = gradient_samples(pair, objective, size=size)
    truth = tvo_gradient(pair, bound)
    return {n: float(z_score(samples[n], truth[n])) for n in truth}, {
        n: float(samples[n].mean() - truth[n]) for n in truth
    }


def check_covariance(gradient, pair, bound):
    """At K = 2000 the bias, O(1/K), is below the standard error of 100 data, O(1/sqrt(100 K))."""
    off, _ = tvo_bias(pair, gradient, bound, 2000, 100)
    assert max(off.values()) < SE


@pytest.mark.parametrize("bound", [tvo(1), tvo(4, 0.1)], ids=repr)
@pytest.mark.parametrize("pair", [OneSite(), DiscreteSite()], ids=lambda p: type(p).__name__)
def test_covariance_gradient_is_that_of_the_thermodynamic_bound(pair, bound):
    check_covariance(covariance, pair, bound)


def test_covariance_gradient_is_biased_as_one_over_k():
    pair, bound = DiscreteSite(), tvo(4, 0.1)
    off = {k: abs(tvo_bias(pair, covariance, bound, k, 200_000 // k)[1]["u"]) for k in (2, 4, 16)}
    assert off[2] > off[4] > off[16]


def test_one_interval_is_the_elbo_by_score_function_up_to_its_known_factor():
    """At b = 0 the mean taken off includes the particle itself: (K - 1)/K of the gradient."""
    pair = DiscreteSite()
    ours = gradient_samples(pair, recipes.tvo(3, partitions=1), size=50)
    theirs = gradient_samples(
        pair, pvae.Objective(gradient=score_function, num_particles=3), size=50
    )
    torch.testing.assert_close(ours["u"], theirs["u"] * 2 / 3, rtol=0, atol=IDENTITY)
    torch.testing.assert_close(ours["w"], theirs["w"], rtol=0, atol=IDENTITY)


# --- gradients: noise ---------------------------------------------------------------------------


def spread(pair, names, **options):
    options.setdefault("num_particles", pair.num_particles)
    samples = gradient_samples(pair, pvae.Objective(**options), size=20_000)
    return sum(float(samples[name].var()) for name in names)


@pytest.mark.parametrize("bound", [miwae(2), ciwae(0.5)], ids=repr)
def test_doubly_reparameterized_is_quieter_for_the_new_bounds_too(bound):
    pair = FourDraws()
    quiet = spread(pair, pair.guide_values, bound=bound, gradient=doubly_reparameterized)
    assert quiet < 0.8 * spread(pair, pair.guide_values, bound=bound)


def signal_to_noise(pair, objective):
    """``|mean| / sd`` of the guide's gradient, summed over its parameters."""
    samples = gradient_samples(pair, objective, size=4_000)
    return sum(float(samples[n].mean().abs() / samples[n].std()) for n in pair.guide_values)


def test_guides_of_miwae_piwae_and_ciwae_hear_more_than_that_of_iwae():
    """Rainforth et al. (2018): tighter is not better for the guide's signal-to-noise."""
    pair, K = OneSite(), 64
    noisy = signal_to_noise(pair, recipes.iwae(K))
    for objective in (recipes.miwae(8, K), recipes.piwae(8, K), recipes.ciwae(0.5, K)):
        assert signal_to_noise(pair, objective) > 1.3 * noisy
    assert signal_to_noise(pair, recipes.dreg(K)) > 1.3 * noisy


def test_vimco_is_quieter_than_plain_reinforce():
    class NoBaseline(type(score_function)):
        def surrogate(self, bound, terms, beta, gate):
            value = bound(terms.log_joint - beta * terms.log_q)
            return value + (value.detach() * terms.score).sum(0)

    pair = DiscreteSite()
    options = {"bound": iw_elbo, "num_particles": 8}
    assert recipes.vimco(8) == pvae.Objective(gradient=score_function, **options)
    quiet = spread(pair, pair.guide_values, gradient=score_function, **options)
    assert quiet < 0.5 * spread(pair, pair.guide_values, gradient=NoBaseline(), **options)


# --- the chi bound ------------------------------------------------------------------------------


def chi_direction(pair, n):
    """Minus the exact gradient of ``CUBO_n`` in the guide, times ``n / (n - 1)``."""
    scalars = pair.scalars()
    nodes = pair.nodes(scalars)
    ratio = nodes.log_q + n * (nodes.likelihood + nodes.prior - nodes.log_q)
    cubo = ratio.logsumexp(0) / n
    (gradient,) = torch.autograd.grad(cubo, scalars["u"])
    return -gradient * n / (n - 1)


def check_chi(gradient, n):
    pair = DiscreteSite()
    objective = pvae.Objective(bound=iw_elbo, gradient=gradient, num_particles=4000)
    samples = gradient_samples(pair, objective, size=100)
    assert float(z_score(samples["u"], chi_direction(pair, n))) < SE


@pytest.mark.parametrize("n", [2.0, 3.0])
def test_chi_phi_descends_the_chi_bound(n):
    check_chi(chi_phi(n), n)


@pytest.mark.parametrize("mutant", [wake_phi, chi_phi(3.0), chi_phi(0.5)], ids=repr)
def test_other_orders_do_not(mutant):
    with pytest.raises(AssertionError):
        check_chi(mutant, 2.0)


# --- REBAR --------------------------------------------------------------------------------------


class ThreeClasses(Pair):
    """``c ~ OneHot(softmax(r, 0, -r))``, ``x | c ~ N(w c . (0, 1, 2), 0.8)``; free q."""

    model_values = {"r": -0.4, "w": 0.7}
    guide_values = {"u": 0.3, "v": -0.5}
    steps = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)

    def model(self, p, x):
        logits = torch.stack([p.r, 0 * p.r, -p.r], -1)
        c = pyro.sample("c", dist.OneHotCategorical(logits=logits))
        pyro.sample("x", dist.Normal(p.w * (c @ self.steps), 0.8), obs=x)

    def guide(self, p, x):
        logits = torch.stack([p.u, p.v, 0 * p.u], -1)
        pyro.sample("c", dist.OneHotCategorical(logits=logits))

    def nodes(self, p):
        log_q = torch.stack([p["u"], p["v"], 0 * p["u"]]).log_softmax(0)
        prior = torch.stack([p["r"], 0 * p["r"], -p["r"]]).log_softmax(0)
        x = torch.tensor(self.x, dtype=torch.float64)
        likelihood = dist.Normal(p["w"] * self.steps, 0.8).log_prob(x)
        return Nodes(log_q.exp(), likelihood, prior, log_q)


def rebar_bias(pair, gradient, num_particles, *, beta=1.0, size=40_000):
    objective = pvae.Objective(gradient=gradient, num_particles=num_particles, beta=beta)
    samples = gradient_samples(pair, objective, size=size)
    truth = exact_gradient(pair, elbo, beta=beta)
    return max(float(z_score(samples[n], truth[n])) for n in truth)


@pytest.mark.parametrize(
    ("gradient", "num_particles", "beta"),
    [(rebar(), 1, 1.0), (rebar(0.2, 0.5), 3, 0.5), (rebar(2.0, 3.0), 1, 1.0)],
    ids=repr,
)
@pytest.mark.parametrize("pair", [DiscreteSite(), ThreeClasses()], ids=lambda p: type(p).__name__)
def test_rebar_is_unbiased_whatever_its_control_variate(pair, gradient, num_particles, beta):
    assert rebar_bias(pair, gradient, num_particles, beta=beta) < SE


@pytest.mark.parametrize("gradient", [rebar(), disarm], ids=repr)
def test_rows_that_are_masked_out_have_no_gradient(gradient):
    """Nor noise: their control variate is masked too."""
    logits = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    ok = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", 3, dim=-1), poutine.mask(mask=ok):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((2,), 0.3)).to_event(1))
            pyro.sample("x", dist.Normal(z.cos(), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", 3, dim=-1), poutine.mask(mask=ok):
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

    x = torch.randn(3, 2, dtype=torch.float64)
    objective = pvae.Objective(gradient=gradient, num_particles=2)
    layout = objective.prepare(model, guide, x)
    found = torch.zeros_like(logits)
    for _ in range(10):  # antithetic draws of one sign have no gradient either
        loss = objective.evaluate(model, guide, x, layout=layout).loss
        found = found + torch.autograd.grad(loss, logits)[0].abs()
    assert bool((found[1] == 0).all())
    assert bool((found[[0, 2]] > 0).all())


def test_rebar_of_no_strength_is_leave_one_out_for_every_draw():
    pair = ThreeClasses()
    ours, theirs = (
        gradient_samples(pair, pvae.Objective(gradient=g, num_particles=3), size=50)
        for g in (rebar(0.5, 0.0), score_function)
    )
    for name, samples in theirs.items():
        torch.testing.assert_close(ours[name], samples, rtol=0, atol=IDENTITY)


@pytest.mark.parametrize("pair", [DiscreteSite(), ThreeClasses()], ids=lambda p: type(p).__name__)
def test_rebar_is_quieter_than_the_score_function_of_one_particle(pair):
    plain = spread(pair, pair.guide_values, gradient=rebar(0.5, 0.0), num_particles=1)
    assert spread(pair, pair.guide_values, gradient=rebar(), num_particles=1) < 0.7 * plain


def test_relaxed_draws_round_to_the_discrete_ones():
    for family in (dist.Bernoulli(logits=torch.randn(1, 4000)),
                   dist.OneHotCategorical(logits=torch.randn(1, 4000, 3))):  # fmt: skip
        value = family.sample()
        leaf, path, _ = Rebar(temperature=0.7).relax(family, value)
        rounded = leaf > 0.5 if family.event_shape == () else leaf == leaf.amax(-1, keepdim=True)
        assert torch.equal(rounded, value > 0)
        assert float(path.abs().max()) < 1e-6


def test_relaxed_draws_have_the_unconditional_distribution():
    """Logistic and Gumbel noise about the logits: means and variances of the free draws."""
    torch.manual_seed(3)
    logits = torch.tensor([0.8, -0.5, 0.1], dtype=torch.float64).log_softmax(-1)
    family = dist.OneHotCategorical(logits=logits).expand([1, 100_000])
    _, _, given = relaxed._coupled(family, family.sample())
    free = given[0] - logits - 0.5772156649015329
    assert float(z_score(free, torch.zeros(3)).max()) < SE
    assert float(z_score(free**2, torch.full((3,), math.pi**2 / 6)).max()) < SE
    family = dist.Bernoulli(logits=torch.tensor(0.8, dtype=torch.float64)).expand([1, 100_000])
    _, _, given = relaxed._coupled(family, family.sample())
    free = given[0] - 0.8
    assert float(z_score(free, 0.0)) < SE
    assert float(z_score(free**2, math.pi**2 / 3)) < SE


def test_rebar_quotes_the_bound_and_is_evaluated_without_gradients():
    model, guide, x = DiscreteSite().programs(6)
    objective = recipes.rebar(num_particles=2)
    layout = objective.prepare(model, guide, x)
    torch.manual_seed(3)
    loss = objective.evaluate(model, guide, x, layout=layout)
    torch.testing.assert_close(-loss.loss.detach(), loss.bound.mean())
    with torch.no_grad():
        torch.manual_seed(3)
        again = objective.evaluate(model, guide, x, layout=layout)
    torch.testing.assert_close(loss.bound, again.bound)


class Flipped(Rebar):
    def relax(self, distribution, value):
        leaf, path, log_q = super().relax(distribution, value)
        return leaf, -path, log_q


class PathForgotten(Rebar):
    def relax(self, distribution, value):
        leaf, path, log_q = super().relax(distribution, value)
        return leaf, 0 * path, log_q


class Unconditional(Rebar):
    """The relaxed draw of other noise, that need not round to the discrete one."""

    def relax(self, distribution, value):
        return super().relax(distribution, distribution.sample())


class PathOfOne(Rebar):
    """The derivative of u without that of v."""

    def relax(self, distribution, value):
        leaf, path, log_q = super().relax(distribution, value)
        logits = distribution.logits
        own = leaf * (1 - leaf) / self.temperature * (logits - logits.detach())
        return leaf, own.detach() - own.detach() + own, log_q


class ControlNotTakenOff(Rebar):
    def surrogate(self, bound, terms, beta, gate):
        right = super().surrogate(bound, terms, beta, gate)
        control, _ = self.control(terms.relaxed, None, beta)
        return right + (self.strength * control * terms.score).mean(0)


@pytest.mark.parametrize(
    "mutant", [Flipped, PathForgotten, Unconditional, PathOfOne, ControlNotTakenOff]
)
def test_wrong_rebar_fails(mutant):
    assert rebar_bias(DiscreteSite(), mutant(), 1) > SE


def test_rebar_wants_a_model_that_takes_relaxed_values():
    model = Mixture().double()
    objective = recipes.rebar()

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("c", dist.Bernoulli(logits=x[:, 0]))

    def indexes(x):
        with pyro.plate("data", len(x), dim=-1):
            c = pyro.sample("c", dist.Bernoulli(torch.full((len(x),), 0.5, dtype=x.dtype)))
            pyro.sample("x", dist.Normal(model.loc[:2][c.long()], 1.0).to_event(1), obs=x)

    def tables(x):
        with pyro.plate("data", len(x), dim=-1):
            c = pyro.sample("c", dist.Bernoulli(torch.full((len(x),), 0.5, dtype=x.dtype)))
            pyro.sample("x", dist.Normal(model.loc[[int(n) for n in c.flatten() if n in (0, 1)]],
                                         1.0).to_event(1), obs=x)  # fmt: skip

    x = torch.randn(4, 3, dtype=torch.float64)
    layout = objective.prepare(indexes, guide, x)
    with pytest.raises(ObjectiveError, match=r"no derivative by site 'c'.*score_function"):
        objective.evaluate(indexes, guide, x, layout=layout)
    with pytest.raises(pvae.PvaeError, match=r"relaxed values of site 'c'.*score_function"):
        objective.evaluate(tables, guide, x, layout=layout)


class Codes(nn.Module):
    """Four Bernoulli latents and a linear decoder; the guide is linear, too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.decoder, self.encoder = nn.Linear(4, 6), nn.Linear(6, 4)
        self.double()

    def code(self, logits):
        return dist.Bernoulli(logits=logits).to_event(1)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            c = pyro.sample("c", self.code(x.new_zeros(4)))
            pyro.sample("x", dist.Normal(self.decoder(c), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("c", self.code(self.encoder(x)))


class Rows(nn.Module):
    """Codes for one datum many times over; every row has logits of its own, to be differentiated.

    Four Bernoulli latents have sixteen values, so that bound and gradient are exact.
    """

    def __init__(self, size):
        super().__init__()
        self.codes = Codes()
        torch.manual_seed(3)
        self.codes.decoder = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6)).double()
        with torch.no_grad():
            self.codes.decoder[0].weight.mul_(3)
            self.codes.decoder[2].weight.mul_(3)
        x = torch.randn(6, generator=torch.Generator().manual_seed(8)).double()
        self.x = x.expand(size, 6)
        self.logits = nn.Parameter(self.codes.encoder(self.x).detach() + 0.7)
        self.model = self.codes.model

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("c", self.codes.code(self.logits))

    def slopes(self, objective, layout):
        """Each row's estimate of the gradient in its logits, ``(size, 4)``."""
        torch.manual_seed(6)
        loss = objective.evaluate(self.model, self.guide, self.x, layout=layout).loss
        (slopes,) = torch.autograd.grad(-loss * len(self.x), self.logits, retain_graph=True)
        return slopes, loss

    def truth(self):
        codes = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 4)
        logits = self.logits[0].detach().requires_grad_()
        log_q = self.codes.code(logits).log_prob(codes)
        likelihood = dist.Normal(self.codes.decoder(codes), 1.0).log_prob(self.x[0]).sum(-1)
        bound = (log_q.exp() * (likelihood - 4 * math.log(2) - log_q)).sum()
        return torch.autograd.grad(bound, logits)[0]


def learning(objective, steps, size=200):
    """The objective and its layout, after its control variate alone has learned."""
    rows = Rows(size)
    layout = objective.prepare(rows.model, rows.guide, rows.x)
    parameters = list(objective.parameters().values())
    optimizer = torch.optim.Adam(parameters, lr=1e-2) if parameters else None
    for _ in range(steps if parameters else 0):
        optimizer.zero_grad()
        loss = objective.evaluate(rows.model, rows.guide, rows.x, layout=layout).loss
        loss.backward(inputs=parameters)
        optimizer.step()
    return layout


LEARNERS = {
    "relax": lambda k: recipes.relax(num_particles=k),
    "relax from afar": lambda k: recipes.relax(2.0, 0.1, (8,), num_particles=k),
    "learned rebar": lambda k: recipes.rebar(learned=True, num_particles=k),
}


@pytest.mark.parametrize("steps", [0, 40])
@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("name", LEARNERS)
def test_learned_control_variates_are_unbiased_before_and_after(name, num_particles, steps):
    objective, rows = LEARNERS[name](num_particles), Rows(20_000)
    layout = learning(objective, steps)
    slopes, _ = rows.slopes(objective, layout)
    assert float(z_score(slopes, rows.truth()).max()) < SE


@pytest.mark.parametrize("num_particles", [2, 6])
def test_disarm_is_unbiased(num_particles):
    objective, rows = recipes.disarm(num_particles), Rows(20_000)
    layout = objective.prepare(rows.model, rows.guide, rows.x)
    assert float(z_score(rows.slopes(objective, layout)[0], rows.truth()).max()) < SE
    assert rebar_bias(DiscreteSite(), disarm, 2, beta=0.5) < SE


@pytest.mark.parametrize("pair", [DiscreteSite(), ThreeClasses()], ids=lambda p: type(p).__name__)
def test_relax_is_unbiased_in_the_model_and_the_guide(pair):
    assert rebar_bias(pair, relax(), 2, beta=0.5) < SE


def test_variance_of_estimators_of_discrete_sites_is_ordered():
    """The figures of docs/objectives.md: total variance of the gradient in four logits."""
    rows, found = Rows(20_000), {}
    for name, objective, steps in [
        ("score function, K = 1", recipes.rebar(0.5, 0.0), 0),
        ("score function, K = 2", pvae.Objective(gradient=score_function, num_particles=2), 0),
        ("rebar", recipes.rebar(), 0),
        ("rebar, learned", recipes.rebar(learned=True), 300),
        ("relax", recipes.relax(), 300),
        ("disarm, K = 2", recipes.disarm(), 0),
    ]:
        slopes, _ = rows.slopes(objective, learning(objective, steps))
        found[name] = float(slopes.var(0).sum())
    print({name: round(value, 2) for name, value in found.items()})
    assert max(found["relax"], found["rebar, learned"]) < 0.85 * found["rebar"]
    assert found["rebar"] < 0.1 * found["score function, K = 1"]
    assert found["disarm, K = 2"] < 0.9 * found["score function, K = 2"]


def test_what_learns_and_the_pair_follow_their_own_slopes():
    """The control variate that of the squared gradient, by differences; the pair none of it."""
    objective, plain = recipes.relax(0.8, 0.7), recipes.rebar(0.8, 0.7)
    rows = Rows(6)
    layout = objective.prepare(rows.model, rows.guide, rows.x)
    torch.testing.assert_close(  # the network is zero as yet
        rows.slopes(objective, layout)[0], rows.slopes(plain, layout)[0], rtol=0, atol=IDENTITY
    )
    control = objective.gradient.networks()["control_variate"]
    with torch.no_grad():
        for parameter in control.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    _, loss = rows.slopes(objective, layout)
    parameters = [control.log_temperature, control.strength, control.network[-1].weight]
    found = torch.autograd.grad(loss, parameters)

    def square():
        return float(rows.slopes(objective, layout)[0].square().sum(-1).mean())

    for parameter, slope in zip(parameters, found, strict=True):
        entry, size = parameter.detach().view(-1)[:1], 1e-5
        entry += size
        above = square()
        entry -= 2 * size
        by_differences = (above - square()) / (2 * size)
        entry += size
        assert float(slope.flatten()[0]) == pytest.approx(by_differences, rel=1e-5)


@pytest.mark.parametrize("name", ["rebar", "relax", "disarm"])
def test_estimators_of_discrete_sites_are_staged(name):
    """For Bernoulli sites: torch draws one-hot values in a way that cannot be traced."""
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)).double()
    found = []
    for engine in ("eager", "staged"):
        pair, objective = Codes(), getattr(recipes, name)(num_particles=2)
        run = pvae.fit(
            pair.model, pair.guide, x, objective=objective, epochs=2,
            batch_size=20, engine=engine, valid=x, progress=False,
        )  # fmt: skip
        assert run.engine.startswith(engine)
        learned = [*pair.parameters(), *objective.parameters().values()]
        found.append(torch.cat([p.detach().flatten() for p in learned]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)
    assert (name == "relax") == bool(objective.parameters())


def test_fit_moves_the_control_variate_with_the_guide():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)).double()
    for options in ({}, {"alternate": 1}, {"parts": 2}):
        pair, objective = Codes(), recipes.relax()
        pvae.fit(pair.model, pair.guide, x, objective=objective, epochs=2, batch_size=20, lr=1e-2,
                 engine="eager", progress=False, **options)  # fmt: skip
        control = objective.gradient.networks()["control_variate"]
        assert float(control.log_temperature.detach().exp()) != 0.5
        assert bool(control.network[-1].weight.any())
    pair = Codes()
    made = torch.optim.Adam(pair.parameters())
    with pytest.raises(OptionError, match="learned beside the pair.*by name or class"):
        pvae.fit(pair.model, pair.guide, x, objective=recipes.relax(), optimizer=made, epochs=1)


def mirrored(change):
    def surrogate(self, bound, terms, beta, gate):
        terms = dataclasses.replace(
            terms,
            sites={n: s._replace(value=change(s.value)) for n, s in terms.sites.items()},
        )
        return type(disarm).surrogate(self, bound, terms, beta, gate)

    return type("Wrong", (type(disarm),), {"surrogate": surrogate})()


@pytest.mark.parametrize("change", [lambda v: 1 - v, lambda v: 2 * v, lambda v: v.roll(1, 0)])
def test_wrong_disarm_fails(change):
    assert rebar_bias(DiscreteSite(), mirrored(change), 2) > SE


# --- mutants ------------------------------------------------------------------------------------


def swapped(self, bound, terms, beta, gate):
    """The guide's bound for the model, and the other way round."""
    return GuideBy(bound).surrogate(self.bound, terms, beta, gate)


def gate_shut(self, bound, terms, beta, gate):
    """The model's bound behind the gate as well."""
    return GuideBy.surrogate(self, bound, terms, beta, None)


@pytest.mark.parametrize("surrogate", [swapped, gate_shut])
def test_wrong_splits_fail(surrogate):
    mutant = type("Wrong", (GuideBy,), {"surrogate": surrogate})(miwae(2))
    assert max(halves(FourDraws(), mutant)) > SE


def wrong_covariance(change):
    def surrogate(self, bound, terms, beta, gate):
        log_weights = terms.log_joint - beta * terms.log_q
        value = 0.0
        for exponent, width in bound.points:
            weights = torch.softmax(exponent * log_weights.detach(), 0)
            value = value + width * change(weights, exponent, log_weights, terms.log_q)
        return value

    return type("Wrong", (Covariance,), {"surrogate": surrogate})()


def centred(weights, values):
    return values.detach() - (weights * values.detach()).sum(0)


WRONG_COVARIANCES = {
    "no covariance": lambda w, b, lw, lq: (w * lw).sum(0),
    "covariance alone": lambda w, b, lw, lq: (w * centred(w, lw) * (lq + b * lw)).sum(0),
    "path of the model left out": lambda w, b, lw, lq: (w * (lw + centred(w, lw) * lq)).sum(0),
    "path of q left out": lambda w, b, lw, lq: (w * (lw + centred(w, lw) * b * lw)).sum(0),
    "not centred": lambda w, b, lw, lq: (w * (lw + lw.detach() * (lq + b * lw))).sum(0),
    "exponent for its complement": lambda w, b, lw, lq: (
        w * (lw + centred(w, lw) * (lq + (1 - b) * lw))
    ).sum(0),
    "weights of q": lambda w, b, lw, lq: (
        (1 / len(w)) * (lw + centred(torch.ones_like(w) / len(w), lw) * (lq + b * lw))
    ).sum(0),
}


@pytest.mark.parametrize("name", WRONG_COVARIANCES)
def test_wrong_covariances_fail(name):
    with pytest.raises(AssertionError):
        check_covariance(wrong_covariance(WRONG_COVARIANCES[name]), OneSite(), tvo(4, 0.1))


def test_right_covariance_written_so_passes():
    right = wrong_covariance(
        lambda w, b, lw, lq: (w * (lw + centred(w, lw) * (lq + b * lw))).sum(0)
    )
    check_covariance(right, OneSite(), tvo(4, 0.1))


# --- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: recipes.miwae(4, 10), ObjectiveError, ["groups of equal size", "use 12"]),
        (lambda: recipes.piwae(4, 10), ObjectiveError, ["groups of equal size", "use 12"]),
        (lambda: recipes.tvo(1), ObjectiveError, ["num_particles=1", "bound=elbo"]),
        (lambda: pvae.Objective(bound=tvo(5, upper=True), num_particles=4), ObjectiveError,
         ["upper bound"]),
        (lambda: pvae.Objective(bound=tvo(), num_particles=4, gradient=doubly_reparameterized),
         ObjectiveError, ["tvo(5, 0.025)", "gradient=pathwise"]),
        (lambda: pvae.Objective(gradient=covariance, num_particles=4), ObjectiveError,
         ["tvo", "score_function"]),
        (lambda: pvae.Objective(gradient=guide_by(tvo()), num_particles=4), ObjectiveError,
         ["got tvo(5, 0.025)", "gradient=pathwise"]),
        (lambda: recipes.vimco(1), ObjectiveError, ["at least 2"]),
        (lambda: recipes.chivi(2.0, 1), ObjectiveError, ["at least 2"]),
        (lambda: recipes.chivi(2.0, beta=2.0), ObjectiveError, ["leave beta at 1"]),
        (lambda: recipes.chivi(-1.0), ObjectiveError, ["finite order above 0", "try 2"]),
        (lambda: recipes.renyi_vae(-1.0), ObjectiveError, ["upper bound"]),
        (lambda: pvae.Objective(bound=iw_elbo, gradient=rebar()), ObjectiveError,
         ["bound=elbo", "score_function"]),
        (lambda: recipes.rebar().prepare(*MixedSites().programs(4)), ObjectiveError,
         ["'z' (continuous)", "score_function or mixed"]),
        (lambda: recipes.rebar(vectorize=False).prepare(*DiscreteSite().programs(4)),
         ObjectiveError, ["all particles at once"]),
        (lambda: rebar(0.0), OptionError, ["temperature above 0"]),
        (lambda: relax(0.0), OptionError, ["relax takes a temperature above 0"]),
        (lambda: relax(hidden=()), OptionError, ["hidden=()", "rebar(learned=True)"]),
        (lambda: pvae.Objective(bound=iw_elbo, gradient=relax()), ObjectiveError,
         ["relax(0.5, 1, (32, 32))", "bound=elbo", "score_function"]),
        (lambda: recipes.relax().prepare(*MixedSites().programs(4)), ObjectiveError,
         ["'z' (continuous)", "score_function or mixed"]),
        (lambda: recipes.disarm(3), ObjectiveError, ["in pairs", "use 4"]),
        (lambda: pvae.Objective(bound=iw_elbo, gradient=disarm, num_particles=2), ObjectiveError,
         ["bound=elbo"]),
        (lambda: recipes.disarm().prepare(*ThreeClasses().programs(4)), ObjectiveError,
         ["one site, Bernoulli, got 'c' (OneHotCategorical)"]),
        (lambda: miwae(0), OptionError, ["1 or more, got 0"]),
        (lambda: miwae(2.5), OptionError, ["1 or more, got 2.5"]),
        (lambda: ciwae(1.0), OptionError, ["0 < weight < 1"]),
        (lambda: tvo(0), OptionError, ["partitions >= 1"]),
        (lambda: tvo(5, 1.5), OptionError, ["0 < start < 1"]),
    ],
)  # fmt: skip
def test_unsound_is_refused_with_the_alternative(build, error, words):
    with pytest.raises(error) as raised:
        build()
    for word in words:
        assert word in str(raised.value)


def test_wake_sleep_still_says_its_name():
    assert [repr(WakeSleep(power=2.0)), repr(guide_by(miwae(2)))] == [
        "chi_phi(2)",
        "guide_by(miwae(2))",
    ]
    assert isinstance(tvo(), ThermodynamicBound)
