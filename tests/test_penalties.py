"""Penalties and terms of the KL against closed forms, quadrature and enumeration."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import IDENTITY, SE, AffineGuide, DiscreteSite, TwoSites, linear_gaussian, z_score
from torch import nn

import pvae
from pvae import catalogue, recipes
from pvae.bounds import iw_elbo
from pvae.engine import Eager, Problem, Staged, build_optimizer
from pvae.errors import ObjectiveError, OptionError
from pvae.gradients import score_function
from pvae.guides.gaussian import Gaussian
from pvae.kl_terms import Balanced, Capacity, FreeBits
from pvae.models.vae import VAE
from pvae.particles import LatentSite, parameters
from pvae.penalties import Decomposition, DensityRatio, Discrepancy, FreeDimensions, Moments
from pvae.penalties.correlation import aggregated
from pvae.schedules import Linear

N, D = 5, 2


def posteriors(*, full=False):
    """``q(z | x_n)`` of five data, in two dimensions."""
    generator = torch.Generator().manual_seed(7)
    loc = 1.2 * torch.randn(N, D, generator=generator, dtype=torch.float64)
    loc[:, 1] += 0.8 * loc[:, 0]  # a total correlation worth the name
    scale = 0.4 + 0.3 * torch.rand(N, D, generator=generator, dtype=torch.float64)
    if full:
        tril = torch.diag_embed(scale)
        tril[:, 1, 0] = 0.3
        return dist.MultivariateNormal(loc, scale_tril=tril)
    return dist.Normal(loc, scale).to_event(1)


def site_of(posterior, num_particles, *, seed=3):
    """Draws of the posteriors, as the waist gives them."""
    torch.manual_seed(seed)
    rows = posterior.batch_shape[0]
    posterior = posterior.expand([num_particles, rows])
    prior = dist.Normal(torch.zeros(D, dtype=torch.float64), 1.0).to_event(1)
    return LatentSite(posterior.rsample(), posterior, prior.expand([num_particles, rows]))


def subset(site, rows):
    """The site of some of the data alone."""
    index = torch.as_tensor(rows)
    loc, scale = site.posterior.base_dist.loc[:, index], site.posterior.base_dist.scale[:, index]
    prior = dist.Normal(torch.zeros_like(loc), 1.0).to_event(1)
    return LatentSite(site.value[:, index], dist.Normal(loc, scale).to_event(1), prior)


# --- the decomposition of the KL ----------------------------------------------------------------


def on_a_grid(posterior):
    """Mutual information, total correlation, dimension-wise KL by summing over a fine grid."""
    axis = torch.linspace(-8, 8, 401, dtype=torch.float64)
    cell = float(axis[1] - axis[0])
    points = torch.cartesian_prod(axis, axis)
    each = posterior.log_prob(points[:, None])  # (G, N)
    joint = each.logsumexp(1) - math.log(N)
    mass = joint.exp() * cell**2
    table = mass.reshape(401, 401)
    marginal = [(table.sum(1 - d) / cell).clamp(min=1e-300).log() for d in range(2)]
    product = (marginal[0][:, None] + marginal[1][None]).reshape(-1)
    prior = dist.Normal(torch.zeros(D, dtype=torch.float64), 1.0).to_event(1).log_prob(points)
    conditional = each.exp() * cell**2 / N
    return {
        "mutual_information": float((conditional * (each - joint[:, None])).sum()),
        "total_correlation": float((mass * (joint - product)).sum()),
        "dimension_wise": float((mass * (product - prior)).sum()),
    }


def test_the_grid_is_fine_enough():
    exact = on_a_grid(posteriors())
    leaf = posteriors().base_dist
    kl = torch.distributions.kl_divergence(leaf, dist.Normal(torch.zeros_like(leaf.loc), 1.0))
    assert sum(exact.values()) == pytest.approx(float(kl.sum(1).mean()), abs=1e-6)
    assert min(exact.values()) > 0.1


def check_decomposition(parts, *, full=False):
    """Every part at B = N, where the aggregated posterior is whole, against the grid."""
    posterior = posteriors(full=full)
    site, exact = site_of(posterior, 8_000), on_a_grid(posterior)
    found = parts(site, N)
    for name, truth in exact.items():
        assert float(z_score(found[name].mean(1), truth)) < SE, name


@pytest.mark.parametrize("full", [False, True])
def test_parts_of_the_kl_are_those_of_the_exact_aggregated_posterior(full):
    check_decomposition(Decomposition(1.0).parts, full=full)


def test_parts_add_up_to_the_kl_for_every_draw():
    site = site_of(posteriors(), 7)
    kl = site.posterior.log_prob(site.value) - site.prior.log_prob(site.value)
    for estimator in ("mss", "mws"):
        parts = Decomposition(1.0, estimator=estimator).parts(site, 40)
        torch.testing.assert_close(sum(parts.values()), kl, rtol=0, atol=IDENTITY)


def test_mws_is_short_by_log_n_at_full_batch():
    site = site_of(posteriors(), 30)
    stratified, weighted = (aggregated(site, N, e) for e in ("mss", "mws"))
    close = {"rtol": 0, "atol": IDENTITY}
    torch.testing.assert_close(weighted[0], stratified[0] - math.log(N), **close)
    torch.testing.assert_close(weighted[1], stratified[1] - D * math.log(N), **close)


def mean_over_batches(estimator, size):
    """``E[q-hat(z)]`` of the first datum's draws over all batches that hold it, and the truth."""
    site = site_of(posteriors(), 6)
    truth = aggregated(site, N, "mss")[0][:, 0].exp()
    batches = [(0, *rest) for rest in itertools.combinations(range(1, N), size - 1)]
    found = [aggregated(subset(site, rows), N, estimator)[0][:, 0].exp() for rows in batches]
    return torch.stack(found).mean(0), truth, site


@pytest.mark.parametrize("size", [2, 3, 4])
def test_mss_is_unbiased_for_the_aggregated_density(size):
    mean, truth, _ = mean_over_batches("mss", size)
    torch.testing.assert_close(mean, truth, rtol=0, atol=IDENTITY)


def test_mws_has_the_bias_that_its_formula_says():
    mean, truth, site = mean_over_batches("mws", 3)
    own = subset(site, [0]).posterior.log_prob(site.value[:, :1]).exp()[:, 0]
    others = (N * truth - own) / (N - 1)
    torch.testing.assert_close(mean, (own + 2 * others) / (3 * N), rtol=0, atol=IDENTITY)
    assert bool((mean < truth).all())


def wrong_parts(change):
    def parts(site, num_data):
        joint, each = aggregated(site, num_data)
        conditional = site.posterior.log_prob(site.value)
        prior = site.prior.log_prob(site.value)
        return dict(zip(on_a_grid_names, change(conditional, joint, each, prior), strict=True))

    return parts


on_a_grid_names = ("mutual_information", "total_correlation", "dimension_wise")
WRONG_PARTS = {
    "tc upside down": wrong_parts(lambda c, j, e, p: (c - j, e - j, e - p)),
    "mi for tc": wrong_parts(lambda c, j, e, p: (j - e, c - j, e - p)),
    "prior forgotten": wrong_parts(lambda c, j, e, p: (c - j, j - e, e)),
    "weighted": lambda site, n: Decomposition(1.0, estimator="mws").parts(site, n),
    "batch for data": lambda site, n: Decomposition(1.0).parts(site, 2 * n),
    "draws of other data": lambda site, n: Decomposition(1.0).parts(
        site._replace(value=site.value.roll(1, 1)), n
    ),
}


@pytest.mark.parametrize("name", WRONG_PARTS)
def test_wrong_parts_fail(name):
    with pytest.raises(AssertionError):
        check_decomposition(WRONG_PARTS[name])


def test_each_part_has_its_own_weight():
    site = site_of(posteriors(), 9)
    parts = Decomposition().parts(site, N)
    penalty = Decomposition(2.0, -0.5, 3.0)
    means = {name: float(term.mean()) for name, term in parts.items()}
    expected = (
        2 * means["total_correlation"]
        - 0.5 * means["mutual_information"]
        + 3 * means["dimension_wise"]
    )
    assert float(penalty.of_site(site, 1.0, N)) == pytest.approx(expected, abs=IDENTITY)
    assert float(Decomposition().of_site(site, 1.0, N)) == 0


# --- the maximum mean discrepancy ---------------------------------------------------------------


def gaussian_mmd(loc, sd, width):
    """Squared MMD of ``N(loc, sd^2 I)`` to ``N(0, I)`` with ``exp(-|z - y|^2 / width)``."""
    size, distance = len(loc), float(loc.square().sum())

    def expected(variance, apart):
        return (width / (width + 2 * variance)) ** (size / 2) * math.exp(
            -apart / (width + 2 * variance)
        )

    return expected(2 * sd**2, 0) + expected(2, 0) - 2 * expected(sd**2 + 1, distance)


def check_mmd(statistic, kernel="rbf"):
    """The mean over batches of eight against the closed form, whatever the batch's size."""
    torch.manual_seed(5)
    loc, sd = torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64), 0.6
    z = loc + sd * torch.randn(12_000, 8, 3, dtype=torch.float64)
    y = torch.randn(12_000, 8, 3, dtype=torch.float64)
    assert float(z_score(statistic(z, y), gaussian_mmd(loc, sd, 6.0))) < SE


def test_mmd_of_gaussians_is_the_closed_form():
    check_mmd(Discrepancy(1.0, "rbf").statistic)


@pytest.mark.parametrize("kernel", ["rbf", "imq"])
def test_mmd_of_equal_distributions_is_zero_on_average(kernel):
    z, y = torch.randn(2, 20_000, 6, 2, dtype=torch.float64)
    assert float(z_score(Discrepancy(1.0, kernel).statistic(z, y), 0.0)) < SE


def test_imq_is_the_sum_over_scales():
    z, y = torch.randn(2, 1, 4, 3, dtype=torch.float64)
    distance = torch.cdist(z, y).square()
    widths = [6.0 * s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10)]
    expected = sum(w / (w + distance) for w in widths)
    torch.testing.assert_close(Discrepancy(1.0)._kernel(z, y), expected)


def test_one_datum_has_no_discrepancy():
    z, y = torch.randn(2, 4, 1, 3, dtype=torch.float64)
    value = Discrepancy(1.0).statistic(z.requires_grad_(), y)
    assert value.tolist() == [0.0] * 4
    value.sum().backward()
    assert bool((z.grad == 0).all())


def biased(z, y):
    kernel = Discrepancy(1.0, "rbf")._kernel
    return (kernel(z, z) + kernel(y, y) - 2 * kernel(z, y)).mean((1, 2))


WRONG_MMD = {
    "diagonal left in": biased,
    "cross term once": lambda z, y: (
        Discrepancy(1.0, "rbf").statistic(z, y) + Discrepancy(1.0, "rbf")._kernel(z, y).mean((1, 2))
    ),
    "other width": Discrepancy(1.0, "rbf", 1.5).statistic,
    "other kernel": Discrepancy(1.0, "imq").statistic,
    "not centred": lambda z, y: Discrepancy(1.0, "rbf").statistic(z, y - y.mean(1, keepdim=True)),
}


@pytest.mark.parametrize("name", WRONG_MMD)
def test_wrong_mmd_fails(name):
    with pytest.raises(AssertionError):
        check_mmd(WRONG_MMD[name])


# --- moments, free dimensions -------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_second_kind_is_the_covariance_of_the_aggregated_posterior(full):
    posterior = posteriors(full=full)
    site = site_of(posterior, 20_000)
    flat = site.value.reshape(-1, D)
    centred = flat - flat.mean(0)
    products = (centred[:, :, None] * centred[:, None]).reshape(-1, N, D * D)
    covariance = Moments(1.0, 1.0, "ii").covariance(site)
    assert float(z_score(products.mean(1), covariance.reshape(-1)).max()) < SE
    between = torch.cov(posterior.mean.T, correction=0)
    torch.testing.assert_close(Moments(1.0, 1.0, "i").covariance(site), between)


def test_dip_is_zero_at_the_identity_and_weighs_both_parts():
    loc = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)
    whole = dist.Normal(loc, math.sqrt(0.5)).to_event(1)
    assert float(Moments(3.0, 2.0).of_site(site_of(whole, 2), 1.0, 4)) == pytest.approx(0)
    assert float(Moments(3.0, 2.0, "i").of_site(site_of(whole, 2), 1.0, 4)) == pytest.approx(1.0)
    tilted = dist.Normal(torch.stack([loc[:, 0], loc[:, 0]], 1), math.sqrt(0.5)).to_event(1)
    found = float(Moments(3.0, 2.0).of_site(site_of(tilted, 2), 1.0, 4))
    assert found == pytest.approx(3.0 * 2 * 0.25)  # C = [[1, .5], [.5, 1]]


def test_free_dimensions_make_the_cost_a_maximum():
    model, x = linear_gaussian(8)
    guide = AffineGuide().double()
    with torch.no_grad():
        guide.shift.copy_(torch.tensor([1.5, 0.0]))
        guide.map[1] = 0
        guide.log_sd.copy_(torch.tensor([-1.0, -0.1]))
    free, plain = (
        evaluated(o, model, guide, x) for o in (recipes.free_bits_vae(0.3), pvae.vae(analytic_kl=1))
    )
    loc, sd = x @ guide.map.T + guide.shift, guide.log_sd.exp()
    each = (0.5 * (loc**2 + sd**2 - 1) - guide.log_sd).mean(0)
    assert float(each[0].detach()) > 0.3 > float(each[1].detach())
    cost = float((free.loss - plain.loss).detach())
    assert cost == pytest.approx(0.3 - float(each[1].detach()), abs=1e-9)
    free.loss.backward()
    gradient = guide.log_sd.grad.clone()
    guide.zero_grad()
    evaluated(pvae.vae(analytic_kl=True), model, guide, x, beta=0.0).loss.backward()
    assert float(gradient[1]) == pytest.approx(float(guide.log_sd.grad[1]), abs=1e-9)
    assert float(gradient[0]) != pytest.approx(float(guide.log_sd.grad[0]), abs=1e-3)


def evaluated(objective, model, guide, x, *, beta=1.0, seed=4, **options):
    layout = objective.prepare(model, guide, x)
    torch.manual_seed(seed)
    return objective.evaluate(model, guide, x, layout=layout, beta=beta, **options)


# --- the discriminator --------------------------------------------------------------------------


def test_discriminator_learns_the_total_correlation():
    """Draws of a correlated Gaussian, whose total correlation is ``-log(1 - r^2)/2``."""
    torch.manual_seed(2)
    correlation = 0.8
    tril = torch.linalg.cholesky(torch.tensor([[1, correlation], [correlation, 1]]))
    penalty = DensityRatio(1.0, hidden=(32,))
    posterior = dist.Normal(torch.zeros(2), 1.0).to_event(1).expand([1, 512])

    def site():
        return LatentSite(torch.randn(1, 512, 2) @ tril.T, posterior, posterior)

    penalty.start({"z": site()})
    (network,) = penalty.networks().values()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(250):
        optimizer.zero_grad()
        penalty.of_site(site(), 1.0, 512).backward()
        optimizer.step()
    with torch.no_grad():
        found = torch.stack([network(site().value).mean() for _ in range(40)])
    truth = -0.5 * math.log(1 - correlation**2)
    assert float(found.mean()) == pytest.approx(truth, rel=0.15)


def test_pair_and_discriminator_follow_their_own_loss():
    penalty, site = DensityRatio(2.0, hidden=(8,)), site_of(posteriors(), 1)
    penalty.start({"z": site})
    (network,) = penalty.networks().values()
    value = site.value.clone().requires_grad_()
    penalty.of_site(site._replace(value=value), 1.0, N).backward()
    of_pair, of_network = value.grad, [p.grad.clone() for p in network.parameters()]
    again = site.value.clone().requires_grad_()
    network.zero_grad()
    (2.0 * network(again).mean()).backward()
    torch.testing.assert_close(of_pair, again.grad)
    other = DensityRatio(0.0, hidden=(8,))
    other._network.update(penalty._network)
    torch.manual_seed(11)
    network.zero_grad()
    other.of_site(site, 1.0, N).backward()
    first = [p.grad.clone() for p in network.parameters()]
    torch.manual_seed(11)
    network.zero_grad()
    penalty.of_site(site, 1.0, N).backward()
    for a, b in zip(first, network.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad)
    assert any(bool(g.abs().max() > 0) for g in of_network)


# --- terms of the KL ----------------------------------------------------------------------------


def test_capacity_pulls_the_kl_to_it_from_both_sides():
    kl = {"a": torch.full((2, 3), 1.0, requires_grad=True), "b": torch.full((2, 3), 0.5)}
    for nats, sign in ((1.0, 1), (2.0, -1)):
        kl["a"].grad = None
        cost = Capacity(10.0, 2.0)(kl, nats)
        assert float(cost.detach()) == pytest.approx(10 * 0.5)
        cost.backward()
        torch.testing.assert_close(kl["a"].grad, torch.full((2, 3), sign * 10 / 6))


def test_capacity_has_its_own_schedule_and_leaves_the_bound_alone():
    objective = recipes.capacity_vae(7.0, 3.0, 100)
    assert [objective.schedule(step) for step in (0, 50, 100, 900)] == [0, 1.5, 3, 3]
    model, x = linear_gaussian(8)
    pair = model, AffineGuide().double(), x
    plain, held = evaluated(pvae.vae(), *pair), evaluated(objective, *pair, beta=2.0)
    torch.testing.assert_close(plain.bound, held.bound)


def test_penalty_beside_a_capacity_weighs_the_kl_by_one():
    model, x = linear_gaussian(8)
    pair = model, AffineGuide().double(), x
    free = FreeDimensions(9.0)
    alone = evaluated(pvae.vae(), *pair)
    with_free = evaluated(pvae.vae(penalty=free), *pair)
    capped = evaluated(pvae.vae(kl_term=Capacity(1.0, 25.0)), *pair, beta=25.0)
    both = evaluated(pvae.vae(kl_term=Capacity(1.0, 25.0), penalty=free), *pair, beta=25.0)
    torch.testing.assert_close(both.loss - capped.loss, with_free.loss - alone.loss)


def test_fit_raises_the_capacity_without_a_warning():
    model, x = linear_gaussian(64)
    guide = AffineGuide().double()
    run = pvae.fit(
        model, guide, x, objective=recipes.capacity_vae(50.0, 1.0, 80), epochs=120,
        batch_size=64, lr=3e-2, progress=False,
    )  # fmt: skip
    assert run.history[-1]["beta"] == 1.0
    assert run.history[-1]["kl"] == pytest.approx(1.0, abs=0.25)


def test_balanced_weighs_by_use_in_the_warm_up_alone():
    kl = {"a": torch.tensor([[3.0, 1.0]]), "b": torch.tensor([[0.5, 0.5]])}
    shares = torch.tensor([2.0, 0.5]) / 1.25
    expected = 0.5 * (shares[0] * kl["a"][0] + shares[1] * kl["b"][0])
    torch.testing.assert_close(Balanced()(kl, 0.5), expected)
    torch.testing.assert_close(Balanced()(kl, 1.0), torch.tensor([3.5, 1.5]))
    torch.testing.assert_close(Balanced()(kl, torch.tensor(0.5)), expected)


def test_free_bits_are_a_term():
    model, x = linear_gaussian(8)
    pair = model, AffineGuide().double(), x
    one, other = (evaluated(pvae.vae(3, **o), *pair)
                  for o in ({"free_bits": 0.5}, {"kl_term": FreeBits(0.5)}))  # fmt: skip
    torch.testing.assert_close(one.loss, other.loss)


# --- in an objective ----------------------------------------------------------------------------


def test_loss_is_the_bound_and_the_penalty_and_the_bound_is_left_alone():
    model, x = linear_gaussian(8)
    pair = model, AffineGuide().double(), x
    objective = recipes.beta_tcvae(5.0)
    loss, plain = (evaluated(o, *pair, num_data=100) for o in (objective, pvae.vae()))
    torch.testing.assert_close(loss.bound, plain.bound)
    penalty = objective.penalty(loss.particles.sites, 1.0, 100)
    torch.testing.assert_close(loss.loss, plain.loss + penalty)
    assert float(penalty.detach()) != 0


def test_recipes_are_one_line_each():
    options = {"num_particles": 1}
    assert recipes.beta_tcvae(4.0) == pvae.Objective(penalty=Decomposition(3.0), **options)
    assert recipes.wae(5.0) == pvae.Objective(beta=0.0, penalty=Discrepancy(5.0))
    assert recipes.info_vae(1.0, 5.0) == recipes.wae(5.0)
    assert recipes.info_vae(0.0, 1.0) == pvae.Objective(penalty=Discrepancy(0.0))
    assert recipes.dip_vae(1.0, 2.0, "i") == pvae.Objective(penalty=Moments(1.0, 2.0, "i"))
    assert recipes.factor_vae(3.0) == pvae.Objective(penalty=DensityRatio(3.0))
    built = catalogue.build_objective("iwae", {"penalty": "mmd(3.0)", "num_particles": 4})
    assert built == pvae.Objective(bound=iw_elbo, num_particles=4, penalty=Discrepancy(3.0))
    assert catalogue.build_objective("vae", {"penalty": "mmd"}).penalty == Discrepancy(10.0)
    assert catalogue.build_objective("vae", {"kl_term": "balanced"}).kl_term == Balanced()
    assert catalogue.build_objective("beta-tcvae", {"beta": "4"}) == recipes.beta_tcvae(4.0)
    with pytest.raises(OptionError, match="bound 'renyi' cannot be built"):
        catalogue.build_objective("vae", {"bound": "renyi"})


RECIPES = {
    "beta_tcvae": lambda: recipes.beta_tcvae(4.0),
    "beta_tcvae mws": lambda: recipes.beta_tcvae(4.0, estimator="mws", num_particles=2),
    "factor_vae": lambda: recipes.factor_vae(5.0),
    "dip_vae": lambda: recipes.dip_vae(),
    "info_vae": lambda: recipes.info_vae(),
    "wae": lambda: recipes.wae(kernel="rbf"),
    "capacity_vae": lambda: recipes.capacity_vae(10.0, 3.0, 10),
    "free_bits_vae": lambda: recipes.free_bits_vae(0.3),
    "balanced_vae": lambda: recipes.balanced_vae(10),
    "vimco": lambda: recipes.vimco(4),
    "renyi_vae": lambda: recipes.renyi_vae(0.5, 4),
    "miwae": lambda: recipes.miwae(2, 4),
    "piwae": lambda: recipes.piwae(2, 4),
    "ciwae": lambda: recipes.ciwae(0.5, 4),
    "ciwae dreg": lambda: recipes.ciwae(0.5, 4, gradient=pvae.gradients.doubly_reparameterized),
    "tvo": lambda: recipes.tvo(4),
    "chivi": lambda: recipes.chivi(2.0, 4),
}


def take_steps(name, make):
    torch.manual_seed(0)
    model = VAE(6, z_dim=2, hidden=(8,), likelihood="gaussian").double()
    guide = Gaussian(6, model.latents, hidden=(8,)).double()
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)).double()
    objective = RECIPES[name]()
    layout = objective.prepare(model, guide, x[:10])
    weights = parameters(model, guide, x[:10]) | objective.parameters()
    optimizer = build_optimizer("adam", list(weights.values()), lr=1e-2)
    cpu = torch.device("cpu")
    problem = Problem(model, guide, objective, optimizer, weights, layout, x, cpu, 0, 40)
    step = make(problem)
    found = [step((torch.arange(10) * (n + 1)) % 40, n, 0.2 * n) for n in range(4)]
    return torch.cat([*found, *[p.detach().flatten() for p in weights.values()]])


@pytest.mark.parametrize("name", RECIPES)
def test_staged_equals_eager(name, monkeypatch):
    monkeypatch.setattr("pvae.engine.staged.lower", lambda graph, inputs: graph)
    eager = take_steps(name, Eager)
    make = lambda p: Staged(p, torch.arange(10), compiled=True)  # noqa: E731  (the update inside)
    assert torch.allclose(take_steps(name, make), eager, rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore:the KL weight ends at")
def test_penalties_do_what_they_are_for():
    """On correlated data, with a KL too light to keep the aggregated posterior at the prior."""
    torch.manual_seed(3)
    factors = torch.randn(400, 2) @ torch.tensor([[1.0, 0.9], [0.0, 0.45]])
    x = torch.cat([factors, factors + 0.1 * torch.randn(400, 2)], 1)
    start = VAE(4, z_dim=2, hidden=(16,), likelihood="gaussian")
    first = Gaussian(4, start.latents, hidden=(16,))
    penalised = [None, Decomposition(2.0), Moments(2.0, 2.0), Discrepancy(40.0)]
    sites = []
    for penalty in penalised:
        model, guide = copy.deepcopy(start), copy.deepcopy(first)
        objective = pvae.Objective(beta=0.05, penalty=penalty)
        pvae.fit(model, guide, x, objective=objective, epochs=25, batch_size=100, lr=1e-2,
                 engine="eager", progress=False)  # fmt: skip
        layout = pvae.vae().prepare(model, guide, x)
        torch.manual_seed(0)
        with torch.no_grad():
            sites.append(pvae.particles.latent_sites(model, guide, x, 1, layout)["z"])
    for penalty, site in zip(penalised[1:], sites[1:], strict=True):
        left, without = (float(penalty.of_site(s, 1.0, 400)) for s in (site, sites[0]))
        assert left < 0.5 * without, penalty


def test_discriminator_is_trained_by_fit_and_by_svi_and_not_kept_between_runs():
    model, x = linear_gaussian(32)
    guide = AffineGuide().double()
    objective = pvae.Objective(penalty=DensityRatio(1.0, hidden=(8,)))
    objective.prepare(model, guide, x)
    before = objective.parameters()
    pvae.fit(model, guide, x, objective=objective, epochs=2, batch_size=16, progress=False)
    after = objective.parameters()
    assert before.keys() == after.keys()
    assert len(after) == 4
    assert all(before[name] is not after[name] for name in after)
    assert float(after["objective.discriminator.2.bias"].detach().abs().max()) > 0
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=objective)
    svi.step(x)
    svi.step(x)
    assert float(objective.parameters()["objective.discriminator.2.bias"].detach().abs().max()) > 0


# --- refused ------------------------------------------------------------------------------------


class LaplaceGuide(nn.Module):
    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Laplace(x[:, :2], 1.0).to_event(1))


class FlowGuide(nn.Module):
    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            base = dist.Normal(x[:, :2], 1.0).to_event(1)
            flow = dist.transforms.LowerCholeskyAffine(torch.zeros(2), torch.eye(2))
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))


def prepared(objective, guide=None, pair=None):
    if pair is not None:
        model, guide, x = pair.programs(4)
    else:
        model, x = linear_gaussian(4)
        model, x = model.float(), x.float()
    return lambda: objective().prepare(model, guide, x)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (prepared(recipes.beta_tcvae, FlowGuide()), ObjectiveError,
         ["each dimension of site 'z' on its own", "mmd"]),
        (prepared(recipes.dip_vae, LaplaceGuide()), ObjectiveError,
         ["moments of Gaussian posteriors", "'z'", "mmd"]),
        (prepared(recipes.free_bits_vae, FlowGuide()), ObjectiveError,
         ["does not factorise", "free_bits="]),
        (prepared(recipes.beta_tcvae, pair=TwoSites()), ObjectiveError,
         ["one latent site", "'z2', 'z1'"]),
        (prepared(recipes.beta_tcvae, pair=DiscreteSite()), ObjectiveError,
         ["no pathwise derivative"]),
        (lambda: pvae.Objective(gradient=score_function, num_particles=2,
                                penalty=Discrepancy(1.0)), ObjectiveError,
         ["through the draws", "gradient=pathwise"]),
        (lambda: pvae.Objective(vectorize=False, penalty=Discrepancy(1.0)), ObjectiveError,
         ["vectorize=False"]),
        (lambda: pvae.Objective(bound=iw_elbo, kl_term=Balanced()), ObjectiveError,
         ["kl_term=Balanced()", "bound=elbo"]),
        (lambda: pvae.Objective(free_bits=1.0, kl_term=Balanced()), ObjectiveError,
         ["leave one of them out"]),
        (lambda: recipes.capacity_vae(beta=2.0), ObjectiveError, ["leave beta at 1"]),
        (lambda: recipes.beta_tcvae(Linear(10)), ObjectiveError, ["by a number"]),
        (lambda: recipes.info_vae(alpha=2.0), ObjectiveError, ["alpha <= 1"]),
        (lambda: Decomposition(1.0, estimator="mean"), OptionError, ["'mss' or 'mws'"]),
        (lambda: Discrepancy(-1.0), OptionError, ["weight of 0 or more"]),
        (lambda: Discrepancy(1.0, "box"), OptionError, ["'imq' or 'rbf'"]),
        (lambda: Discrepancy(1.0, scale=0.0), OptionError, ["scale above 0"]),
        (lambda: Moments(1.0, 1.0, "iii"), OptionError, ["'i' or 'ii'"]),
        (lambda: Capacity(0.0, 1.0), OptionError, ["gamma above 0"]),
        (lambda: FreeBits(-1.0), OptionError, ["0 or more"]),
        (lambda: FreeDimensions(-1.0), OptionError, ["0 or more"]),
        (lambda: DensityRatio(-1.0), OptionError, ["0 or more"]),
    ],
)  # fmt: skip
def test_unsound_is_refused_with_the_alternative(build, error, words):
    with pytest.raises(error) as raised:
        build()
    for word in words:
        assert word in str(raised.value)


def test_auxiliary_draws_of_the_guide_are_refused_where_the_posterior_counts():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(x, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(torch.stack([a, a], -1), 1.0).to_event(1))

    x = torch.randn(4)
    with pytest.raises(ObjectiveError, match=r"draws 'a' beside it.*mmd"):
        recipes.dip_vae().prepare(model, guide, x)
    layout = recipes.wae().prepare(model, guide, x)
    assert bool(recipes.wae().evaluate(model, guide, x, layout=layout, beta=0.0).loss.isfinite())


def test_frozen_penalties_can_be_compared_and_replaced():
    assert dataclasses.replace(Discrepancy(1.0), weight=2.0) == Discrepancy(2.0)
