"""Encode, decode, reconstruct, interpolate, traverse: known answers, and what is refused."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import IDENTITY, SE, ExactGuide, Mixture, linear_gaussian, z_score
from torch import nn

from pvae.errors import OptionError, ProgramError
from pvae.guides.gaussian import Gaussian
from pvae.latent_paths import between, interpolate, traverse
from pvae.latents import decode, encode, reconstruct
from pvae.models.vae import VAE


@pytest.fixture
def pair():
    model, x = linear_gaussian(7)
    return model, ExactGuide(model), x


def tight(found, expected):
    torch.testing.assert_close(found, expected, atol=IDENTITY, rtol=0)


# --- encode --------------------------------------------------------------------------------------


def test_the_codes_of_an_exact_guide_are_the_posterior(pair):
    model, guide, x = pair
    posterior = model.posterior(x)
    codes = encode(model, guide, x, num_draws=3, max_pairs=6)
    tight(codes.mean["z"], posterior.mean.detach())
    tight(codes.scale["z"], posterior.variance.sqrt().detach())
    assert codes.draws["z"].shape == (3, 7, 2)
    assert codes.matrix().shape == (7, 2)
    assert len(codes) == 7


def test_draws_are_the_guides(pair):
    model, guide, x = pair
    draws = encode(model, guide, x[:2], num_draws=4000).draws["z"]
    posterior = model.posterior(x[:2])
    assert float(z_score(draws, posterior.mean.detach()).max()) < SE


def test_a_seed_is_all_that_the_draws_depend_on(pair):
    model, guide, x = pair
    before = torch.get_rng_state()
    first, again = (encode(model, guide, x, seed=3).draws["z"] for _ in range(2))
    other = encode(model, guide, x, seed=4).draws["z"]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_a_lower_site_has_its_mean_over_the_upper_draws():
    """q: a ~ N(x, 1), b | a ~ N(2 a, 0.5): the mean of b is 2 x, its variance 0.25 + 4."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(torch.zeros_like(x), 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(x, 1.0))
            pyro.sample("b", dist.Normal(2 * a, 0.5))

    x = torch.tensor([0.5, -1.0], dtype=torch.float64)
    codes = encode(model, guide, x, num_draws=20_000)
    tight(codes.mean["a"], x)
    error = (codes.mean["b"] - 2 * x).abs() / (2 / math.sqrt(20_000))
    assert float(error.max()) < SE
    # The variance of a variance of S normal draws is 2 sigma^4 / S.
    off = (codes.scale["b"].square() - 4.25).abs() / (4 * math.sqrt(2 / 20_000))
    assert float(off.max()) < SE


def test_a_discrete_site_has_its_most_probable_value():
    model = Mixture().double()
    x = torch.randn(9, 3, dtype=torch.float64)
    codes = encode(model, model.posterior_guide, x)
    assert torch.equal(codes.mean["c"], model.log_joint(x).argmax(-1))
    assert codes.discrete == {"c"}
    with pytest.raises(ProgramError, match="none is real"):
        codes.matrix()
    with pytest.raises(ProgramError, match="nothing between"):
        interpolate(model, model.posterior_guide, x, x)
    with pytest.raises(ProgramError, match="only real ones can be traversed"):
        traverse(model, model.posterior_guide, x)


def test_programs_that_take_one_particle_at_a_time(pair):
    model, guide, x = pair
    codes = encode(model, guide, x, num_draws=3, vectorize=False)
    tight(codes.mean["z"], model.posterior(x).mean.detach())
    assert codes.draws["z"].shape == (3, 7, 2)
    one = reconstruct(model, guide, x, num_draws=5, vectorize=False)["x"]
    all_at_once = reconstruct(model, guide, x, num_draws=5)["x"]
    assert one.shape == all_at_once.shape


# --- decode and reconstruct ----------------------------------------------------------------------


def test_decoding_is_the_mean_of_the_likelihood(pair):
    model, guide, x = pair
    z = encode(model, guide, x).mean
    expected = (z["z"] @ model.weight.T + model.offset).detach()
    tight(decode(model, z, x, max_pairs=3)["x"], expected)
    tight(decode(model, z, torch.zeros(1, 5, dtype=torch.float64))["x"], expected)
    tight(reconstruct(model, guide, x, max_pairs=3)["x"], expected)


def test_decoded_draws_are_of_the_likelihood(pair):
    model, _, x = pair
    z = {"z": torch.full((20_000, 2), 0.3, dtype=torch.float64)}
    draws = decode(model, z, x[:1], draw=True)["x"]
    expected = (z["z"][0] @ model.weight.T + model.offset).detach()
    assert float(z_score(draws, expected).max()) < SE
    spread = draws.var(0) / math.exp(-0.6)
    assert float((spread - 1).abs().max()) < SE * math.sqrt(2 / 20_000)


def test_reconstruction_over_draws_is_its_expectation(pair):
    """With a linear decoder ``E E[x | z]`` is the decoded mean; the error is that of the draws."""
    model, guide, x = pair
    found = reconstruct(model, guide, x[:1], num_draws=20_000)["x"]
    expected = reconstruct(model, guide, x[:1])["x"]
    with torch.no_grad():
        covariance = model.posterior(x[:1]).covariance_matrix[0]
        spread = (model.weight @ covariance @ model.weight.T).diagonal().sqrt()
    assert float(((found - expected).abs() / (spread / math.sqrt(20_000))).max()) < SE
    assert not torch.equal(found, expected)


class Labelled(nn.Module):
    """``x | z, y ~ N(z + y, 1)``: data with a covariate."""

    def forward(self, x, y):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            return pyro.sample("x", dist.Normal(z + y, 1.0), obs=x)


def labelled_guide(x, y):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal((x - y) / 2, math.sqrt(0.5)))


def test_what_is_not_observed_is_passed_on():
    x, y = torch.randn(4).double(), torch.arange(4.0).double()
    found = reconstruct(Labelled(), labelled_guide, {"x": x, "y": y})["x"]
    tight(found, (x - y) / 2 + y)
    moved = decode(Labelled(), {"z": torch.zeros(4).double()}, {"x": x, "y": 10 * y})["x"]
    tight(moved, 10 * y)


def test_a_site_of_single_numbers():
    x, y = torch.randn(4).double(), torch.arange(4.0).double()
    batch = {"x": x, "y": y}
    pair = Labelled(), labelled_guide
    tight(encode(*pair, batch).matrix(), ((x - y) / 2)[:, None])
    other = {"x": x + 1, "y": y}
    for path in ("linear", "spherical"):
        steps = interpolate(*pair, batch, other, steps=3, path=path)["x"]
        tight(steps[-1], reconstruct(*pair, other)["x"])
    found = traverse(*pair, batch, steps=3)
    tight(found.decoded["x"], found.values + y)


def test_an_autoregressive_decoder_is_refused():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + x.roll(1, -1), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    with pytest.raises(ProgramError, match="reads its data while it draws"):
        reconstruct(model, guide, torch.randn(3, 2))


# --- paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["linear", "spherical"])
def test_paths_end_at_the_reconstructions(pair, path):
    model, guide, x = pair
    steps = interpolate(model, guide, x[:3], x[3:6], steps=5, path=path)["x"]
    assert steps.shape == (5, 3, 5)
    tight(steps[0], reconstruct(model, guide, x[:3])["x"])
    tight(steps[-1], reconstruct(model, guide, x[3:6])["x"])
    if path == "linear":
        tight(steps[2], (steps[0] + steps[-1]) / 2)


def test_an_arc_keeps_the_norm_and_turns_evenly():
    a = torch.tensor([[3.0, 0, 0], [1.0, 1, 0]]).double()
    b = torch.tensor([[0.0, 3, 0], [2.0, 2, 0]]).double()
    arc = between(a, b, 4, path="spherical")
    tight(arc[:, 0].norm(dim=1), torch.full((4,), 3.0).double())
    angles = torch.atan2(arc[:, 0, 1], arc[:, 0, 0])
    tight(angles, torch.linspace(0, math.pi / 2, 4, dtype=torch.float64))
    tight(arc[:, 1], between(a, b, 4)[:, 1])  # parallel: a straight line
    assert bool((between(a, b, 5)[2, 0].norm() < 2.9).all())


# --- traversals ----------------------------------------------------------------------------------


def test_a_traversal_moves_one_dimension_over_the_priors_quantiles(pair):
    model, guide, x = pair
    found = traverse(model, guide, x[:2], steps=3, extent=0.9)
    assert found.dimensions == (("z", 0), ("z", 1))
    tight(found.quantiles, torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64))
    normal = torch.distributions.Normal(torch.zeros(()).double(), 1.0)
    tight(found.values[0, :, 0], normal.icdf(found.quantiles))
    z = encode(model, guide, x[:2]).mean["z"].clone()
    z[:, 1] = found.values[1, 2]
    tight(found.decoded["x"][1, 2], (z @ model.weight.T + model.offset).detach())
    only = traverse(model, guide, x[:2], steps=3, extent=0.9, site="z", dimensions=[1])
    tight(only.decoded["x"][0], found.decoded["x"][1])


def test_a_prior_without_an_inverse_is_traversed_by_its_draws():
    torch.manual_seed(0)
    model = VAE(6, z_dim=2, hidden=(8,), likelihood="gaussian", prior="mixture").double()
    guide = Gaussian(6, model.latents, hidden=(8,)).double()
    found = traverse(model, guide, torch.randn(3, 6).double(), steps=3, extent=0.5)
    draws = model.latent_prior().sample((200_000,))
    share = (draws[:, 0, None] < found.values[0, :, 0]).double().mean(0)
    # 4096 draws: sqrt(0.25 / 4096) = 0.0078 at most.
    assert float((share - found.quantiles).abs().max()) < SE * 0.0078
    assert found.decoded["x"].shape == (2, 3, 3, 6)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "error", "message"),
    [
        (lambda m, g, x: encode(m, g, x, num_draws=0), OptionError, "num_draws must be at least 1"),
        (lambda m, g, x: encode(m, g, x, max_pairs=0), OptionError, "max_pairs must be at least 1"),
        (lambda m, g, x: encode(m, g, x[:, :3]), ProgramError, "failed on the batch"),
        (lambda m, g, x: decode(m, {}, x), OptionError, "latents must be site"),
        (lambda m, g, x: decode(m, {"y": x}, x), ProgramError, "latent sites {'z'}"),
        (lambda m, g, x: decode(m, {"z": x}, x), ProgramError, r"takes \(2,\) for each datum"),
        (lambda m, g, x: decode(m, {"z": x[:, :2]}, x[:3]), OptionError, "like must have one row"),
        (lambda m, g, x: interpolate(m, g, x, x[:2]), OptionError, "equally many rows, got 7 and"),
        (lambda m, g, x: interpolate(m, g, x, x, steps=1), OptionError, "steps must be at least 2"),
        (lambda m, g, x: interpolate(m, g, x, x, path="arc"), OptionError, "no path is called"),
        (lambda m, g, x: traverse(m, g, x, extent=1), OptionError, "extent between 0 and 1"),
        (lambda m, g, x: traverse(m, g, x, site="y"), OptionError, "no real latent site is called"),
        (lambda m, g, x: traverse(m, g, x, dimensions=[2]), OptionError, "dimensions 0 to 1, got"),
    ],
)
def test_wrong_inputs_get_one_sentence(pair, work, error, message):
    with pytest.raises(error, match=message):
        work(*pair)


def test_a_site_shared_by_all_data_is_refused():
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(w * z, 1.0), obs=x)

    def guide(x):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(ProgramError, match="'w' is shared by all data"):
        encode(model, guide, torch.randn(3))
