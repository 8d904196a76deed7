"""Von Mises-Fisher: density, moments, inversion and gradients against scipy and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

import pvae
from pvae.errors import OptionError, ProgramError
from pvae.guides.gaussian import Gaussian
from pvae.guides.von_mises_fisher import VonMisesFisher as Guide
from pvae.models.vae import VAE
from pvae.von_mises_fisher import HypersphericalUniform, VonMisesFisher, _Angles, log_sphere_area

SE = 4.5
KAPPAS = [1e-4, 0.01, 0.5, 1.0, 5.0, 20.0, 100.0, 1e3, 1e4]
DIMS = [2, 3, 4, 10, 20, 50]


def direction(dim: int) -> torch.Tensor:
    torch.manual_seed(dim)
    return torch.nn.functional.normalize(torch.randn(dim, dtype=torch.float64), dim=0)


@pytest.mark.parametrize("dim", DIMS)
def test_density_is_that_of_scipy(dim):
    loc = direction(dim)
    for kappa in KAPPAS:
        q = VonMisesFisher(loc, torch.tensor(kappa, dtype=torch.float64))
        z = q.sample((20,))
        order = dim / 2 - 1
        log_bessel = np.log(special.ive(order, kappa)) + kappa
        log_constant = order * np.log(kappa) - dim / 2 * np.log(2 * np.pi) - log_bessel
        expected = log_constant + kappa * (z @ loc).numpy()
        assert np.abs(q.log_prob(z).numpy() - expected).max() < 1e-9 * max(1, kappa)
        if kappa < 500:  # beyond, scipy loses digits
            theirs = stats.vonmises_fisher(loc.numpy(), kappa).logpdf(z.numpy())
            assert np.abs(q.log_prob(z).numpy() - theirs).max() < 1e-7


@pytest.mark.parametrize("dim", DIMS)
def test_moments_and_entropy(dim):
    loc, kappa = direction(dim), torch.tensor(KAPPAS, dtype=torch.float64, requires_grad=True)
    q = VonMisesFisher(loc, kappa)
    resultant = special.ive(dim / 2, KAPPAS) / special.ive(dim / 2 - 1, KAPPAS)
    assert np.abs((q.mean @ loc).detach().numpy() - resultant).max() < 1e-12
    (slope,) = torch.autograd.grad((q.log_prob(loc)).sum(), kappa)  # 1 - A_d(kappa)
    assert np.abs(slope.numpy() - (1 - resultant)).max() < 1e-12
    for value in (0.5, 20.0):
        theirs = stats.vonmises_fisher(loc.numpy(), value).entropy()
        ours = VonMisesFisher(loc, torch.tensor(value, dtype=torch.float64)).entropy()
        assert float(ours) == pytest.approx(float(theirs), abs=1e-9)


@pytest.mark.parametrize("dim", DIMS)
def test_the_angle_is_where_the_share_of_the_mass_lies(dim):
    """The distribution function again, by quadrature over 400 pieces from the start."""
    kappa = torch.tensor(KAPPAS, dtype=torch.float64)
    angles = _Angles(kappa, dim)
    tail = torch.logspace(-10, -1, 10, dtype=torch.float64)
    share = torch.cat([tail, torch.linspace(0.1, 0.9, 60, dtype=torch.float64), 1 - tail])
    share = share[:, None].expand(-1, len(KAPPAS))
    found = angles.inverse(share)
    start = angles.edges[:, 0].expand_as(found)
    unit = torch.linspace(0, 1, 401, dtype=torch.float64)
    edges = start[..., None] + (found - start)[..., None] * unit
    width = edges.diff()[..., None]
    points = edges[..., :-1, None] + width * (angles.nodes + 1) / 2
    mass = (angles._density(points) * angles.weights * width / 2).sum((-1, -2)) / angles.total
    assert (mass - share).abs().max() < 1e-8


@pytest.mark.parametrize("dim", [2, 3, 20])
def test_draws_have_the_mean_and_the_right_spread(dim):
    loc, size = direction(dim), 20_000
    for kappa in (0.1, 3.0, 60.0):
        torch.manual_seed(0)
        q = VonMisesFisher(loc, torch.tensor(kappa, dtype=torch.float64))
        z = q.sample((size,))
        assert (z.norm(dim=-1) - 1).abs().max() < 1e-12
        error = (z.mean(0) - q.mean).abs() / (z.std(0) / math.sqrt(size))
        assert error.max() < SE
        cosine = z @ loc
        # E[cos^2] = 1 - (d - 1) A / kappa
        second = 1 - (dim - 1) * float(q.mean @ loc) / kappa
        error = (cosine.square().mean() - second).abs()
        assert error < SE * cosine.square().std() / math.sqrt(size)


@pytest.mark.parametrize("dim", [2, 3, 20])
def test_gradient_of_draws_is_that_of_the_mean(dim):
    """``d E[<w, z>] = d (A(kappa) <w, mu>)``, in kappa and along the tangent of mu."""
    weight = torch.randn(dim, dtype=torch.float64)
    kappa = torch.full((4000,), 4.0, dtype=torch.float64, requires_grad=True)
    loc = direction(dim).expand(4000, dim).clone().requires_grad_()
    q = VonMisesFisher(loc, kappa)
    drawn = (q.rsample() @ weight).sum()
    gradients = torch.autograd.grad(drawn, [loc, kappa], retain_graph=True)
    truths = torch.autograd.grad((q.mean @ weight).sum(), [loc, kappa])

    def tangent(gradient):
        along = (gradient * loc.detach()).sum(-1, keepdim=True)
        return gradient - along * loc.detach()

    pairs = [(tangent(gradients[0]), tangent(truths[0])), (gradients[1], truths[1])]
    for found, truth in pairs:
        error = (found.mean(0) - truth[0]).abs() / (found.std(0) / math.sqrt(4000) + 1e-12)
        assert error.max() < SE
    wrong = gradients[1].mean() * 1.2  # a gradient 20 % off is seen
    assert (wrong - truths[1][0]).abs() > SE * gradients[1].std() / math.sqrt(4000)


def test_kl_to_the_uniform():
    loc = direction(5)
    q = VonMisesFisher(loc, torch.tensor(7.0, dtype=torch.float64))
    p = HypersphericalUniform(torch.zeros(5, dtype=torch.float64))
    z = q.sample((50_000,))
    terms = q.log_prob(z) - p.log_prob(z)
    closed = torch.distributions.kl_divergence(q, p)
    assert (terms.mean() - closed).abs() < SE * terms.std() / math.sqrt(50_000)
    assert log_sphere_area(3) == pytest.approx(math.log(4 * math.pi))
    uniform = p.sample((20_000,))
    assert (uniform.mean(0) / (uniform.std(0) / math.sqrt(20_000))).abs().max() < SE


def test_staged_engine_takes_the_same_steps():
    x = (torch.rand(40, 6, generator=torch.Generator().manual_seed(3)) < 0.4).float()

    def train(engine):
        torch.manual_seed(0)
        model = VAE(6, z_dim=3, hidden=(8,), prior="hyperspherical")
        guide = Guide(6, model.latents, hidden=(8,))
        run = pvae.fit(model, guide, x, epochs=2, batch_size=20,
                       engine=engine, progress=False)  # fmt: skip
        assert run.engine.startswith(engine)
        return [row["bound"] for row in run.history]

    assert train("staged") == pytest.approx(train("eager"), rel=1e-5)


def test_evidence_on_the_circle_by_quadrature():
    torch.manual_seed(2)
    model = VAE(6, z_dim=2, hidden=(8,), prior="hyperspherical").double()
    guide = Guide(6, model.latents, hidden=(8,)).double()
    x = (torch.rand(5, 6, generator=torch.Generator().manual_seed(4)) < 0.5).double()
    angle = torch.arange(2000, dtype=torch.float64) * 2 * math.pi / 2000
    with torch.no_grad():
        circle = torch.stack([angle.cos(), angle.sin()], -1)
        log_likelihood = torch.stack([model.decode(circle).log_prob(row) for row in x])
        exact = log_likelihood.logsumexp(-1) - math.log(2000)
    found = pvae.evidence.importance(model, guide, x, 20_000, seed=0)
    assert ((found.log_evidence - exact).abs() / found.stderr).max() < SE
    assert found.stderr.max() < 0.02


def test_each_manifold_has_its_guide():
    sphere, real = VAE(6, z_dim=3, prior="hyperspherical"), VAE(6, z_dim=3)
    x = torch.zeros(4, 6)
    with pytest.raises(ProgramError, match="Sphere.*the guide .Normal. draws values outside it"):
        pvae.draw(sphere, Gaussian(6, sphere.latents), x)
    with pytest.raises(ProgramError, match="the guide .VonMisesFisher. draws on Sphere, a surface"):
        pvae.draw(real, Guide(6, real.latents), x)


@pytest.mark.parametrize(
    ("latents", "options", "message"),
    [
        ({"z": ()}, {}, r"site 'z' has event shape \(\)"),
        ({"z": (1,)}, {}, "at least two numbers"),
        ({"z": (3,)}, {"concentration": 0.0}, "concentration must be positive, got 0.0"),
        ({}, {}, "at least one latent site"),
    ],
)
def test_wrong_options(latents, options, message):
    with pytest.raises(OptionError, match=message):
        Guide(6, latents, **options)
    with pytest.raises(OptionError, match="a sphere needs z_dim of at least 2, got 1"):
        VAE(6, z_dim=1, prior="hyperspherical")
