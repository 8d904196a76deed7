"""Normalising flows: their density against the Jacobian, their integral, and what a draw costs."""

from __future__ import annotations

import pytest
import torch

import pvae
from pvae.errors import OptionError
from pvae.flows import FLOWS, ConditionalFlow, _Steps
from pvae.guides.flow import Flow
from pvae.models.vae import VAE


def wild(kind: str, shape=(3,), context_dim: int = 2, *, spread: float = 0.4) -> ConditionalFlow:
    """A flow in float64 that is far from the identity."""
    torch.manual_seed(1)
    flow = ConditionalFlow(shape, context_dim, kind=kind, hidden=(8,)).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return flow


def error_against_jacobian(flow: ConditionalFlow) -> float:
    """``log q`` against the change of variables with the Jacobian by differentiation."""
    context = torch.randn(2, dtype=torch.float64)
    posterior = flow(context)
    noise = torch.randn(3, dtype=torch.float64)

    def value(noise):
        for transform in posterior.transforms:
            noise = transform(noise)
        return noise

    jacobian = torch.autograd.functional.jacobian(value, noise)
    expected = posterior.base_dist.log_prob(noise) - jacobian.slogdet()[1]
    return float((posterior.log_prob(value(noise).clone()) - expected).abs().detach())


@pytest.mark.parametrize("kind", FLOWS)
def test_density_is_the_change_of_variables(kind, monkeypatch):
    flow = wild(kind)
    assert error_against_jacobian(flow) < 1e-9
    monkeypatch.setattr(_Steps, "log_abs_det_jacobian", lambda self, x, y: x.new_zeros(()))
    assert error_against_jacobian(flow) > 1e-3


@pytest.mark.parametrize("kind", FLOWS)
def test_density_integrates_to_one(kind):
    side = torch.linspace(-12, 12, 241, dtype=torch.float64)
    posterior = wild(kind, (2,), 0, spread=0.2)()
    with torch.no_grad():
        mass = posterior.log_prob(torch.cartesian_prod(side, side)).exp().sum() * 0.01
    assert abs(float(mass) - 1) < 1e-3


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("kind", FLOWS)
def test_any_event_shape_draws_what_it_weighs(kind, context_dim, shape):
    flow = wild(kind, shape, context_dim)
    context = torch.randn(5, 2, dtype=torch.float64) if context_dim else None
    batch = (5,) if context_dim else ()
    posterior = flow(context).expand((4, *batch))
    z = posterior.rsample()
    assert z.shape == (4, *batch, *shape)
    own, fresh = posterior.log_prob(z), flow(context).log_prob(z.clone())
    assert own.shape == (4, *batch)
    assert (own - fresh).abs().max() < 1e-8


@pytest.mark.parametrize("kind", FLOWS)
def test_the_density_of_a_draw_costs_no_inverse(kind):
    flow, calls = wild(kind), []
    for step in flow.steps:
        step.hyper.register_forward_hook(lambda *_: calls.append(1))
    posterior = flow(torch.randn(5, 2, dtype=torch.float64))
    z = posterior.rsample((10,))
    drawing = len(calls)
    posterior.log_prob(z)
    one_pass = len(flow.steps)
    if kind == "maf":  # drawn dimension by dimension, then one pass for the Jacobian
        assert (drawing, len(calls)) == (3 * one_pass, 4 * one_pass)
    else:
        assert drawing == len(calls) == one_pass


def test_gradient_of_a_draw_by_differences():
    for kind in FLOWS:
        flow = wild(kind, (2,))
        context = torch.randn(2, dtype=torch.float64)

        def loss(flow=flow, context=context):
            torch.manual_seed(3)
            z = flow(context).rsample((20,))
            return (z.square() + flow(context).log_prob(z.clone())[:, None]).sum()

        parameter = next(flow.steps.parameters())
        (gradient,) = torch.autograd.grad(loss(), parameter)
        step = torch.zeros_like(parameter).view(-1)
        step[0] = 1e-6
        with torch.no_grad():
            parameter.add_(step.view_as(parameter))
            above = loss()
            parameter.sub_(2 * step.view_as(parameter))
            below = loss()
        assert float(gradient.view(-1)[0]) == pytest.approx(float(above - below) / 2e-6, rel=1e-4)


@pytest.mark.parametrize("kind", FLOWS)
def test_staged_engine_takes_the_same_steps(kind):
    x = (torch.rand(40, 6, generator=torch.Generator().manual_seed(3)) < 0.4).float()

    def train(engine):
        torch.manual_seed(0)
        model = VAE(6, z_dim=3, hidden=(8,))
        guide = Flow(6, model.latents, kind=kind, hidden=(8,), transform_hidden=(8,))
        run = pvae.fit(model, guide, x, objective=pvae.iwae(3), epochs=3, batch_size=20,
                       engine=engine, progress=False)  # fmt: skip
        assert run.engine.startswith(engine)
        return [row["bound"] for row in run.history]

    assert train("staged") == pytest.approx(train("eager"), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "mafia"}, "no flow is called 'mafia': did you mean 'maf'?"),
        ({"transforms": 0}, "transforms must be at least 1, got 0"),
        ({"activation": "tan"}, "no activation is called 'tan': did you mean 'tanh'?"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(OptionError, match=message.replace("?", r"\?")):
        Flow(6, {"z": (2,)}, **options)
    with pytest.raises(OptionError, match="at least one latent site"):
        Flow(6, {})
