"""The waist: batches, plates, masks, scales and the pairs that are refused."""

from __future__ import annotations

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import (
    IDENTITY,
    SE,
    AffineGuide,
    ExactGuide,
    LinearGaussian,
    Mixture,
    PyroStyleVAE,
    data_in_columns,
    guide_near_posterior,
    linear_gaussian,
)
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import nn

import pvae
from pvae.errors import DataError, ObjectiveError, ProgramError
from pvae.particles import (
    Gate,
    inspect,
    log_joint,
    module_of,
    parameters,
    plate_scale,
    sample_guide,
    sum_terms,
)

B, K = 5, 3


@pytest.fixture
def x():
    return torch.randn(B, 4, dtype=torch.float64)


def normal(loc, sd=1.0):
    return dist.Normal(loc, sd).to_event(1)


def plain_model(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", normal(x.new_zeros(2)))
        pyro.sample("x", normal(torch.cat([z, z], -1)), obs=x)


def plain_guide(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", normal(0.3 * x[:, :2], 0.7))


def trace_elbo(model, guide, *args, num_particles=1, **options):
    elbo = Trace_ELBO(num_particles=num_particles, vectorize_particles=num_particles > 1, **options)
    torch.manual_seed(5)
    return elbo.differentiable_loss(model, guide, *args).item()


def our_loss(model, guide, *args, num_particles=1, **options):
    torch.manual_seed(5)
    return pvae.vae(num_particles, **options)(model, guide, *args).item()


# --- the exact posterior as guide: log w = log p(x) ---------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, IDENTITY), (torch.float32, 1e-4)], ids=str
)
@pytest.mark.parametrize("vectorize", [True, False])
def test_exact_posterior_makes_log_weights_the_log_evidence(dtype, tolerance, vectorize):
    model, x = linear_gaussian()
    model, x = model.to(dtype), x.to(dtype)
    particles = pvae.draw(model, ExactGuide(model), x, 7, vectorize=vectorize)
    assert particles.shape == (7, len(x))
    assert particles.log_weights.dtype == dtype
    error = (particles.log_weights - model.log_evidence(x)).detach().abs().max()
    assert float(error) < tolerance


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, IDENTITY), (torch.float32, 1e-4)], ids=str
)
def test_exact_posterior_of_a_discrete_mixture(dtype, tolerance):
    model = Mixture().to(dtype)
    x = torch.randn(20, 3, dtype=dtype)
    log_weights = pvae.draw(model, model.posterior_guide, x, 9).log_weights
    assert float((log_weights - model.log_evidence(x)).detach().abs().max()) < tolerance


def test_every_reduction_of_constant_weights_is_the_evidence():
    model, x = linear_gaussian()
    log_weights = pvae.draw(model, ExactGuide(model), x, 30).log_weights
    for bound in (pvae.bounds.elbo, pvae.bounds.iw_elbo, pvae.bounds.renyi(0.5)):
        torch.testing.assert_close(bound(log_weights), model.log_evidence(x), rtol=0, atol=IDENTITY)


# --- batches and sites --------------------------------------------------------------------------


def test_batch_may_be_a_tensor_a_tuple_or_a_dict(x):
    y = torch.randn(B, 1, dtype=torch.float64)

    def model(x, y):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", normal(y.expand(-1, 2)))
            pyro.sample("x", normal(torch.cat([z, z], -1)), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", normal(y + x[:, :2]))

    def weights(model, guide, batch):
        torch.manual_seed(1)
        return pvae.draw(model, guide, batch, K).log_weights

    by_position = weights(model, guide, (x, y))
    assert torch.equal(by_position, weights(model, guide, {"y": y, "x": x}))
    assert torch.equal(by_position, weights(model, guide, [x, y]))
    assert weights(plain_model, plain_guide, x).shape == (K, B)


def test_several_latent_and_observed_sites_are_told_apart(x):
    def model(x, label):
        with pyro.plate("data", len(x), dim=-1):
            c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.3)))
            z = pyro.sample("z", normal(c[..., None].expand(*c.shape, 2)))
            pyro.sample("x", normal(torch.cat([z, z], -1)), obs=x)
            pyro.sample("label", dist.Bernoulli(logits=z[..., 0]), obs=label)

    def guide(x, label):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", normal(x[:, :2]))
            pyro.sample("c", dist.Bernoulli(x.new_tensor(0.5)))

    label = torch.ones(B, dtype=torch.float64)
    particles = pvae.draw(model, guide, (x, label), K)
    assert particles.observed == ("x", "label")
    assert set(particles.likelihood) == {"x", "label"}
    assert set(particles.prior) == {"c", "z"}
    z, c = particles.values["z"], particles.values["c"]
    assert z.shape == (K, B, 2)
    assert c.shape == (K, B)
    by_hand = (
        dist.Bernoulli(x.new_tensor(0.3)).log_prob(c)
        + normal(c[..., None].expand(K, B, 2)).log_prob(z)
        + normal(torch.cat([z, z], -1)).log_prob(x)
        + dist.Bernoulli(logits=z[..., 0]).log_prob(label)
        - normal(x[:, :2]).log_prob(z)
        - dist.Bernoulli(x.new_tensor(0.5)).log_prob(c)
    )
    torch.testing.assert_close(particles.log_weights, by_hand, rtol=0, atol=IDENTITY)
    parts = particles.log_likelihood + particles.log_prior - sum_terms(particles.log_q)
    torch.testing.assert_close(particles.log_weights, parts, rtol=0, atol=IDENTITY)
    layout = inspect(model, guide, (x, label))
    assert layout.in_order is False
    assert layout.score_sites == {"c": "Bernoulli"}


def test_data_plate_may_be_unnumbered_and_have_any_name(x):
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", normal(x.new_zeros(2)))
            pyro.sample("x", normal(torch.cat([z, z], -1)), obs=x)

    def guide(x):
        with pyro.plate("batch", len(x)):
            pyro.sample("z", normal(x[:, :2]))

    assert pvae.draw(model, guide, x, K).log_weights.shape == (K, B)
    one = x[:1]  # where a row cannot be told from a broadcast
    assert pvae.draw(model, guide, one, K).log_weights.shape == (K, 1)


def test_guide_needs_no_plate(x):
    def guide(x):
        pyro.sample("z", normal(0.3 * x[:, :2], 0.7))

    for rows in (B, 1):
        torch.manual_seed(0)
        without = pvae.draw(plain_model, guide, x[:rows], K).log_weights
        torch.manual_seed(0)
        assert torch.equal(without, pvae.draw(plain_model, plain_guide, x[:rows], K).log_weights)


@pytest.mark.parametrize("rows", [B, 1])
def test_guide_without_plates_counts_its_own_data(rows):
    """They need not lie along the first dimension of the batch."""

    def bare(x):
        pyro.sample("z", dist.Normal(x.mean(0), 0.4))

    x = torch.randn(7, rows, dtype=torch.float64)
    particles = pvae.draw(data_in_columns, bare, x, K, score=True)
    torch.testing.assert_close(particles.score["z"], particles.log_q["z"])
    values, log_q = sample_guide(bare, x, K, inspect(data_in_columns, bare, x))
    torch.testing.assert_close(log_q, dist.Normal(x.mean(0), 0.4).log_prob(values["z"])[:, 0])


@pytest.mark.parametrize("rows", [B, 1])
def test_auxiliary_site_needs_no_plate(x, rows):
    def guide(x):
        u = pyro.sample("u", normal(x[:, :2]), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(u).to_event(1))

    particles = pvae.draw(plain_model, guide, x[:rows], K)
    assert set(particles.log_q) == {"u", "z"}
    z = particles.values["z"]
    torch.testing.assert_close(sum_terms(particles.log_q), normal(x[:rows, :2]).log_prob(z))


def test_auxiliary_sites_count_with_log_q(x):
    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            u = pyro.sample("u", normal(x[:, :2]), infer={"is_auxiliary": True})
            pyro.sample(
                "z", dist.Delta(2 * u, log_density=x.new_tensor(-2 * math.log(2))).to_event(1)
            )

    particles = pvae.draw(plain_model, guide, x, K)
    z = particles.values["z"]
    torch.testing.assert_close(
        sum_terms(particles.log_q), normal(x[:, :2]).log_prob(z / 2) - 4 * math.log(2)
    )


# --- plates -------------------------------------------------------------------------------------


def time_model(x):
    """``x`` of shape ``(T, B)``: a latent path per datum, T steps."""
    with pyro.plate("data", x.shape[1], dim=-1):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("time", x.shape[0], dim=-2):
            h = pyro.sample("h", dist.Normal(z, 0.5))
            pyro.sample("x", dist.Normal(h, 0.3), obs=x)


def time_guide(x):
    with pyro.plate("data", x.shape[1], dim=-1):
        z = pyro.sample("z", dist.Normal(x.mean(0), 0.4))
        with pyro.plate("time", x.shape[0], dim=-2):
            pyro.sample("h", dist.Normal(0.5 * (x + z), 0.2))


def transposed(program):
    """The same pair with data at dim -2 and time at -1: ``x`` of shape ``(B, T)``."""
    is_model = program is time_model

    def run(x):
        with pyro.plate("data", x.shape[0], dim=-2):
            loc, sd = (0.0, 1.0) if is_model else (x.mean(1, keepdim=True), 0.4)
            z = pyro.sample("z", dist.Normal(x.new_zeros(()) + loc, sd))
            with pyro.plate("time", x.shape[1], dim=-1):
                if is_model:
                    h = pyro.sample("h", dist.Normal(z, 0.5))
                    pyro.sample("x", dist.Normal(h, 0.3), obs=x)
                else:
                    pyro.sample("h", dist.Normal(0.5 * (x + z), 0.2))

    return run


def path_weights(values, x):
    """By hand: values ``z (K, 1, B)``, ``h (K, T, B)`` and ``x (T, B)``."""
    z, h = values["z"], values["h"]
    return (
        dist.Normal(0.0, 1.0).log_prob(z)[:, 0]
        - dist.Normal(x.mean(0), 0.4).log_prob(z)[:, 0]
        + (
            dist.Normal(z, 0.5).log_prob(h)
            + dist.Normal(h, 0.3).log_prob(x)
            - dist.Normal(0.5 * (x + z), 0.2).log_prob(h)
        ).sum(1)
    )


def test_time_plates_are_summed(x):
    sequence = torch.randn(7, B, dtype=torch.float64)
    particles = pvae.draw(time_model, time_guide, {"x": sequence}, K, data_plate="data")
    assert particles.log_weights.shape == (K, B)
    by_hand = path_weights(particles.values, sequence)
    torch.testing.assert_close(particles.log_weights, by_hand, rtol=0, atol=IDENTITY)


def test_data_plate_may_be_left_of_the_time_plate():
    sequence = torch.randn(B, 7, dtype=torch.float64)
    model, guide = transposed(time_model), transposed(time_guide)
    particles = pvae.draw(model, guide, sequence, K)
    values = {name: value.transpose(-1, -2) for name, value in particles.values.items()}
    by_hand = path_weights(values, sequence.T)
    torch.testing.assert_close(particles.log_weights, by_hand, rtol=0, atol=IDENTITY)


@pytest.mark.parametrize("data_plate", ["data", None])
def test_plates_of_equal_length_are_told_apart_by_name(data_plate):
    sequence = torch.randn(B, B, dtype=torch.float64)
    particles = pvae.draw(time_model, time_guide, sequence, K, data_plate=data_plate)
    by_hand = path_weights(particles.values, sequence)
    torch.testing.assert_close(particles.log_weights, by_hand, rtol=0, atol=IDENTITY)


def test_gate_lies_along_the_data_plate_left_of_a_time_plate():
    sequence = torch.randn(B, 7, dtype=torch.float64)
    sd = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)

    def guide(x):
        with pyro.plate("data", x.shape[0], dim=-2):
            z = pyro.sample("z", dist.Normal(x.mean(1, keepdim=True), 0.4))
            with pyro.plate("time", x.shape[1], dim=-1):
                pyro.sample("h", dist.Normal(0.5 * (x + z), sd))

    gate = Gate()
    particles = pvae.draw(transposed(time_model), guide, sequence, K, gate=gate)
    coefficient = torch.arange(K * B, dtype=torch.float64).reshape(K, B)
    gate.open(coefficient)
    h = particles.values["h"]
    (gated,) = torch.autograd.grad(particles.log_likelihood.sum(), h)
    by_hand = coefficient[..., None] * (sequence - h) / 0.09
    torch.testing.assert_close(gated, by_hand, rtol=0, atol=1e-8)


# --- masks and missing data ---------------------------------------------------------------------


def missing(x):
    holed = x.clone()
    holed[0, 1] = holed[3, :2] = math.nan
    return holed, ~holed.isnan()


def own_mask(x):
    """``dist.mask`` below ``to_event``."""
    ok = ~x.isnan()
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", normal(x.new_zeros(2)))
        loc = torch.cat([z, z], -1)
        pyro.sample("x", dist.Normal(loc, LOG_SD.exp()).mask(ok).to_event(1), obs=x)


def poutine_mask(x):
    """``poutine.mask`` over a plate of features."""
    ok = ~x.isnan()
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", normal(x.new_zeros(2)))
        loc = torch.cat([z, z], -1).squeeze(-2)
        with pyro.plate("features", x.shape[1], dim=-1), poutine.mask(mask=ok):
            pyro.sample("x", dist.Normal(loc, LOG_SD.exp()), obs=x)


LOG_SD = nn.Parameter(torch.tensor(-0.1, dtype=torch.float64))


def guide_of_missing(dim):
    def guide(x):
        loc = (LOG_SD * x.nan_to_num()[:, :2]).reshape(len(x), *[1] * (-dim - 1), 2)
        with pyro.plate("data", len(x), dim=dim):
            pyro.sample("z", normal(loc))

    return guide


@pytest.mark.parametrize(
    ("model", "dim"), [(own_mask, -1), (poutine_mask, -2)], ids=["dist.mask", "poutine.mask"]
)
@pytest.mark.parametrize("vectorize", [True, False])
def test_missing_cells_weigh_nothing_and_keep_gradients_finite(x, model, dim, vectorize):
    holed, ok = missing(x)
    LOG_SD.grad = None
    particles = pvae.draw(model, guide_of_missing(dim), holed, K, vectorize=vectorize)
    z = particles.values["z"].detach().reshape(K, B, 2)
    terms = dist.Normal(torch.cat([z, z], -1), LOG_SD.exp()).log_prob(holed.nan_to_num())
    by_hand = torch.where(ok, terms, 0.0).sum(-1)
    torch.testing.assert_close(particles.log_likelihood, by_hand, rtol=0, atol=IDENTITY)
    (truth,) = torch.autograd.grad(by_hand.sum(), LOG_SD)
    path_free = pvae.draw(model, guide_of_missing(dim), holed, K, detach=True)
    (ours,) = torch.autograd.grad(path_free.log_likelihood.sum(), LOG_SD)
    assert ours.isfinite()
    assert truth.isfinite()
    particles.log_weights.sum().backward()
    assert LOG_SD.grad.isfinite()


@pytest.mark.parametrize(
    ("family", "bad", "good"),
    [
        (lambda p: dist.Bernoulli(logits=p), -1.0, 1.0),
        (lambda p: dist.Poisson(p.exp()), -9.0, 2.0),
        (lambda p: dist.LogNormal(p, 1.0), math.nan, 2.0),
        (lambda p: dist.Gamma(p.exp(), 1.0), 0.0, 2.0),
        (lambda p: dist.Beta(p.exp(), 1.5), 0.0, 0.3),
        (lambda p: dist.StudentT(3.0, p), math.inf, 2.0),
    ],
    ids=["bernoulli", "poisson", "lognormal", "gamma", "beta", "student"],
)
def test_masked_cells_may_hold_anything(family, bad, good):
    p = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    data = torch.full((B,), good, dtype=torch.float64)
    ok = torch.ones(B, dtype=torch.bool)
    ok[2] = False
    data[2] = bad

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with poutine.mask(mask=ok):
                pyro.sample("x", family(p + 0.1 * z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))

    likelihood = pvae.draw(model, guide, data, K).log_likelihood
    assert torch.equal(likelihood[:, 2], torch.zeros(K, dtype=torch.float64))
    assert torch.autograd.grad(likelihood.sum(), p)[0].isfinite()


@pytest.mark.parametrize("bad", [1.0, math.nan], ids=str)
def test_masked_one_hot_rows_may_hold_anything(bad):
    """Zeros are not within its support, and a row that is masked out is judged like any other."""
    ok = torch.tensor([True, False, True])
    labels = torch.eye(3, dtype=torch.float64)
    labels[1] = bad

    def model(labels):
        with pyro.plate("data", len(labels), dim=-1):
            z = pyro.sample("z", normal(labels.new_zeros(3)))
            with poutine.mask(mask=ok):
                pyro.sample("y", dist.OneHotCategorical(logits=z), obs=labels)

    def guide(labels):
        with pyro.plate("data", len(labels), dim=-1):
            pyro.sample("z", normal(labels.new_zeros(3)))

    particles = pvae.draw(model, guide, labels, K)
    by_hand = particles.values["z"].log_softmax(-1)[:, [0, 1, 2], [0, 1, 2]] * ok
    torch.testing.assert_close(particles.log_p["y"], by_hand)


def test_obs_mask_makes_a_latent_site_of_what_is_missing():
    data = torch.randn(B, dtype=torch.float64)
    ok = torch.tensor([True, False, True, True, False])

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x, obs_mask=ok)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with poutine.mask(mask=~ok):
                pyro.sample("x_unobserved", dist.Normal(x.new_zeros(()), 1.0))

    particles = pvae.draw(model, guide, data, K)
    assert particles.observed == ("x_observed",)
    z, filled = particles.values["z"], particles.values["x_unobserved"]
    unit, near = dist.Normal(0.0, 1.0), dist.Normal(z, 0.5)
    by_hand = torch.where(ok, near.log_prob(data), near.log_prob(filled) - unit.log_prob(filled))
    torch.testing.assert_close(particles.log_weights, by_hand, rtol=0, atol=IDENTITY)


def test_mask_false_switches_a_site_off(x):
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", normal(x.new_zeros(2)))
            pyro.sample("x", normal(torch.cat([z, z], -1)), obs=x)
            with poutine.mask(mask=False):
                pyro.sample("y", normal(x.new_zeros(4)), obs=x)

    particles = pvae.draw(model, plain_guide, x, K)
    assert torch.equal(particles.log_p["y"], torch.zeros(K, B, dtype=torch.float64))


# --- scales, subsampled plates, global sites ----------------------------------------------------


def test_subsampled_plate_and_scale_stay_out_of_the_log_weights():
    model, x = linear_gaussian(B)
    guide = AffineGuide().double()
    torch.manual_seed(0)
    plain = pvae.draw(model, guide, x, K)
    model.total = guide.total = 4 * B
    torch.manual_seed(0)
    scaled = pvae.draw(poutine.scale(model, scale=0.3), poutine.scale(guide, scale=0.3), x, K)
    assert torch.equal(plain.log_weights, scaled.log_weights)
    assert scaled.scale == pytest.approx(4 * 0.3)
    assert scaled.plate_scale == 4
    assert scaled.relative_scale == {}
    assert (plain.scale, plain.plate_scale) == (1.0, 1.0)


def picking(model, total=40):
    """A pair whose plate picks B of the rows itself, with the exact posterior."""

    def generate(x):
        with pyro.plate("data", total, subsample_size=B, dim=-1) as rows:
            z = pyro.sample("z", normal(x.new_zeros(2)))
            loc = z @ model.weight.T + model.offset
            pyro.sample("x", normal(loc, model.log_noise.exp()), obs=x[rows])

    def guide(x):
        with pyro.plate("data", total, subsample_size=B, dim=-1) as rows:
            pyro.sample("z", model.posterior(x[rows]))

    return generate, guide


def test_plate_that_picks_its_rows_gives_model_and_guide_the_same():
    model, data = linear_gaussian(40)
    particles = pvae.draw(*picking(model), data, K)
    assert particles.shape == (K, B)
    assert particles.plate_scale == 8
    log_weights = particles.log_weights.detach()
    distance = (log_weights[0, :, None] - model.log_evidence(data).detach()).abs().min(1).values
    assert float(distance.max()) < IDENTITY
    assert float(log_weights.std(0).max()) < IDENTITY


def test_guide_without_plates_follows_a_subsampled_model(x):
    def model(x):
        with pyro.plate("data", 50, subsample=x, dim=-1):
            z = pyro.sample("z", normal(x.new_zeros(2)))
            pyro.sample("x", normal(torch.cat([z, z], -1)), obs=x)

    def guide(x):
        pyro.sample("z", normal(x[:, :2]))

    assert pvae.draw(model, guide, x, K).relative_scale == {}
    torch.manual_seed(0)
    loss = float(pvae.iwae(K)(model, guide, x))
    torch.manual_seed(0)
    log_weights = pvae.draw(model, guide, x, K).log_weights
    assert loss == pytest.approx(-10 * float(pvae.bounds.iw_elbo(log_weights).sum()))


def test_tensor_scale_is_a_scale(x):
    scale = torch.tensor(0.3, dtype=torch.float64)
    model, guide = (poutine.scale(p, scale=scale) for p in (plain_model, plain_guide))
    assert pvae.draw(model, guide, x, K).relative_scale == {}
    torch.manual_seed(0)
    scaled = float(pvae.iwae(K)(model, guide, x))
    torch.manual_seed(0)
    assert scaled == pytest.approx(0.3 * float(pvae.iwae(K)(plain_model, plain_guide, x)))


def test_scale_per_datum_weighs_each_bound(x):
    weights = torch.rand(B, dtype=torch.float64)
    model, guide = (poutine.scale(p, scale=weights) for p in (plain_model, plain_guide))
    torch.manual_seed(0)
    loss = float(pvae.iwae(K)(model, guide, x))
    torch.manual_seed(0)
    bound = pvae.bounds.iw_elbo(pvae.draw(plain_model, plain_guide, x, K).log_weights)
    assert loss == pytest.approx(-float((weights * bound).sum()))


@pytest.mark.parametrize("shape", [(4, 1), (4, B)], ids=str)
def test_scale_within_a_datum_is_refused(shape):
    weights = torch.rand(shape, dtype=torch.float64)

    def model(x):
        with pyro.plate("data", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("time", len(x), dim=-2), poutine.scale(scale=weights):
                pyro.sample("x", dist.Normal(z, 0.3), obs=x)

    def guide(x):
        with pyro.plate("data", x.shape[1], dim=-1):
            pyro.sample("z", dist.Normal(x.mean(0), 0.4))

    with pytest.raises(ProgramError, match=r"'x' has a poutine.scale of shape .* within one datum"):
        pvae.draw(model, guide, torch.randn(4, B, dtype=torch.float64), K)


def test_scale_per_datum_left_of_a_time_plate():
    weights = torch.rand(B, 1, dtype=torch.float64)
    pair = [poutine.scale(transposed(p), scale=weights) for p in (time_model, time_guide)]
    x = torch.randn(B, 4, dtype=torch.float64)
    ours = our_loss(*pair, x, data_plate="data")
    assert ours == pytest.approx(trace_elbo(*pair, x, max_plate_nesting=2), abs=IDENTITY)


def words(size=30, *, plates=True):
    """Documents in columns, of whose ``size`` words a plate picks those that there are."""

    def model(x):
        with pyro.plate("data", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("words", size, subsample=torch.arange(len(x)), dim=-2):
                h = pyro.sample("h", dist.Normal(z, 0.5))
                pyro.sample("x", dist.Normal(h, 0.3), obs=x)

    def guide(x):
        with pyro.plate("data", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(x.mean(0), 0.4))
            with pyro.plate("words", size, subsample=torch.arange(len(x)), dim=-2):
                pyro.sample("h", dist.Normal(0.5 * (x + z), 0.2))

    def bare(x):
        z = pyro.sample("z", dist.Normal(x.mean(0), 0.4))
        pyro.sample("h", dist.Normal(0.5 * (x + z), 0.2))

    return model, guide if plates else bare


@pytest.mark.parametrize("plates", [True, False])
def test_subsampled_plate_within_a_datum_is_made_up_for(plates):
    x = torch.randn(3, B, dtype=torch.float64)
    ours = our_loss(*words(plates=plates), x)
    assert ours == pytest.approx(trace_elbo(*words(), x, max_plate_nesting=2), abs=IDENTITY)
    objective = pvae.vae()
    layout = objective.prepare(*words(plates=plates), x)
    torch.manual_seed(5)
    loss = objective.evaluate(*words(plates=plates), x, layout=layout)
    for quoted in (loss.bound, loss.elbo, loss.reconstruction - loss.kl):
        assert -quoted.sum().item() == pytest.approx(ours, abs=IDENTITY)


def test_subsampled_plate_within_a_datum_has_no_evidence():
    x = torch.randn(3, B, dtype=torch.float64)
    with pytest.raises(ObjectiveError, match="'x' is in a plate that picks a part of each datum"):
        pvae.iwae(K)(*words(), x)
    with pytest.raises(ProgramError, match="is in a plate that picks a part of each datum"):
        pvae.evidence.importance(*words(), x, num_particles=K)


def test_plate_scale_is_that_of_the_data_whatever_plate_is_outside():
    def model(x):
        with (
            pyro.plate("time", x.shape[1], dim=-2),
            pyro.plate("data", 100, subsample=torch.arange(len(x)), dim=-1),
        ):
            pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x.T)

    assert plate_scale(model, torch.randn(B, B)) == 100 / B


def shared_model(x):
    t = pyro.sample("t", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", normal(x.new_zeros(2)))
        pyro.sample("x", normal(torch.cat([z, z], -1) + t[..., None]), obs=x)


def shared_guide(x):
    pyro.sample("t", dist.Normal(x.new_tensor(0.3), 0.5))
    plain_guide(x)


def test_global_site_is_kept_apart(x):
    particles = pvae.draw(shared_model, shared_guide, x, K)
    assert particles.log_weights.shape == (K, B)
    assert particles.values["t"].shape == (K, 1)
    t = particles.values["t"][:, 0]
    torch.testing.assert_close(particles.global_log_p["t"], dist.Normal(0.0, 1.0).log_prob(t))
    torch.testing.assert_close(
        particles.global_log_q["t"], dist.Normal(x.new_tensor(0.3), 0.5).log_prob(t)
    )
    assert "t" not in particles.log_p


@pytest.mark.parametrize("num_particles", [1, 4])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_global_site_counts_as_in_pyro(x, num_particles, scale):
    model, guide = (poutine.scale(p, scale=scale) for p in (shared_model, shared_guide))
    ours = our_loss(model, guide, x, num_particles=num_particles)
    theirs = trace_elbo(model, guide, x, num_particles=num_particles, max_plate_nesting=1)
    assert ours == pytest.approx(theirs, abs=IDENTITY)


def test_global_sites_alone_will_do(x):
    def model(x):
        t = pyro.sample("t", normal(x.new_zeros(4)))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", normal(t), obs=x)

    def guide(x):
        pyro.sample("t", normal(x.mean(0), 0.3))

    ours = our_loss(model, guide, x, num_particles=4)
    theirs = trace_elbo(model, guide, x, num_particles=4, max_plate_nesting=1)
    assert ours == pytest.approx(theirs, abs=IDENTITY)


@pytest.mark.parametrize("rows", [2, B], ids=["as long as the batch", "shorter"])
def test_global_site_may_have_a_plate_of_its_own(x, rows):
    """Topics and documents of latent Dirichlet allocation share dim -1."""

    def guide(x):
        with pyro.plate("topics", 2, dim=-1):
            pyro.sample("topics_loc", normal(x.new_zeros(4), 0.3))
        plain_guide(x)

    def model(x):
        with pyro.plate("topics", 2, dim=-1):
            topics = pyro.sample("topics_loc", normal(x.new_zeros(4)))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", normal(x.new_zeros(2)))
            pyro.sample("x", normal(z @ topics), obs=x)

    batch = x[:rows]
    particles = pvae.draw(model, guide, batch, K)
    assert "topics_loc" in particles.global_log_p
    assert particles.shape == (K, rows)
    ours = our_loss(model, guide, batch, num_particles=4)
    theirs = trace_elbo(model, guide, batch, num_particles=4, max_plate_nesting=1)
    assert ours == pytest.approx(theirs, abs=IDENTITY)


@pytest.mark.parametrize("loss", [pvae.vae(2), pvae.iwae(2)], ids=["vae", "iwae"])
def test_factor_outside_the_data_plate_counts_once(x, loss):
    def model(x):
        pyro.factor("penalty", x.new_tensor(-3.0))
        plain_model(x)

    torch.manual_seed(0)
    with_factor = loss(model, plain_guide, x).item()
    torch.manual_seed(0)
    assert with_factor == pytest.approx(loss(plain_model, plain_guide, x).item() + 3)


def rows_without_a_plate(x):
    plain_model(x)
    pyro.factor("bonus", -x.square().sum(-1))


def test_factor_for_each_datum_counts_for_a_single_row(x):
    two, one = (pvae.draw(rows_without_a_plate, plain_guide, x[:n], 3) for n in (2, 1))
    assert torch.equal(one.log_p["bonus"], two.log_p["bonus"][:, :1])


def test_factor_for_each_datum_counts_in_a_last_block_of_one_row(x):
    rows, both = x[:3], []
    for model in (plain_model, rows_without_a_plate):
        found = pvae.evidence.importance(model, plain_guide, rows, num_particles=4, max_pairs=2)
        both.append(found.log_evidence)
    torch.testing.assert_close(both[1] - both[0], -rows.square().sum(-1).double())


@pytest.mark.parametrize("anchors", [1, 2, 5])
def test_data_that_belong_to_no_datum_count_once(x, anchors):
    def model(x):
        with pyro.plate("anchors", anchors, dim=-1):
            pyro.sample("anchor", dist.Normal(x.new_zeros(()), 1.0), obs=x.new_ones(anchors))
        plain_model(x)

    ours = our_loss(model, plain_guide, x[:5], num_particles=4)
    theirs = trace_elbo(model, plain_guide, x[:5], num_particles=4, max_plate_nesting=1)
    assert ours == pytest.approx(theirs, abs=IDENTITY)


def test_deterministic_sites_are_no_sites(x):
    def model(x):
        pyro.deterministic("shared", x.new_ones(3))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", normal(x.new_zeros(2)))
            pyro.deterministic("double", 2 * z, event_dim=1)
            pyro.sample("x", normal(torch.cat([z, z], -1)), obs=x)

    particles = pvae.draw(model, plain_guide, x, K)
    assert particles.observed == ("x",)
    assert set(particles.log_p) == {"z", "x"}
    assert particles.global_log_p == {}


# --- programs of other styles -------------------------------------------------------------------


def test_programs_in_the_style_of_pyros_examples():
    vae = PyroStyleVAE()
    x = torch.randn(B, 5)
    particles = pvae.draw(vae.model, vae.guide, x, K)
    assert particles.log_weights.shape == (K, B)
    particles.log_weights.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
    found = parameters(vae.model, vae.guide, x)
    assert {id(p) for p in found.values()} == {id(p) for p in vae.parameters()}
    assert len(found) == 4


def test_parameters_of_the_global_store_are_found(x):
    def guide(x):
        loc = pyro.param("loc", lambda: x.new_zeros(2))
        sd = pyro.param("sd", lambda: x.new_ones(2), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", normal(loc, sd))

    found = parameters(plain_model, guide, x)
    assert set(found) == {"store.loc", "store.sd"}
    assert all(p.is_leaf and p.requires_grad for p in found.values())
    pvae.draw(plain_model, guide, x, K).log_weights.sum().backward()
    assert all(p.grad is not None for p in found.values())


class Modular(pyro.nn.PyroModule):
    """A PyroModule with a constrained parameter and, if ``bayesian``, a weight with a prior."""

    def __init__(self, *, bayesian=False):
        super().__init__()
        weight = torch.eye(2, 4, dtype=torch.float64)
        self.weight = nn.Parameter(weight)
        if bayesian:
            self.weight = pyro.nn.PyroSample(dist.Normal(weight, 1.0).to_event(2))
        self.sd = pyro.nn.PyroParam(
            torch.tensor(0.8, dtype=torch.float64), constraint=dist.constraints.positive
        )

    def forward(self, x):
        weight = self.weight
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", normal(x.new_zeros(2)))
            loc = (z[..., None, :] @ weight).squeeze(-2)
            pyro.sample("x", normal(loc, self.sd), obs=x)


def test_pyro_modules(x):
    model = Modular()
    found = parameters(model, plain_guide, x)
    assert {id(p) for p in found.values()} == {id(p) for p in model.parameters()}
    pvae.draw(model, plain_guide, x, K).log_weights.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_pyro_sample_is_a_global_site(x):
    def guide(x):
        pyro.sample("weight", dist.Normal(torch.eye(2, 4, dtype=torch.float64), 0.1).to_event(2))
        plain_guide(x)

    model = Modular(bayesian=True)
    particles = pvae.draw(model, guide, x, K)
    assert particles.global_log_p["weight"].shape == (K,)
    ours = our_loss(model, guide, x, num_particles=4)
    theirs = trace_elbo(model, guide, x, num_particles=4, max_plate_nesting=1)
    assert ours == pytest.approx(theirs, abs=IDENTITY)


@pytest.mark.parametrize("options", [{}, {"analytic_kl": True}], ids=str)
def test_auto_normal_is_a_guide(x, options):
    guide = AutoNormal(plain_model)
    guide(x)
    guide.double()
    assert our_loss(plain_model, guide, x, **options) == pytest.approx(
        trace_elbo(plain_model, guide, x), abs=IDENTITY
    )


def test_joint_auto_guide_shares_its_density_among_all_data(x):
    """It is one site for all local latents: no datum has a weight of its own."""
    guide = AutoDiagonalNormal(plain_model)
    guide(x)
    guide.double()
    assert our_loss(plain_model, guide, x) == pytest.approx(
        trace_elbo(plain_model, guide, x), abs=IDENTITY
    )
    with pytest.raises(ObjectiveError, match=r"'_AutoDiagonalNormal_latent' is shared by all data"):
        pvae.iwae(K)(plain_model, guide, x)
    with pytest.raises(ProgramError, match=r"'_AutoDiagonalNormal_latent' is shared by all data"):
        pvae.evidence.importance(plain_model, guide, x, num_particles=K)


def test_module_is_found_through_handlers_and_partials():
    module = AffineGuide()
    assert module_of(module) is module_of(module.forward) is module
    assert module_of(poutine.scale(module, scale=0.1)) is module
    assert module_of(poutine.mask(poutine.scale(module, scale=0.1), mask=True)) is module
    assert module_of(functools.partial(module, x=1)) is module
    assert module_of(plain_model) is None


def test_distribution_without_a_declared_support(x):
    class Unsupported(dist.TorchDistribution):
        arg_constraints = {}

        def __init__(self, loc):
            self.loc = loc
            super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

        def log_prob(self, value):
            return -((value - self.loc) ** 2).sum(-1)

        def sample(self, sample_shape=()):
            return self.loc

        def expand(self, batch_shape, _instance=None):
            return Unsupported(self.loc.expand((*batch_shape, *self.event_shape)))

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", normal(x.new_zeros(2)))
            pyro.sample("x", Unsupported(torch.cat([z, z], -1)), obs=x)

    assert pvae.draw(model, plain_guide, x, K).log_weights.shape == (K, B)


# --- one by one ---------------------------------------------------------------------------------


def test_one_by_one_equals_all_at_once_in_distribution():
    model, x = linear_gaussian(3)
    model.requires_grad_(False)
    guide = guide_near_posterior(model, move=0.3, widen=1.2)
    at_once = pvae.draw(model, guide, x, 600).log_weights
    one_by_one = pvae.draw(model, guide, x, 600, vectorize=False).log_weights
    assert one_by_one.shape == at_once.shape
    spread = (at_once.var(0) + one_by_one.var(0)) / 600
    z = (at_once.mean(0) - one_by_one.mean(0)).abs() / spread.sqrt()
    assert float(z.max()) < SE
    ratio = at_once.var(0) / one_by_one.var(0)
    assert 0.6 < float(ratio.min()) <= float(ratio.max()) < 1.6


@pytest.mark.parametrize("num_particles", [1, K])
def test_one_by_one_has_the_same_shapes(x, num_particles):
    options = {"score": True, "analytic_kl": True}
    one = pvae.draw(shared_model, shared_guide, x, num_particles, vectorize=False, **options)
    all_ = pvae.draw(shared_model, shared_guide, x, num_particles, **options)
    for field in ("log_p", "log_q", "kl", "score", "global_log_p", "global_log_q"):
        ours, theirs = getattr(one, field), getattr(all_, field)
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert one.values["z"].shape == all_.values["z"].shape == (num_particles, B, 2)


@pytest.mark.parametrize(
    "options", [{"sites": True}, {"relax": lambda *_: None}], ids=["sites", "relax"]
)
def test_one_by_one_has_no_sites_to_give(x, options):
    with pytest.raises(ProgramError, match="all particles at once.* leave vectorize at True"):
        pvae.draw(plain_model, plain_guide, x, K, vectorize=False, **options)


def test_one_by_one_picks_the_same_rows_for_every_particle():
    model, data = linear_gaussian(40)
    log_weights = pvae.draw(*picking(model), data, 4, vectorize=False).log_weights.detach()
    assert float(log_weights.std(0).max()) < IDENTITY


def test_program_with_python_branches_runs_one_by_one(x):
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", normal(x.new_zeros(2)))
            loc = torch.cat([z, -z], -1) if z.sum().item() > 0 else torch.cat([z, z], -1)
            pyro.sample("x", normal(loc.reshape(len(x), 4)), obs=x)

    assert pvae.draw(model, plain_guide, x, K, vectorize=False).log_weights.shape == (K, B)


# --- looking leaves no trace --------------------------------------------------------------------


def test_inspection_leaves_the_random_stream(x):
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    inspect(plain_model, plain_guide, x)
    assert torch.equal(torch.randn(4), expected)


def test_inspection_is_hidden_from_outer_handlers(x):
    with poutine.trace() as outer:
        inspect(plain_model, plain_guide, x)
    assert list(outer.trace.nodes) == []


def test_layout_holds_for_other_batch_sizes(x):
    layout = inspect(plain_model, plain_guide, x)
    assert pvae.draw(plain_model, plain_guide, x[:1], K, layout=layout).shape == (K, 1)
    assert pvae.draw(plain_model, plain_guide, x.repeat(3, 1), K, layout=layout).shape == (K, 3 * B)


@pytest.mark.parametrize("num_particles", [1, 4])
def test_same_seed_gives_the_elbo_of_trace_elbo(num_particles):
    model, x = linear_gaussian(8)
    guide = AffineGuide().double()
    theirs = trace_elbo(model, guide, x, num_particles=num_particles, max_plate_nesting=1)
    torch.manual_seed(5)
    log_weights = pvae.draw(model, guide, x, num_particles).log_weights
    assert -log_weights.mean(0).sum().item() == pytest.approx(theirs, abs=IDENTITY)
    ours = our_loss(model, guide, x, num_particles=num_particles)
    assert ours == pytest.approx(theirs, abs=IDENTITY)


def test_guide_and_model_can_be_run_apart():
    model, x = linear_gaussian(4)
    guide = AffineGuide().double()
    layout = inspect(model, guide, x)
    torch.manual_seed(2)
    values, log_q = sample_guide(guide, x, K, layout)
    log_p = log_joint(model, x, values, K, layout)
    torch.manual_seed(2)
    whole = pvae.draw(model, guide, x, K)
    torch.testing.assert_close(log_p - log_q, whole.log_weights, rtol=0, atol=IDENTITY)


def test_score_is_log_q_at_draws_held_fixed():
    guide = AffineGuide().double()
    model, x = linear_gaussian(4)
    particles = pvae.draw(model, guide, x, K, score=True)
    torch.testing.assert_close(particles.score["z"], particles.log_q["z"])
    (ours,) = torch.autograd.grad(particles.score["z"].sum(), guide.shift, retain_graph=True)
    z = particles.values["z"].detach()
    by_hand = dist.Normal(x @ guide.map.T + guide.shift, guide.log_sd.exp()).log_prob(z).sum()
    (theirs,) = torch.autograd.grad(by_hand, guide.shift)
    torch.testing.assert_close(ours, theirs)


def test_detach_cuts_every_path():
    model, x = linear_gaussian(4)
    guide = AffineGuide().double()
    particles = pvae.draw(model, guide, x, K, detach=True)
    assert not particles.values["z"].requires_grad
    with pytest.raises(RuntimeError, match="unused"):
        torch.autograd.grad(sum_terms(particles.log_p).sum(), guide.shift)


# --- what is refused ----------------------------------------------------------------------------


def lacks_a_latent(x):
    with pyro.plate("data", len(x), dim=-1):
        pass


def extra_site(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", normal(x[:, :2]))
        pyro.sample("u", normal(x[:, :2]))


def other_size(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", normal(x[:, :3]))


def other_event(x):
    with pyro.plate("data", len(x), dim=-1), pyro.plate("time", 1, dim=-2):
        pass
    pyro.sample("z", dist.Normal(x[:, :2], 1.0).to_event(2))


def outside_the_plate(x):
    pyro.sample("z", normal(x.new_zeros(2)))


def no_plate(x):
    z = pyro.sample("z", dist.Normal(x[:, :2], 1.0).to_event(2))
    pyro.sample("x", dist.Normal(torch.cat([z, z], -1), 1.0).to_event(2), obs=x)


def no_plate_guide(x):
    pyro.sample("z", dist.Normal(x[:, :2], 1.0).to_event(2))


def two_plates(x):
    with pyro.plate("rows", len(x), dim=-2), pyro.plate("columns", x.shape[1], dim=-1):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def two_plates_guide(x):
    with pyro.plate("rows", len(x), dim=-2), pyro.plate("columns", x.shape[1], dim=-1):
        pyro.sample("z", dist.Normal(x, 1.0))


def no_latent(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("x", normal(x.new_zeros(4)), obs=x)


def no_observed(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", normal(x.new_zeros(2)))


def enumerated(x):
    with pyro.plate("data", len(x), dim=-1):
        c = pyro.sample("c", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("x", normal(c[..., None].expand(*c.shape, 4)), obs=x)


def unvectorised(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", normal(x.new_zeros(2)))
        pyro.sample("x", normal(torch.cat([z, x[:, :2]], -1)), obs=x)


def crashes(x):
    raise KeyError("w")


def empty(x):
    return None


@pytest.mark.parametrize(
    ("model", "guide", "words"),
    [
        (plain_model, lacks_a_latent, ["{'z'}", "add 'z' to the guide"]),
        (plain_model, extra_site, ["{'u'}", "remove it", "is_auxiliary"]),
        (plain_model, other_size, ["'z'", "(5, 2)", "(5, 3)"]),
        (plain_model, other_event, ["'z'", "last 1", "last 2", ".to_event(1)"]),
        (plain_model, outside_the_plate, ["'z'", "(5, 2)", "(2,)", "plates"]),
        (no_plate, no_plate_guide, ["no data plate", "{'x'}", 'pyro.plate("data", 5']),
        (no_latent, empty, ["no latent site", "without obs"]),
        (no_observed, plain_guide, ["no observed site", "obs=x"]),
        (enumerated, empty, ["{'c'}", "TraceEnum_ELBO", "guide"]),
        (unvectorised, plain_guide, ["2 particles at once", "vectorize=False"]),
        (crashes, plain_guide, ["model failed", "KeyError"]),
        (plain_model, crashes, ["guide failed", "KeyError"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_pairs_that_do_not_fit_are_refused(x, model, guide, words):
    with pytest.raises(ProgramError) as caught:
        pvae.draw(model, guide, x, K)
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


def test_two_data_plates_are_refused_unless_one_is_named():
    square = torch.randn(B, B)
    with pytest.raises(
        ProgramError, match=r"two data plates, 'rows' .* and 'columns'.*data_plate="
    ):
        pvae.draw(two_plates, two_plates_guide, square, K)
    by_row = pvae.draw(two_plates, two_plates_guide, square, K, data_plate="rows")
    torch.manual_seed(0)
    z = by_row.values["z"]
    by_hand = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(square)
    by_hand = (by_hand - dist.Normal(square, 1.0).log_prob(z)).sum(-1)
    torch.testing.assert_close(by_row.log_weights, by_hand)


def test_unknown_data_plate_is_refused(x):
    with pytest.raises(ProgramError, match=r"called 'rows'.*\{'data'\}"):
        pvae.draw(plain_model, plain_guide, x, data_plate="rows")


@pytest.mark.parametrize("num_particles", [0, -1])
def test_fewer_than_one_particle_is_refused(x, num_particles):
    with pytest.raises(ProgramError, match="num_particles must be at least 1, got"):
        pvae.draw(plain_model, plain_guide, x, num_particles)


def test_batch_without_tensors_is_refused():
    def model():
        with pyro.plate("data", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))

    def guide():
        with pyro.plate("data", 3, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ProgramError, match="at least one tensor"):
        pvae.draw(model, guide, ())


def trials(total, successes):
    with pyro.plate("data", len(total), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("k", dist.Binomial(total, logits=z), obs=successes)


class TrialsGuide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(()))

    def forward(self, total, successes=None):
        with pyro.plate("data", len(total), dim=-1):
            pyro.sample("z", dist.Normal(self.loc, 1.0))


def test_bounds_of_each_row_are_asked_of_that_row_alone():
    total = torch.arange(1.0, 8.0)
    options = {"epochs": 1, "batch_size": 3, "engine": "eager", "progress": False}
    pvae.fit(trials, TrialsGuide(), (total, total), **options)
    with pytest.raises(DataError, match="bounds of each row's own, row 1 of the data has 3"):
        pvae.fit(trials, TrialsGuide(), (total, total.clone().index_fill(0, torch.tensor(1), 3)))


def test_support_that_moves_with_the_latents_may_rule_data_out():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Uniform(z - 1, z + 1, validate_args=False), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x, 1.0))

    x = torch.linspace(-2, 2, 5)
    normal = dist.Normal(0.0, 1.0)
    truth = ((normal.cdf(x + 1) - normal.cdf(x - 1)) / 2).log().double()
    found = pvae.evidence.importance(model, guide, x, num_particles=4000)
    assert ((found.log_evidence - truth).abs() < 4 * found.stderr).all()


@pytest.mark.parametrize("rows", [torch.full((4, 3), 0.5), torch.tensor([0.5, 0.5, 0.5])])
def test_rows_off_the_simplex_are_refused_by_row(rows):
    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Dirichlet(torch.ones(3)), obs=rows)

    def guide(batch):
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    with pytest.raises(DataError, match="in Simplex, row 0 of the data has a value outside it"):
        pvae.draw(model, guide, torch.zeros(4))


def test_a_model_with_rows_of_its_own_is_not_trained_on_shuffled_ones():
    total = torch.arange(1.0, 8.0)
    model = pyro.condition(lambda total: trials(total, None), {"k": total})
    with pytest.raises(ProgramError, match="site 'k' observes the same rows whatever the batch is"):
        pvae.fit(model, TrialsGuide(), total, epochs=1, engine="eager", progress=False)


@pytest.mark.parametrize("look", [lambda m, x: pvae.draw(m, plain_guide, x), pvae.guides.auto])
def test_data_that_no_density_takes_are_refused(x, look):
    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", normal(x.new_zeros(2)))
            pyro.sample("x", normal(torch.cat([z, z], -1)), obs=x[:3])

    with pytest.raises(ProgramError, match="site 'x' has no density at its value"):
        look(model, x[:2])


def test_grey_pixels_are_refused_by_row():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", normal(x.new_zeros(4)))
            pyro.sample("x", dist.Bernoulli(logits=z).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", normal(x))

    grey = torch.ones(B, 4)
    grey[3, 1] = 0.25
    with pytest.raises(DataError, match=r"Bernoulli .*'x'.* row 3 .*0\.25.*binarize") as caught:
        pvae.draw(model, guide, grey)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 65


def test_nan_that_nothing_masks_is_refused(x):
    x[2, 0] = math.nan

    def guide(x):
        plain_guide(x.nan_to_num())

    with pytest.raises(DataError, match=r"'x'.*row 2.*nan"):
        pvae.draw(plain_model, guide, x)


def test_linear_gaussian_reference_is_right():
    """The truth itself, against numerical integration in one dimension."""
    model = LinearGaussian(x_dim=2, z_dim=1).double()
    x = torch.randn(3, 2, dtype=torch.float64)
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None]
    loc = z @ model.weight.T + model.offset
    log_joint = normal(loc[:, None], model.log_noise.exp()).log_prob(x)
    log_joint = log_joint + dist.Normal(0.0, 1.0).log_prob(z)
    numerical = torch.logsumexp(log_joint, 0) + math.log(24 / 4000)
    torch.testing.assert_close(numerical, model.log_evidence(x), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("prior", "posterior", "words"),
    [
        (dist.Poisson(3.0), dist.Normal(0.5, 0.01), "Poisson.*draws values outside"),
        (dist.Gamma(2.0, 1.0), dist.Normal(-3.0, 0.1), "Gamma.*GreaterThan.*Normal"),
    ],
)
def test_a_guide_of_another_support_is_refused(prior, posterior, words):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior)

    with pytest.raises(ProgramError, match=words) as caught:
        pvae.draw(model, guide, torch.zeros(4))
    assert "\n" not in str(caught.value)
