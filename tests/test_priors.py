"""Priors: their densities and draws, training on every engine, evidence against quadrature."""

from __future__ import annotations

import math

import pyro
import pytest
import torch

import pvae
from pvae import priors
from pvae.errors import OptionError, ProgramError
from pvae.guides.gaussian import Gaussian
from pvae.guides.shared import Shared
from pvae.models.two_layer import TwoLayer
from pvae.models.vae import VAE

SIGMAS = 4.5


def mixture(dtype: torch.dtype = torch.float32) -> VAE:
    """A mixture whose components differ in weight, place and width."""
    torch.manual_seed(0)
    model = VAE(6, z_dim=2, hidden=(8,), prior="mixture", prior_components=3).to(dtype)
    with torch.no_grad():
        model.prior.logits.copy_(torch.tensor([0.0, 1.0, -1.0]))
        model.prior.loc.copy_(torch.tensor([[-2.0, 0.0], [1.0, 1.0], [0.0, 4.0]]))
        model.prior.raw_scale.add_(torch.tensor([[0.0], [-1.0], [1.0]]))
    return model


def test_density_is_the_mixture():
    model = mixture(torch.float64)
    z = torch.randn(50, 2, dtype=torch.float64)
    scale = torch.nn.functional.softplus(model.prior.raw_scale) + 1e-3
    square = ((z[:, None] - model.prior.loc) / scale).square()
    log_component = (-0.5 * square - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
    weights = model.prior.logits.softmax(0)
    expected = (weights * log_component.exp()).sum(-1).log()
    assert (model.prior().log_prob(z) - expected).abs().max() < 1e-10


def test_draws_have_the_moments_of_the_mixture():
    model, size = mixture(torch.float64), 20_000
    torch.manual_seed(1)
    trace = pyro.poutine.trace(model).get_trace(size=size)
    z = trace.nodes["z"]["value"]
    assert z.shape == (size, 2)
    weights = model.prior.logits.softmax(0)
    variance = (torch.nn.functional.softplus(model.prior.raw_scale) + 1e-3).square()
    mean = weights @ model.prior.loc
    second = weights @ (variance + model.prior.loc.square())
    for power, expected in ((1, mean), (2, second)):
        found = z.pow(power)
        error = found.std(0) / math.sqrt(size)
        assert ((found.mean(0) - expected).abs() / error).max() < SIGMAS


def test_a_mixture_of_one_standard_component_is_the_default():
    torch.manual_seed(0)
    model = VAE(6, z_dim=2, hidden=(8,), prior="mixture", prior_components=1).double()
    with torch.no_grad():
        model.prior.loc.zero_()
        model.prior.raw_scale.fill_(math.log(math.expm1(1 - 1e-3)))
    z = torch.randn(20, 2, dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    assert (model.prior().log_prob(z) - normal).abs().max() < 1e-10


def test_the_default_program_is_as_it_was():
    torch.manual_seed(0)
    model = VAE(6, z_dim=2, hidden=(8,))
    names = {"prior.loc", "decoder.0.weight", "decoder.0.bias", "decoder.2.weight"}
    assert set(model.state_dict()) == {*names, "decoder.2.bias"}
    torch.manual_seed(0)
    other = VAE(6, z_dim=2, hidden=(8,), prior="mixture")
    assert torch.equal(model.decoder[0].weight, other.decoder[0].weight)
    site = pyro.poutine.trace(model).get_trace(size=3).nodes["z"]["fn"]
    assert type(site.base_dist).__name__ == "Normal"


@pytest.mark.parametrize("objective", [pvae.vae(), pvae.dreg(3)], ids=["elbo", "dreg"])
@pytest.mark.parametrize("engine", ["staged", "compiled"])
def test_engines_agree(engine, objective):
    if engine == "compiled" and objective.num_particles > 1:
        pytest.skip("one compilation is enough: the prior is the same in both")
    x = (torch.rand(40, 6, generator=torch.Generator().manual_seed(3)) < 0.4).float()

    def train(engine: str) -> list[float]:
        model = mixture()
        guide = Gaussian(6, model.latents, hidden=(8,))
        run = pvae.fit(
            model, guide, x, objective=objective, epochs=3, batch_size=20, lr=1e-2,
            engine=engine, progress=False,
        )  # fmt: skip
        assert run.engine.startswith(engine)
        moved = model.prior.loc.detach() - mixture().prior.loc.detach()
        assert (moved != 0).all()
        return [row["bound"] for row in run.history]

    assert train(engine) == pytest.approx(train("eager"), rel=1e-5)


def test_evidence_of_a_mixture_pair():
    """K large and a broad guide: the estimate agrees with quadrature over the latent plane."""
    model = mixture(torch.float64)
    guide = Gaussian(6, model.latents, hidden=(8,)).double()
    x = (torch.rand(4, 6, generator=torch.Generator().manual_seed(4)) < 0.5).double()
    with torch.no_grad():
        guide.heads["z"].weight.zero_()
        guide.heads["z"].bias.copy_(torch.tensor([0.0, 0.0, 5.0, 5.0]))
        side = torch.linspace(-25, 25, 501, dtype=torch.float64)
        z = torch.cartesian_prod(side, side)
        log_joint = model.prior().log_prob(z)[:, None] + torch.stack(
            [model.decode(z).log_prob(row) for row in x], 1
        )
        exact = log_joint.logsumexp(0) + 2 * math.log(0.1)
    found = pvae.evidence.importance(model, guide, x, 20_000, seed=0)
    assert ((found.log_evidence - exact).abs() / found.stderr).max() < SIGMAS
    assert found.stderr.max() < 0.05


# --- the other priors ----------------------------------------------------------------------------

BITS = (torch.rand(40, 6, generator=torch.Generator().manual_seed(3)) < 0.4).float()


def vamp(dtype: torch.dtype = torch.float32) -> VAE:
    torch.manual_seed(0)
    return VAE(6, z_dim=2, hidden=(8,), prior="vamp", prior_components=4).to(dtype)


def test_vamp_is_the_mixture_of_the_guides_posteriors():
    model = vamp(torch.float64)
    guide = Shared(model)
    z = torch.randn(20, 2, dtype=torch.float64)
    rows = [guide.posterior(row[None])["z"].log_prob(z) for row in model.prior.pseudo_inputs]
    expected = torch.stack(rows).logsumexp(0) - math.log(4)
    assert (model.prior().log_prob(z) - expected).abs().max() < 1e-10


def test_vamp_shares_its_encoder_and_learns_its_pseudo_inputs():
    model = vamp()
    guide = Shared(model)
    assert guide.encoder is model.prior.encoder
    named = pvae.particles.parameters(model, guide, BITS)
    assert len(named) == len(list(model.parameters()))
    before = model.prior.pseudo_inputs.detach().clone()
    run = pvae.fit(model, guide, BITS, epochs=3, batch_size=20, lr=1e-2, progress=False)
    assert (model.prior.pseudo_inputs != before).any()
    assert guide.encoder is model.prior.encoder
    assert len(run.history) == 3
    assert model(size=5).shape == (5, 6)


def test_vamp_starts_from_rows_of_the_data():
    encoder = Gaussian(6, {"z": (2,)}, hidden=(8,))
    prior = priors.Vamp(2, encoder=encoder, x_dim=6, pseudo_inputs=BITS[:7])
    assert torch.equal(prior.pseudo_inputs, BITS[:7])
    with pytest.raises(OptionError, match=r"rows of 6 features, got shape \(3, 5\)"):
        priors.Vamp(2, encoder=encoder, x_dim=6, pseudo_inputs=torch.zeros(3, 5))
    with pytest.raises(ProgramError, match="holds no encoder in its prior"):
        Shared(VAE(6))


@pytest.mark.parametrize("prior", ["vamp", "flow", "mixture"])
def test_evidence_by_quadrature(prior):
    torch.manual_seed(3)
    model = VAE(6, z_dim=2, hidden=(8,), prior=prior, prior_components=3).double()
    guide = Gaussian(6, model.latents, hidden=(8,)).double()
    with torch.no_grad():
        guide.heads["z"].weight.zero_()
        guide.heads["z"].bias.copy_(torch.tensor([0.0, 0.0, 3.0, 3.0]))
        side = torch.linspace(-12, 12, 301, dtype=torch.float64)
        z = torch.cartesian_prod(side, side)
        log_joint = model.prior().log_prob(z) + torch.stack(
            [model.decode(z).log_prob(row) for row in BITS[:4].double()]
        )
        exact = log_joint.logsumexp(-1) + 2 * math.log(24 / 300)
    found = pvae.evidence.importance(model, guide, BITS[:4].double(), 20_000, seed=0)
    assert ((found.log_evidence - exact).abs() / found.stderr).max() < SIGMAS
    assert found.stderr.max() < 0.05


@pytest.mark.parametrize("prior", ["vamp", "flow"])
def test_priors_are_staged(prior):
    def train(engine: str) -> list[float]:
        torch.manual_seed(0)
        model = VAE(6, z_dim=2, hidden=(8,), prior=prior, prior_components=3)
        guide = Shared(model) if prior == "vamp" else Gaussian(6, model.latents, hidden=(8,))
        run = pvae.fit(model, guide, BITS, epochs=2, batch_size=20, engine=engine, progress=False)
        assert run.engine.startswith(engine)
        return [row["bound"] for row in run.history]

    assert train("staged") == pytest.approx(train("eager"), rel=1e-5)


def test_a_prior_is_a_name_or_an_object():
    for name in priors.PRIORS:
        model = VAE(6, z_dim=3, hidden=(8,), prior=name, prior_components=2)
        assert type(model.prior) is priors.PRIORS[name]
        assert model(size=4).shape == (4, 6)
    own = priors.Flow(3, kind="nsf", transforms=1)
    assert VAE(6, z_dim=3, prior=own).prior is own
    assert TwoLayer(6, z_dims=(4, 3), prior=own).prior is own
    with pytest.raises(OptionError, match="no prior is called 'vamp'"):  # no encoder of its own
        TwoLayer(6, prior="vamp")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": "mixtur"}, "no prior is called 'mixtur': did you mean 'mixture'?"),
        ({"prior": "mixture", "prior_components": 0}, "num_components must be at least 1, got 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(OptionError, match=message.replace("?", r"\?")):
        VAE(6, **options)
