"""Convolutional networks, the conv pair, and the discretised logistic mixture."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import pvae
from pvae.autoregressive import Autoregressive
from pvae.convolutions import ConvolutionalDecoder, ConvolutionalEncoder, image_shape_of
from pvae.distributions import DiscretizedLogistic
from pvae.errors import OptionError
from pvae.guides.conv import Conv as ConvGuide
from pvae.logistic_mixture import DiscretizedLogisticMixture, mixture_size, pixel_mixture
from pvae.models.conv import Conv
from pvae.plots.images import as_images

SHAPES = [(28, 28), (7, 10), (3, 8, 6), (8, 6, 3), (1, 5, 5), (9, 9, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_become_images_and_rows_again(shape):
    x_dim = math.prod(shape)
    image = image_shape_of(x_dim, shape)
    rows = torch.randn(2, 3, x_dim)
    images = image.to_images(rows)
    assert images.shape == (6, image.channels, image.height, image.width)
    assert torch.equal(image.to_rows(images, (2, 3)), rows)
    if image.channels in (1, 3):  # what the figures show is what the networks see
        shown = torch.as_tensor(as_images(rows.flatten(0, 1).numpy(), shape))
        shown = shown[:, None] if shown.ndim == 3 else shown.movedim(-1, 1)
        assert torch.equal(images, shown)


@pytest.mark.parametrize(
    ("x_dim", "shape", "words"),
    [(6, None, "no square image"), (6, (2, 4), "no image of 6"), (6, (6,), "no image of 6"),
     (0, (0, 3), "no image of 0"), (24, (2, 3, 2, 2), "no image of 24")],
)  # fmt: skip
def test_what_is_no_image_is_refused_in_one_sentence(x_dim, shape, words):
    with pytest.raises(OptionError, match=words):
        Conv(x_dim, shape)


@pytest.mark.parametrize(
    "options",
    [{"channels": ()}, {"channels": (4, 0)}, {"blocks": -1}, {"normalization": "batch"},
     {"activation": "sinus"}, {"likelihood": "poisson"}, {"mixture_components": 0}],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(OptionError):
        Conv(16, **options)


def test_square_images_need_no_shape():
    assert Conv(25).shape[:3] == (1, 5, 5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalization", ["none", "group", "layer"])
def test_networks_take_any_image_and_fold_leading_dimensions(shape, normalization):
    image = image_shape_of(math.prod(shape), shape)
    options = {"channels": (8, 16, 24), "blocks": 1, "normalization": normalization, "hidden": 5}
    encoder = ConvolutionalEncoder(image, 4, **options)
    decoder = ConvolutionalDecoder(4, image, 2 * image.channels, **options)
    x = torch.randn(2, 3, math.prod(shape))
    y = encoder(x)
    assert y.shape == (2, 3, 4)
    assert torch.allclose(y[1, 2], encoder(x[1, 2]), atol=1e-5)  # a datum is alone
    assert decoder(y).shape == (6, 2 * image.channels, image.height, image.width)


def test_an_encoder_is_translation_equivariant_and_an_mlp_is_not():
    """What convolutions are for: a shift by a multiple of the stride shifts the features."""
    image = image_shape_of(16 * 16, (16, 16))
    encoder = ConvolutionalEncoder(image, 1, (4, 4), activation="tanh")
    x = torch.zeros(1, 16, 16)
    x[:, 4:8, 4:8] = torch.randn(4, 4)
    shifted = x.roll(4, 2)
    first, second = (encoder.body[:-1](y[None])[0] for y in (x, shifted))
    assert torch.allclose(first[:, :, 1:3], second[:, :, 2:4], atol=1e-6)
    assert not torch.allclose(first, second, atol=1e-3)


def test_spectral_normalisation_makes_every_layer_one_lipschitz():
    image = image_shape_of(64, (8, 8))
    encoder = ConvolutionalEncoder(image, 1, (4,), spectral=True)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(7.0)
        for _ in range(60):
            encoder(torch.randn(2, 64))
    encoder.eval()
    for module in encoder.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            largest = torch.linalg.matrix_norm(module.weight.detach().flatten(1), 2)
            assert abs(float(largest) - 1) < 0.02


# --- the mixture ---------------------------------------------------------------------------------


def mixture(pixels: int, channels: int, levels: int, *, channels_last: bool = False):
    generator = torch.Generator().manual_seed(2)
    free = torch.randn(
        mixture_size(channels, 3), 1, pixels, generator=generator, dtype=torch.float64
    )
    return pixel_mixture(2 * free, channels, 3, levels, channels_last=channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("pixels", "channels", "levels"), [(1, 1, 256), (2, 1, 5), (1, 3, 6),
                                                            (2, 2, 4)])  # fmt: skip
def test_probabilities_sum_to_one(pixels, channels, levels, channels_last):
    distribution = mixture(pixels, channels, levels, channels_last=channels_last)
    rows = torch.tensor(list(itertools.product(range(levels), repeat=pixels * channels)))
    total = distribution.log_prob(rows.double()).exp().sum()
    assert abs(float(total) - 1) < 1e-12


def test_forgetting_the_tails_is_caught_by_the_sum():
    distribution = mixture(1, 1, 8)
    inner = torch.arange(1, 7, dtype=torch.float64)[:, None]
    assert float(distribution.log_prob(inner).exp().sum()) < 0.999


def test_one_component_is_the_discretised_logistic():
    loc = torch.tensor([0.3, -0.8], dtype=torch.float64)
    scale = torch.tensor([0.2, 0.05], dtype=torch.float64)
    levels = 16
    one = DiscretizedLogisticMixture(
        torch.zeros(2, 1).double(), loc[:, None, None], scale[:, None, None], None, levels
    )
    half = (levels - 1) / 2
    plain = DiscretizedLogistic((loc + 1) * half, scale * half, levels).to_event(1)
    x = torch.tensor(list(itertools.product(range(levels), repeat=2))).double()
    assert torch.allclose(one.log_prob(x), plain.log_prob(x), atol=1e-10)


@pytest.mark.parametrize("channels_last", [False, True])
def test_samples_follow_the_probabilities_channel_by_channel(channels_last):
    distribution = mixture(2, 2, 3, channels_last=channels_last)
    rows = torch.tensor(list(itertools.product(range(3), repeat=4))).double()
    expected = distribution.log_prob(rows).exp()
    draws = distribution.sample((20_000,))
    code = (draws * torch.tensor([27.0, 9.0, 3.0, 1.0])).sum(-1).long()
    counts = torch.bincount(code, minlength=81) / 20_000
    z = (counts - expected) / (expected * (1 - expected) / 20_000).sqrt().clamp_min(1e-6)
    assert z.abs().max() < 4.5


def test_narrow_scales_and_far_locations_stay_finite():
    logits, loc = torch.zeros(1, 1), torch.full((1, 1, 1), 30.0)
    distribution = DiscretizedLogisticMixture(logits, loc, torch.full((1, 1, 1), 1e-3))
    assert torch.isfinite(distribution.log_prob(torch.tensor([[0.0], [128.0], [255.0]]))).all()


# --- the pair ------------------------------------------------------------------------------------


def colour_pair(likelihood: str):
    torch.manual_seed(0)
    options = {"channels": (4, 6), "hidden": 8}
    model = Conv(3 * 6 * 5, (3, 6, 5), z_dim=3, likelihood=likelihood, num_levels=16, **options)
    return model, ConvGuide(90, model.latents, (3, 6, 5), **options)


@pytest.mark.parametrize("likelihood", ["discretized_logistic", "gaussian"])
def test_the_pair_trains_alike_by_every_engine(likelihood):
    x = colour_pair(likelihood)[0](size=32).detach()
    found = []
    for engine in ("eager", "staged"):
        model, guide = colour_pair(likelihood)
        run = pvae.fit(model, guide, x, epochs=2, batch_size=16, engine=engine, progress=False)
        assert run.engine.startswith(engine)
        found.append(run.history[-1]["bound"])
    assert math.isfinite(found[0])
    assert abs(found[0] - found[1]) < 1e-3 * abs(found[0])


@pytest.mark.parametrize("likelihood", ["bernoulli", "continuous_bernoulli"])
def test_other_likelihoods_score_their_own_draws(likelihood):
    model, guide = colour_pair(likelihood)
    assert torch.isfinite(pvae.draw(model, guide, model(size=3).detach(), 2).log_weights).all()


def test_particles_and_single_rows_agree():
    model, guide = colour_pair("discretized_logistic")
    x = model(size=4).detach()
    particles = pvae.draw(model, guide, x, 3)
    z = particles.values["z"]
    for k in range(3):
        alone = model.decode(z[k]).log_prob(x)
        assert torch.allclose(alone, particles.log_likelihood[k], rtol=1e-4, atol=1e-3)


def test_an_autoregressive_distribution_is_scored_and_drawn_by_its_conditionals():
    """A chain of bits: ``x_i`` copies ``x_(i-1)`` with probability 0.8."""

    def conditionals(x):
        before = torch.cat([torch.full_like(x[..., :1], 0.5), x[..., :-1]], -1)
        return torch.distributions.Independent(
            torch.distributions.Bernoulli(0.2 + 0.6 * before, validate_args=False), 1
        )

    chain = Autoregressive(
        conditionals, [[0], [1], [2]], (), support=torch.distributions.constraints.boolean,
        like=torch.zeros(1), validate_args=False,
    )  # fmt: skip
    x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))
    assert abs(float(chain.log_prob(x).exp().sum()) - 1) < 1e-6
    draws = chain.sample((10_000,))
    same = (draws[:, 1:] == draws[:, :-1]).float().mean()
    assert abs(float(same) - 0.8) < 4.5 * math.sqrt(0.16 / 20_000)
