"""The gated PixelCNN decoder: no pixel sees itself or a later one, and it draws what it scores."""

from __future__ import annotations

import itertools
import math

import pyro
import pytest
import torch
from torch import nn

import pvae
from pvae.convolutions import GatedPixelLayer
from pvae.guides.conv import Conv as ConvGuide
from pvae.models.pixel_cnn import PixelCNN


def model_of(shape, **options):
    torch.manual_seed(1)
    options = {"z_dim": 2, "width": 4, "channels": (3,)} | options
    return PixelCNN(math.prod(shape), shape, **options).double()


def influence(model: PixelCNN) -> torch.Tensor:
    """``(P, P)``: whether output pixel i moves with input pixel j."""
    image = model.shape
    x = torch.full((1, model.x_dim), 0.4, dtype=torch.float64, requires_grad=True)
    code = torch.randn(1, 4, image.height, image.width, dtype=torch.float64)
    down = left = image.to_images(x)
    for layer in model.layers:
        down, left = layer(down, left, code)
    outputs = model.output(left).sum(1).flatten()
    rows = []
    for value in outputs:
        (gradient,) = torch.autograd.grad(value, x, retain_graph=True)
        rows.append(image.to_images(gradient).abs().sum(1).flatten() > 0)
    return torch.stack(rows)


@pytest.mark.parametrize(("shape", "kernel"), [((4, 5), 3), ((4, 4), 5), ((3, 4, 3), 3),
                                               ((4, 3, 3), 3)])  # fmt: skip
def test_no_pixel_sees_itself_or_a_later_one_and_all_earlier_ones_are_seen(shape, kernel):
    seen = influence(model_of(shape, layers=6, kernel=kernel))
    earlier = torch.ones_like(seen).tril(-1)
    assert torch.equal(seen, earlier)  # no leak, and no blind spot


def test_an_unmasked_layer_is_caught():
    model = model_of((4, 4), layers=2)
    first = model.layers[0]
    wrong = GatedPixelLayer(1, 4, 5, first=False).double()
    wrong.forward = lambda down, left, code: (
        GatedPixelLayer.forward(wrong, down, left, code)[0],
        left.new_zeros(1, 4, 4, 4) + GatedPixelLayer.forward(wrong, down, left, code)[0],
    )
    model.layers = nn.ModuleList([wrong, model.layers[1]])
    assert first.first
    assert bool(influence(model).diagonal().any())


@pytest.mark.parametrize("likelihood", ["bernoulli", "discretized_logistic"])
def test_probabilities_given_z_sum_to_one(likelihood):
    levels = 2 if likelihood == "bernoulli" else 3
    model = model_of((2, 3), likelihood=likelihood, num_levels=levels)
    x = torch.tensor(list(itertools.product(range(levels), repeat=6))).double()
    z = torch.randn(2, dtype=torch.float64)
    total = model.decode(z).log_prob(x).detach().exp().sum()
    assert abs(float(total) - 1) < 1e-10


@pytest.mark.parametrize("shape", [(2, 2), (1, 2, 2), (1, 2, 3)])
def test_draws_follow_the_probabilities(shape):
    model = model_of(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    bits = math.prod(shape)
    z = torch.tensor([1.0, -0.5], dtype=torch.float64)
    x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=bits))).double()
    expected = model.decode(z).log_prob(x).exp().detach()
    draws = model.decode(z).sample((8_000,))
    code = (draws * 2.0 ** torch.arange(bits - 1, -1, -1)).sum(-1).long()
    counts = torch.bincount(code, minlength=2**bits) / 8_000
    error = (expected * (1 - expected) / 8_000).sqrt().clamp_min(1e-4)
    assert ((counts - expected) / error).abs().max() < 4.5
    uniform = torch.full_like(expected, 2.0**-bits)  # the same check refuses another distribution
    assert ((counts - uniform) / error).abs().max() > 4.5


def test_uncondition_draws_pixel_by_pixel_rather_than_around_the_data():
    """Handlers that draw x instead of scoring it must not see the data they replace."""
    model = model_of((2, 3))
    drawn = []
    for x in (torch.zeros(5, 6).double(), torch.ones(5, 6).double()):
        torch.manual_seed(3)
        drawn.append(pyro.poutine.uncondition(model)(x))
    assert torch.equal(*drawn)


def test_the_code_reaches_every_pixel():
    model = model_of((4, 4))
    z = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)
    model.decode(z).log_prob(torch.ones(1, 16).double()).sum().backward()
    assert (z.grad != 0).all()


def test_it_learns_a_dependence_that_independent_pixels_cannot_hold():
    """Stripes: all pixels of an image are equal, so log p(x) is at best -log 2."""
    x = torch.bernoulli(torch.full((256, 1), 0.5)).expand(-1, 9).contiguous()
    bounds = {}
    for engine, epochs in (("eager", 2), ("staged", 2), ("staged", 40)):
        torch.manual_seed(0)
        model = PixelCNN(9, (3, 3), z_dim=1, width=12, layers=2, kernel=3, channels=(3,))
        guide = ConvGuide(9, model.latents, (3, 3), channels=(3,), hidden=0)
        run = pvae.fit(
            model, guide, x, epochs=epochs, batch_size=64, lr=1e-2, engine=engine, progress=False
        )
        bounds[engine, epochs] = run.history[-1]["bound"]
    assert abs(bounds["eager", 2] - bounds["staged", 2]) < 1e-3
    assert -1.0 < bounds["staged", 40] < -0.6
    assert pvae.draw(model, guide, x[:8], 5).log_weights.shape == (5, 8)
