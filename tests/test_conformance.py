"""Every model in models/ with every guide in guides/ that fits: a new file is tested at once."""

from __future__ import annotations

import copy
import importlib
import inspect
from pathlib import Path

import pyro
import pytest
import torch
from torch import nn

import pvae

ROOT = Path(__file__).parents[1]
X_DIM, SIZE, K = 6, 5, 3
SHAPE = (2, 3)


def classes(folder: str) -> dict[str, type[nn.Module]]:
    found = {}
    for path in sorted((ROOT / folder).glob("[!_]*.py")):
        module = importlib.import_module(f"pvae.{folder}.{path.stem}")
        for name in module.__all__:
            found[f"{path.stem}.{name}"] = getattr(module, name)
    return found


MODELS, GUIDES = classes("models"), classes("guides")


def build_model(name: str) -> nn.Module:
    torch.manual_seed(3)
    takes = inspect.signature(MODELS[name]).parameters
    return MODELS[name](X_DIM, **{key: SHAPE for key in takes if key == "image_shape"})


def build_guide(name: str, model: nn.Module) -> nn.Module:
    torch.manual_seed(4)
    takes = inspect.signature(GUIDES[name]).parameters
    known = {"x_dim": X_DIM, "latents": model.latents, "model": model, "image_shape": SHAPE}
    return GUIDES[name](**{key: value for key, value in known.items() if key in takes})


def pair(model_name: str, guide_name: str):
    model = build_model(model_name)
    try:
        guide = build_guide(guide_name, model)
        x = generate(model)
        pvae.draw(model, guide, x)
    except pvae.PvaeError as error:
        pytest.skip(f"does not fit: {error}")
    return model, guide, x


def generate(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(5)
    with torch.no_grad():
        return model(size=SIZE)


def test_the_folders_are_found():
    assert {"vae.VAE", "factor_analysis.FactorAnalysis"} <= set(MODELS)
    assert {"gaussian.Gaussian", "exact.Exact"} <= set(GUIDES)


@pytest.mark.parametrize("name", MODELS)
def test_model_generates_and_describes_itself(name):
    model = build_model(name)
    x = generate(model)
    assert x.shape == (SIZE, X_DIM)
    assert torch.equal(x, generate(model))
    assert repr(model).startswith(type(model).__name__)
    assert inspect.getdoc(type(model))
    trace = pyro.poutine.trace(model).get_trace(size=SIZE)
    sites = {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and n in model.latents}
    for site, shape in model.latents.items():
        assert tuple(sites[site]["value"].shape) == (SIZE, *shape)


@pytest.mark.parametrize("guide_name", GUIDES)
@pytest.mark.parametrize("model_name", MODELS)
class TestPairs:
    def test_weights_values_and_seeds(self, model_name, guide_name):
        model, guide, x = pair(model_name, guide_name)
        torch.manual_seed(0)
        first = pvae.draw(model, guide, x, K)
        torch.manual_seed(0)
        second = pvae.draw(model, guide, x, K)
        assert first.log_weights.shape == (K, SIZE)
        assert torch.isfinite(first.log_weights).all()
        assert torch.equal(first.log_weights, second.log_weights)
        assert set(first.values) == set(model.latents)

    def test_gradient_reaches_every_parameter(self, model_name, guide_name):
        model, guide, x = pair(model_name, guide_name)
        pvae.draw(model, guide, x, K).log_weights.logsumexp(0).sum().backward()
        modules = {"model": model, "guide": guide}
        for role, module in modules.items():
            for name, parameter in module.named_parameters():
                assert parameter.grad is not None, f"{role}.{name}"
                assert torch.isfinite(parameter.grad).all(), f"{role}.{name}"

    def test_state_dict_round_trip_and_deep_copy(self, model_name, guide_name):
        model, guide, x = pair(model_name, guide_name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        fresh_model = build_model(model_name)
        fresh_model.load_state_dict(model.state_dict())
        fresh_guide = build_guide(guide_name, fresh_model)
        fresh_guide.load_state_dict(guide.state_dict())
        for other_model, other_guide in [
            (fresh_model, fresh_guide),
            copy.deepcopy((model, guide)),
        ]:
            torch.manual_seed(1)
            expected = pvae.draw(model, guide, x, K).log_weights
            torch.manual_seed(1)
            assert torch.equal(pvae.draw(other_model, other_guide, x, K).log_weights, expected)

    def test_two_steps_of_training(self, model_name, guide_name):
        model, guide, x = pair(model_name, guide_name)
        discrete = any(len(shape) == 0 for shape in model.latents.values())
        gradient = pvae.gradients.mixed if discrete else pvae.gradients.pathwise
        before = [p.detach().clone() for p in model.parameters()]
        run = pvae.fit(
            model,
            guide,
            x,
            objective=pvae.Objective(gradient=gradient, num_particles=2),
            epochs=2,
            batch_size=4,
            progress=False,
        )
        assert len(run.history) == 2
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", [n for n in MODELS if hasattr(MODELS[n], "log_evidence")])
def test_exact_posterior_gives_the_evidence_at_every_particle(name):
    model = build_model(name).double()
    x = generate(model)
    guide = pvae.guides.exact.Exact(model)
    log_weights = pvae.draw(model, guide, x, 50).log_weights
    assert (log_weights - model.log_evidence(x)).abs().max() < 1e-10
