"""Posterior families: their gradients, the posteriors they reach, and what they refuse."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pvae
from pvae.codebooks import nearest_code
from pvae.errors import OptionError, ProgramError, PvaeError
from pvae.guides.bottom_up import BottomUp
from pvae.guides.categorical import Categorical
from pvae.guides.downward import Downward
from pvae.guides.flow import Flow
from pvae.guides.gaussian import Gaussian
from pvae.guides.low_rank import LowRank
from pvae.guides.mixture import Mixture
from pvae.guides.semi_amortised import SemiAmortised
from pvae.guides.top_down import TopDown
from pvae.guides.vector_quantised import VectorQuantised
from pvae.mixtures import DiagonalNormalMixture
from pvae.models.factor_analysis import FactorAnalysis
from pvae.models.gaussian_mixture import GaussianMixture
from pvae.models.hierarchical import Hierarchical
from pvae.models.ladder import Ladder
from pvae.models.two_layer import TwoLayer
from pvae.models.vae import VAE
from pvae.models.vq_vae import VQVAE
from pvae.relaxations import RelaxedBernoulli, RelaxedOneHot

SE = 4.5


def fitted_gap(model: nn.Module, guide: nn.Module, x: Tensor, *, epochs: int = 150) -> float:
    """Mean of ``log p(x) - ELBO``, nats per datum, after training the guide alone."""
    model.requires_grad_(False)
    pvae.fit(model, guide, x, objective=pvae.Objective(num_particles=8), epochs=epochs,
             batch_size=len(x), lr=2e-2, engine="eager", progress=False)  # fmt: skip
    with torch.no_grad():
        torch.manual_seed(0)
        elbo = pvae.draw(model, guide, x, 4000).log_weights.mean(0)
    return float((model.log_evidence(x) - elbo).detach().mean())


# --- mixture of Gaussians ------------------------------------------------------------------------


def gaussian_mixture(dim: int, copies: int = 1):
    torch.manual_seed(dim)
    logits, loc = torch.randn(3).double(), 1.5 * torch.randn(3, dim).double()
    scale = 0.3 + torch.rand(3, dim).double()
    return [p.expand(copies, *p.shape).clone().requires_grad_() for p in (logits, loc, scale)]


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_mixture_density_is_that_of_torch(dim):
    logits, loc, scale = gaussian_mixture(dim)
    ours = DiagonalNormalMixture(logits, loc, scale).expand((7, 1))
    theirs = dist.MixtureSameFamily(
        dist.Categorical(logits=logits), dist.Normal(loc, scale).to_event(1)
    )
    z = ours.sample()
    assert (ours.log_prob(z) - theirs.log_prob(z)).abs().max() < 1e-10
    assert (ours.mean - theirs.mean).abs().max() < 1e-10
    assert (ours.variance - theirs.variance).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_mixture_for_all_data_is_scored_by_products(dtype):
    """Sharp components far from zero, whose squares cancel; also as a plate widens it."""
    torch.manual_seed(0)
    logits, loc = torch.randn(40), 5 + torch.randn(40, 20)
    scale = 0.01 + 0.2 * torch.rand(40, 20)
    z = loc[:30] + scale[:30] * torch.randn(7, 30, 20)

    def scored(kind, of):
        logits_, loc_, scale_, z_ = (
            p.to(of).detach().requires_grad_() for p in (logits, loc, scale, z)
        )
        if kind is DiagonalNormalMixture:
            mixture = DiagonalNormalMixture(logits_, loc_, scale_).expand((30,))
        else:
            normal = dist.Normal(loc_, scale_).to_event(1)
            mixture = kind(dist.Categorical(logits=logits_), normal)
        value = mixture.log_prob(z_)
        return value, torch.autograd.grad(value.sum(), (logits_, loc_, scale_, z_))

    truth, slopes = scored(dist.MixtureSameFamily, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found, gradients = scored(DiagonalNormalMixture, dtype)
    assert found.dtype == dtype
    bound = 1e-10 if dtype == torch.float64 else 3e-6
    assert ((found - truth).abs() / truth.abs().clamp(min=1)).max() < bound
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert (gradient - slope).abs().max() < 30 * bound * slope.abs().max()


def test_a_prior_draws_without_the_derivative():
    mixture = DiagonalNormalMixture(
        torch.zeros(3), torch.randn(3, 2, requires_grad=True), torch.ones(3, 2),
        reparameterized=False,
    )  # fmt: skip
    assert not mixture.expand((5,)).has_rsample
    assert not mixture.expand((5,))().requires_grad


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_mixture_gradient_is_that_of_its_moments(dim):
    """``E[z_i z_j]`` and ``E[z_i]`` are known functions of weights, means and scales."""
    copies = 20_000
    weight = torch.randn(dim, dim).double()
    parameters = gaussian_mixture(dim, copies)
    z = DiagonalNormalMixture(*parameters).rsample()
    quadratic = torch.einsum("ni,ij,nj->n", z, weight, z) + z.sum(-1)
    found = torch.autograd.grad(quadratic.sum(), parameters)
    logits, loc, scale = gaussian_mixture(dim)
    second = torch.diag_embed(scale[0].square()) + loc[0].unsqueeze(-1) * loc[0].unsqueeze(-2)
    each = (second * weight).sum((-1, -2)) + loc[0].sum(-1)
    truths = torch.autograd.grad((logits[0].softmax(-1) * each).sum(), [logits, loc, scale])
    for gradient, truth in zip(found, truths, strict=True):
        error = (gradient.mean(0) - truth[0]).abs() / (gradient.std(0) / math.sqrt(copies))
        assert error.max() < SE
    naive = loc.new_zeros(3)  # a draw whose component is not differentiated has no such gradient
    error = (naive - truths[0][0]).abs() / (found[0].std(0) / math.sqrt(copies))
    assert error.max() > SE


# --- a Gaussian posterior ------------------------------------------------------------------------


def linear_gaussian() -> tuple[FactorAnalysis, Tensor]:
    torch.manual_seed(5)
    model = FactorAnalysis(4, z_dim=3)
    with torch.no_grad():
        model.loadings.mul_(1.5)
        x = model(size=50)
    return model, x


@pytest.mark.parametrize(
    ("family", "options", "largest"),
    [
        (Gaussian, {"covariance": "full"}, 0.05),
        (LowRank, {"rank": 2}, 0.1),
        (Flow, {"kind": "iaf", "transform_hidden": (16,)}, 0.08),
        (Flow, {"kind": "coupling", "transform_hidden": (16,)}, 0.08),
    ],
    ids=["full", "low-rank", "iaf", "coupling"],
)
def test_families_reach_a_gaussian_posterior(family, options, largest):
    """Linear encoders: the exact posterior is in the family or near; mean field stays 0.17 off."""
    model, x = linear_gaussian()
    torch.manual_seed(0)
    gap = fitted_gap(model, family(4, model.latents, hidden=(), **options), x)
    assert gap < largest
    assert gap > -0.01


def test_mean_field_does_not_reach_it():
    model, x = linear_gaussian()
    precision = model.posterior(x)["z"].precision_matrix[0].detach()
    # KL of the best diagonal Gaussian, whose precision is the diagonal of the exact one's
    best = 0.5 * float(precision.diagonal().log().sum() - precision.logdet())
    gap = fitted_gap(model, Gaussian(4, model.latents, hidden=()), x)
    assert best > 0.15
    assert gap == pytest.approx(best, abs=0.03)


# --- a posterior with two modes ------------------------------------------------------------------


class Folded(nn.Module):
    """``z ~ N(0, I_2)``, ``x ~ N(|z_1| + z_2 / 2, 0.3)``: two modes, evidence by quadrature."""

    latents = {"z": (2,)}  # noqa: RUF012

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", self.likelihood(z), obs=x)

    def likelihood(self, z: Tensor):
        return dist.Normal((z[..., :1].abs() + 0.5 * z[..., 1:]), 0.3).to_event(1)

    def log_evidence(self, x: Tensor) -> Tensor:
        side = torch.linspace(-6, 6, 301)
        z = torch.cartesian_prod(side, side)
        log_prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        terms = torch.stack([self.likelihood(z).log_prob(row) + log_prior for row in x])
        return terms.logsumexp(-1) + 2 * math.log(side.diff()[0])


def test_mixture_and_flow_beat_mean_field_on_two_modes():
    x = torch.tensor([[1.6], [2.2]])
    gaps = {}
    for name, family, options in [
        ("mean field", Gaussian, {}),
        ("mixture", Mixture, {"num_components": 4}),
        ("nsf", Flow, {"kind": "nsf", "transforms": 2, "transform_hidden": (16,)}),
    ]:
        model = Folded()
        torch.manual_seed(1)
        guide = family(1, model.latents, hidden=(16,), **options)
        gaps[name] = fitted_gap(model, guide, x, epochs=150)
    assert gaps["mean field"] > 0.6  # one mode of two: log 2 at least
    assert -0.01 < gaps["mixture"] < 0.7 * gaps["mean field"]
    assert -0.01 < gaps["nsf"] < 0.8 * gaps["mean field"]


# --- several layers ------------------------------------------------------------------------------


def test_top_down_is_the_product_of_evidence_and_prior():
    torch.manual_seed(0)
    model = Ladder(6, z_dims=(3, 2), widths=(8, 8)).double()
    guide = TopDown(6, model, hidden=(8,), width=8).double()
    above = torch.randn(5, 2, dtype=torch.float64)
    loc, scale = torch.randn(5, 3).double(), 0.5 + torch.rand(5, 3).double()
    mean, sd = guide._with_prior("z1", above, loc, scale)
    prior = model.conditional("z1", above).base_dist
    z = torch.linspace(-3, 3, 7).double()[:, None, None]
    product = dist.Normal(loc, scale).log_prob(z) + prior.log_prob(z)
    ratio = product - dist.Normal(mean, sd).log_prob(z)
    assert (ratio - ratio[:1]).abs().max() < 1e-10
    wrong = product - dist.Normal((loc + prior.loc) / 2, sd).log_prob(z)
    assert (wrong - wrong[:1]).abs().max() > 1e-3


def test_evidence_of_two_layers_does_not_depend_on_the_guide():
    torch.manual_seed(0)
    model = TwoLayer(6, z_dims=(2, 2), hidden=(8,), upper_hidden=(8,)).double()
    x = (torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.5).double()
    found = []
    for guide in (
        BottomUp(6, model.latents, hidden=(8,), upper_hidden=(8,)),
        TopDown(6, model, hidden=(8,), width=8),
        Gaussian(6, model.latents, hidden=(8,)),
        Flow(6, model.latents, hidden=(8,), transform_hidden=(8,)),
    ):
        found.append(pvae.evidence.importance(model, guide.double(), x, 20_000, seed=0))
    for other in found[1:]:
        error = (other.stderr.square() + found[0].stderr.square()).sqrt()
        assert ((other.log_evidence - found[0].log_evidence).abs() / error).max() < SE


def test_bottom_up_draws_against_the_models_order():
    model = Ladder(6, z_dims=(4, 3, 2), widths=(8, 8, 8))
    assert list(model.latents) == ["z3", "z2", "z1"]
    guide = BottomUp(6, model.latents, hidden=(8,), upper_hidden=(8,))
    nodes = pyro.poutine.trace(guide).get_trace(torch.zeros(5, 6)).nodes
    assert [n for n in nodes if n in model.latents] == ["z1", "z2", "z3"]


# --- discrete sites ------------------------------------------------------------------------------


class Codes(nn.Module):
    """Two one-hot units of three categories and four bits, all visible to a linear decoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(10, 6))
        self.register_buffer("logits", torch.zeros(2, 3))

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        return {"code": (2, 3), "bits": (4,)}

    def forward(self, x: Tensor | None = None, size: int = 1) -> Tensor:
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            code = pyro.sample("code", dist.OneHotCategorical(logits=self.logits).to_event(1))
            half = torch.full((4,), 0.5).to(code)
            bits = pyro.sample("bits", dist.Bernoulli(half).to_event(1))
            hidden = torch.cat([code.flatten(-2), bits], -1)
            return pyro.sample("x", dist.Bernoulli(logits=hidden @ self.weight).to_event(1), obs=x)


@pytest.mark.parametrize("relaxation", ["none", "straight_through", "gumbel_softmax"])
def test_the_bound_of_a_relaxed_guide_is_that_of_the_discrete_one(relaxation):
    """The same logits weigh the same draws alike, and the evidence by enumeration bounds both."""
    model = Codes()
    torch.manual_seed(1)
    guide = Categorical(6, model, relaxation=relaxation, hidden=(8,))
    x = (torch.rand(3, 6) < 0.5).float()
    particles = pvae.draw(model, guide, x, 20_000)
    code, bits = particles.values["code"], particles.values["bits"]
    assert set(code.unique().tolist()) == set(bits.unique().tolist()) == {0.0, 1.0}
    posterior = guide.posterior(x)
    plain = dist.OneHotCategorical(logits=posterior["code"].base_dist.logits).to_event(1)
    assert (particles.log_q["code"] - plain.log_prob(code)).abs().max() < 1e-5
    weights = particles.log_weights.detach().exp()
    with torch.no_grad():
        exact = _enumerated(model, x)
        error = (weights.mean(0) - exact).abs() / (weights.std(0) / math.sqrt(20_000))
    assert error.max() < SE


def _enumerated(model: Codes, x: Tensor) -> Tensor:
    one, bits = torch.eye(3), torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)
    rows = [torch.cat([one[a], one[b], c]) for a in range(3) for b in range(3) for c in bits]
    likelihood = dist.Bernoulli(logits=(torch.stack(rows) @ model.weight)[:, None]).to_event(1)
    return likelihood.log_prob(x).exp().mean(0)


def test_relaxed_gradients_are_what_they_say():
    """Straight-through: exactly that of the mean. Gumbel-softmax: consistent as it grows cold."""
    logits = torch.tensor([0.3, -0.5, 1.0]).double().expand(50_000, 3).clone().requires_grad_()
    weight = torch.tensor([1.0, -2.0, 0.5]).double()
    (truth,) = torch.autograd.grad((logits.softmax(-1) @ weight).sum(), logits)
    z = RelaxedOneHot(logits, relaxation="straight_through").rsample()
    (found,) = torch.autograd.grad((z @ weight).sum(), logits)
    assert (found - truth).abs().max() < 1e-12
    z = RelaxedOneHot(logits, relaxation="gumbel_softmax", temperature=0.1).rsample()
    (found,) = torch.autograd.grad((z @ weight).sum(), logits)
    error = (found.mean(0) - truth[0]).abs()
    assert (error < SE * found.std(0) / math.sqrt(50_000) + 0.02).all()  # its bias at 0.1
    unit = logits[:, 0].detach().requires_grad_()
    mean = torch.sigmoid(unit[0]).item()
    z = RelaxedBernoulli(unit, relaxation="gumbel_softmax", temperature=0.1).rsample()
    (found,) = torch.autograd.grad(z.sum(), unit)
    expected = mean * (1 - mean)
    assert abs(float(found.mean()) - expected) < SE * float(found.std()) / 200 + 0.02


# --- semi-amortised ------------------------------------------------------------------------------


@pytest.mark.parametrize("through", [True, False])
def test_steps_raise_the_bound_of_an_untrained_encoder(through):
    model, x = linear_gaussian()
    bounds = {}
    for steps in (1, 10, 40):
        torch.manual_seed(2)
        guide = SemiAmortised(4, model, steps=steps, through=through, hidden=(8,))
        with torch.no_grad():
            bounds[steps] = float(pvae.draw(model, guide, x, 500).log_weights.mean())
    exact = float(model.log_evidence(x).mean().detach())
    assert bounds[1] < bounds[10] < bounds[40] < exact


def test_the_improved_posterior_is_the_same_whenever_it_is_asked_for():
    model = Ladder(6, z_dims=(3, 2), widths=(8, 8))
    guide = SemiAmortised(6, model, steps=2, hidden=(8,))
    first, second = guide.refined(BITS), guide.refined(BITS)
    assert all(torch.equal(first[n][0], second[n][0]) for n in first)
    particles = pvae.draw(model, guide, BITS, 3, score=True)
    for name, term in particles.score.items():
        assert (term - particles.log_q[name]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["iaf", "nsf"])
def test_flows_weigh_fixed_draws_alike(kind):
    """What stick-the-landing and DReG ask for: the density of the values held fixed."""
    model = Ladder(6, z_dims=(3, 2), widths=(8, 8))
    guide = Flow(6, model.latents, kind=kind, hidden=(8,), transform_hidden=(8,))
    particles = pvae.draw(model, guide, BITS, 3, score=True)
    for name, term in particles.score.items():
        assert (term - particles.log_q[name]).abs().max() < 1e-4


def test_through_the_steps_the_gradient_is_the_whole_one():
    """By differences in float64, at the same noise; without it, it is another one."""
    x = torch.randn(3, 4, dtype=torch.float64)
    gradients = {}
    for through in (True, False):
        torch.manual_seed(3)
        model = FactorAnalysis(4, z_dim=2).double()
        guide = SemiAmortised(4, model, steps=2, step_size=0.1, through=through, hidden=(5,))
        guide = guide.double()

        def loss(guide=guide):
            torch.manual_seed(4)
            return sum((a * 2 + b.exp()).sum() for a, b in guide.refined(x).values())

        weight = guide.heads["z"].weight
        gradients[through] = float(torch.autograd.grad(loss(), weight)[0][0, 0])
        with torch.no_grad():
            weight[0, 0] += 1e-6
            above = loss()
            weight[0, 0] -= 2e-6
            by_differences = float(above - loss()) / 2e-6
    assert gradients[True] == pytest.approx(by_differences, rel=1e-5)
    assert abs(gradients[False] - by_differences) > 1e-3 * abs(by_differences)


# --- vector quantisation -------------------------------------------------------------------------


def test_vector_quantised_bound_is_a_bound_and_the_prior_raises_it():
    torch.manual_seed(0)
    model = VQVAE(6, num_positions=2, num_codes=4, code_dim=3, hidden=(8,)).double()
    guide = VectorQuantised(6, model, hidden=(8,)).double()
    x = (torch.rand(30, 6) < 0.4).double()
    pvae.fit(model, guide, x, epochs=20, batch_size=10, progress=False, engine="eager")
    with torch.no_grad():
        grid = torch.cartesian_prod(torch.arange(4), torch.arange(4))

        def evidence():
            log_prior = model.logits.log_softmax(-1)
            each = log_prior[0, grid[:, 0]] + log_prior[1, grid[:, 1]]
            likelihood = model.decode(model.codebook[grid][:, None])
            return (likelihood.log_prob(x) + each[:, None]).logsumexp(0)

        before = pvae.draw(model, guide, x)
        assert torch.equal(before.log_q["z"], torch.zeros(1, 30, dtype=torch.float64))
        assert (before.log_weights <= evidence() + 1e-10).all()
        uniform = before.log_p["z"]
        assert (uniform + 2 * math.log(4)).abs().max() < 1e-10
        model.fit_prior(before.values["z"][0])
        after = pvae.draw(model, guide, x)
        assert (after.log_weights <= evidence() + 1e-10).all()
        assert after.log_weights.mean() > before.log_weights.mean()


def test_quantised_gradients_reach_encoder_and_codebook_and_not_the_bound():
    torch.manual_seed(0)
    model = VQVAE(6, num_positions=2, num_codes=4, code_dim=3, hidden=(8,))
    guide = VectorQuantised(6, model, hidden=(8,), commitment=0.5)
    x = (torch.rand(5, 6) < 0.4).float()
    particles = pvae.draw(model, guide, x)
    assert torch.equal(particles.log_q["commitment"], torch.zeros(1, 5))
    (slope,) = torch.autograd.grad(-particles.log_weights.sum(), model.codebook)
    features = guide.head(guide.encoder(x)).unflatten(-1, guide.shape)
    code = particles.values["z"][0]
    expected = torch.zeros_like(slope)
    index = nearest_code(code, model.codebook)
    expected.index_add_(0, index.flatten(), 2 * (code - features).detach().flatten(0, 1))
    assert (slope - expected).abs().max() < 1e-4


def averaged(**options):
    torch.manual_seed(0)
    model = VQVAE(6, num_positions=2, num_codes=4, code_dim=3, hidden=(8,)).double()
    return model, VectorQuantised(6, model, hidden=(8,), **options).double()


def test_a_codebook_follows_the_averages_of_what_is_near_it():
    """The formula by hand, without codes seeded anew; not in evaluation."""
    model, guide = averaged(decay=0.8, dead=0.0)
    x = (torch.rand(30, 6) < 0.4).double()
    counts, sums = torch.ones(4).double(), model.codebook.detach().clone()
    for _ in range(3):
        before = model.codebook.detach().clone()
        with torch.no_grad():
            features = guide.head(guide.encoder(x)).view(-1, 3)
            guide(x)
        codes = nearest_code(features, before)
        for c in range(4):
            near = features[codes == c]
            counts[c] = 0.8 * counts[c] + 0.2 * len(near)
            sums[c] = 0.8 * sums[c] + 0.2 * near.sum(0)
        torch.testing.assert_close(model.codebook.detach(), sums / counts[:, None])
    guide.eval()
    before = model.codebook.detach().clone()
    particles = pvae.draw(model, guide, x)
    assert torch.equal(model.codebook, before)
    (slope,) = torch.autograd.grad(particles.log_weights.sum(), model.codebook, allow_unused=True)
    assert slope is None


def test_dead_codes_are_seeded_with_features_and_live():
    """Codes far from all data: of four, one would be left without."""
    x = (torch.rand(200, 6) < 0.4).double()
    used = {}
    for dead in (0.0, 0.5):
        model, guide = averaged(decay=0.9, dead=dead)
        with torch.no_grad():
            model.codebook[1:].add_(100.0)
            guide.sums.copy_(model.codebook)
        pvae.fit(model, guide, x, epochs=20, batch_size=50, progress=False, engine="eager")
        guide.eval()
        codes = nearest_code(pvae.draw(model, guide, x).values["z"], model.codebook)
        used[dead] = len(codes.unique())
    assert used == {0.0: 1, 0.5: 4}


def test_a_codebook_of_averages_is_one_of_whole_batches():
    model, guide = averaged(decay=0.9)
    with pytest.raises(ProgramError, match="a buffer of shape"):
        pvae.fit(model, guide, BITS.double(), batch_size=20, parts=2, epochs=1)


def test_autoregressive_prior_over_codes_is_normalised_and_in_order():
    """Its mass sums to one over all codes, draws have those masses, and it is uniform at first."""
    torch.manual_seed(1)
    model = VQVAE(6, num_positions=2, num_codes=3, code_dim=2, hidden=(8,), prior="autoregressive",
                  prior_hidden=(7,)).double()  # fmt: skip
    grid = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    with torch.no_grad():
        prior = model.latent_prior()
        uniform = prior.log_prob(model.codebook[grid])
        assert (uniform + 2 * math.log(3)).abs().max() < 1e-12
        for parameter in model.network.parameters():
            parameter.add_(torch.randn_like(parameter))
        mass = prior.log_prob(model.codebook[grid]).exp()
        assert float(mass.sum()) == pytest.approx(1, abs=1e-12)
        assert float(mass.std()) > 0.02
        drawn = nearest_code(prior.expand([20_000]).sample(), model.codebook)
        shares = (drawn[:, None] == grid).all(-1).double()
        assert float(((shares.mean(0) - mass).abs() / (mass / 20_000).sqrt()).max()) < 4.5
        first = model.latent_prior().conditionals(torch.eye(3)[grid].double())[:, 0]
        assert torch.equal(first, first[:1].expand(9, 3))


def test_autoregressive_prior_learns_what_the_frequencies_cannot():
    """Two positions that always agree: log 3 nats and not 2 log 3. And the bound remains one."""
    torch.manual_seed(1)
    build = {"num_positions": 2, "num_codes": 3, "code_dim": 2, "hidden": (8,)}
    codes = torch.randint(3, (400, 1)).expand(400, 2)
    found = {}
    for prior in ("independent", "autoregressive"):
        model = VQVAE(6, prior=prior, **build)
        model.fit_prior(model.codebook.detach()[codes])
        other = torch.randint(3, (100, 1)).expand(100, 2)
        with torch.no_grad():
            found[prior] = float(model.latent_prior().log_prob(model.codebook[other]).mean())
    assert found["independent"] == pytest.approx(-2 * math.log(3), abs=0.05)
    assert found["autoregressive"] == pytest.approx(-math.log(3), abs=0.05)
    guide = VectorQuantised(6, model, hidden=(8,))
    with torch.no_grad():
        grid = torch.cartesian_prod(torch.arange(3), torch.arange(3))
        prior = model.latent_prior().log_prob(model.codebook[grid])
        evidence = model.decode(model.codebook[grid][:, None]).log_prob(BITS) + prior[:, None]
        bound = pvae.draw(model, guide, BITS).log_weights
        assert (bound <= evidence.logsumexp(0) + 1e-5).all()
    with pytest.raises(OptionError, match="at least 20 data, got 4"):
        model.fit_prior(model.codebook.detach()[codes[:4]])


# --- several layers and a VampPrior --------------------------------------------------------------


def test_downward_draws_each_layer_from_the_data_and_those_above():
    torch.manual_seed(0)
    model = Hierarchical(6, z_dims=(3, 2), hidden=(8,), upper_hidden=(8,), prior_components=4)
    guide = Downward(6, model, hidden=(8,), lower_hidden=(8,))
    model.double(), guide.double()
    assert guide.top is model.prior.encoder
    x = BITS[:5].double()
    trace = pyro.poutine.trace(guide).get_trace(x)
    z2 = trace.nodes["z2"]["value"]
    top = trace.nodes["z2"]["fn"]
    torch.testing.assert_close(top.mean, model.prior.encoder.posterior(x)["z2"].mean)
    known = torch.cat([guide.encoder(x), z2], -1)
    loc = guide.networks["z1"](known).chunk(2, -1)[0]
    torch.testing.assert_close(trace.nodes["z1"]["fn"].mean, loc)
    particles = pvae.draw(model, guide, x, 4)
    posteriors = model.prior.encoder.posterior(model.prior.pseudo_inputs)["z2"]
    by_hand = posteriors.log_prob(particles.values["z2"][..., None, :]).logsumexp(-1)
    torch.testing.assert_close(particles.log_p["z2"], by_hand - math.log(4))


def test_hierarchical_learns_the_digits():
    """More of them than independent pixels tell, and its evidence lies above its bound."""
    x = (pvae.data.load("digits", transform="none").train.x[:600] > 7).float()
    torch.manual_seed(0)
    model = Hierarchical(64, z_dims=(6, 6), hidden=(50,), upper_hidden=(50,), prior_components=20)
    guide = Downward(64, model, hidden=(50,), lower_hidden=(50,))
    run = pvae.fit(model, guide, x, epochs=12, batch_size=50, lr=2e-2, engine="eager",
                   progress=False)  # fmt: skip
    means = x.mean(0).clamp(0.01, 0.99)
    independent = float(torch.distributions.Bernoulli(means).log_prob(x).sum(-1).mean())
    assert run.history[-1]["bound"] > independent + 1
    found = pvae.evidence.importance(model, guide, x[:200], num_particles=20).log_evidence
    assert float(found.mean()) > run.history[-1]["bound"]


# --- engines and refusals ------------------------------------------------------------------------

BITS = (torch.rand(40, 6, generator=torch.Generator().manual_seed(3)) < 0.4).float()
LADDER = {"z_dims": (3, 2), "widths": (8, 8)}


@pytest.mark.parametrize(
    ("build", "guide"),
    [
        (lambda: VAE(6, z_dim=3, hidden=(8,)), lambda m: LowRank(6, m.latents, hidden=(8,))),
        (lambda: VAE(6, z_dim=3, hidden=(8,)), lambda m: Mixture(6, m.latents, hidden=(8,))),
        (lambda: Ladder(6, **LADDER), lambda m: BottomUp(6, m.latents, hidden=(8,))),
        (lambda: Ladder(6, **LADDER), lambda m: TopDown(6, m, hidden=(8,), width=8)),
        (Codes, lambda m: Categorical(6, m, relaxation="gumbel_softmax", hidden=(8,))),
        (lambda: VAE(6, z_dim=3, hidden=(8,)), lambda m: SemiAmortised(6, m, steps=2, hidden=(8,))),
        (lambda: VAE(6, z_dim=3, hidden=(8,)),
         lambda m: SemiAmortised(6, m, steps=2, through=False, hidden=(8,))),
        (lambda: VQVAE(6, hidden=(8,), num_codes=4), lambda m: VectorQuantised(6, m, hidden=(8,))),
        (lambda: VQVAE(6, hidden=(8,), num_codes=4, prior="autoregressive"),
         lambda m: VectorQuantised(6, m, hidden=(8,), decay=0.9)),
    ],
    ids=["low_rank", "mixture", "bottom_up", "top_down", "categorical", "semi_amortised",
         "semi_amortised_held", "vq", "vq_averages"],
)  # fmt: skip
def test_staged_engine_takes_the_same_steps(build, guide):
    def train(engine):
        torch.manual_seed(0)
        model = build()
        run = pvae.fit(model, guide(model), BITS, epochs=2, batch_size=20, engine=engine,
                       progress=False)  # fmt: skip
        assert run.engine.startswith(engine)
        return [row["bound"] for row in run.history]

    assert train("staged") == pytest.approx(train("eager"), rel=1e-5)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: LowRank(6, {"z": (3,)}, rank=4), OptionError,
         "rank must be between 1 and the size of site 'z', 3, got 4"),
        (lambda: LowRank(6, {"z": (3,)}, rank=0), OptionError, "got 0: lower it"),
        (lambda: Mixture(6, {"z": (3,)}, num_components=0), OptionError,
         "num_components must be at least 1, got 0"),
        (lambda: Categorical(6, Codes(), temperature=0.0), OptionError,
         "temperature must be positive, got 0.0"),
        (lambda: Categorical(6, Codes(), relaxation="gumbel"), OptionError,
         "no relaxation is called 'gumbel'"),
        (lambda: Categorical(6, VAE(6)), ProgramError, "site 'z' is Normal, but the categorical"),
        (lambda: Categorical(6, GaussianMixture(6), relaxation="straight_through"), ProgramError,
         "site 'component' .Categorical. is an integer, which no derivative passes"),
        (lambda: TopDown(6, VAE(6)), ProgramError, r"VAE has no conditional\(site, above\) method"),
        (lambda: VectorQuantised(6, VAE(6)), ProgramError, "VAE has no codebook"),
        (lambda: VectorQuantised(6, VQVAE(6), commitment=-1.0), OptionError, "must not be"),
        (lambda: SemiAmortised(6, VAE(6), steps=0), OptionError, "steps must be at least 1, got 0"),
        (lambda: Ladder(6, z_dims=(3, 2), widths=(8,)), OptionError, "2 layers and 1 widths"),
        (lambda: TwoLayer(6, z_dims=(3,)), OptionError, "z_dims has the sizes of z1 and z2, got 1"),
        (lambda: VectorQuantised(6, VQVAE(6), decay=1.0), OptionError, "0 <= decay < 1"),
        (lambda: VectorQuantised(6, VQVAE(6), dead=2.0), OptionError, "dead=2.0: try decay=0.99"),
        (lambda: VQVAE(6, prior="pixel"), OptionError, "no prior is called 'pixel'"),
        (lambda: Hierarchical(6, z_dims=(3,)), OptionError, "sizes of z1 and z2, got 1"),
        (lambda: Downward(6, nn.Linear(2, 2)), ProgramError, "Linear does not tell its latent"),
        (lambda: VQVAE(6, num_codes=1), OptionError, "num_codes >= 2"),
        (lambda: BottomUp(6, {}), OptionError, "at least one latent site"),
    ],
)  # fmt: skip
def test_refusals_in_one_sentence(build, error, message):
    with pytest.raises(error, match=message) as caught:
        build()
    assert isinstance(caught.value, PvaeError)
    assert "\n" not in str(caught.value)


def test_a_real_family_does_not_fit_discrete_sites():
    model = VQVAE(6, num_codes=4)
    with pytest.raises(ProgramError, match="draws values outside it"):
        pvae.draw(model, Gaussian(6, model.latents), BITS)
