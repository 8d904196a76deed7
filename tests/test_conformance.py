"""Every model in models/ with every guide in guides/ and every objective: a new file is tested.

Nothing is registered. A model is built by name from what its constructor takes; a batch of it is
``model.example_batch(size)`` where it says so (labels partly unknown, cells missing), else what
``model(size=size)`` returns. Pairs and objectives that do not fit must refuse with a PvaeError, and
are skipped with its words.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from torch import nn

import pvae
from pvae import catalogue
from pvae.data import num_rows
from pvae.particles import parameters

ROOT = Path(__file__).parents[1]
X_DIM, SIZE, K = 6, 5, 3
SMALL = {"hidden": (8,), "z_dim": 2, "num_components": 3, "num_classes": 3, "num_topics": 3,
         "image_shape": (2, 3), "widths": (3, 2), "z_dims": (3, 2), "prior_components": 3,
         "skip_padding": False}  # fmt: skip
# Options under which a model is another program, walked like a model of its own.
VARIANTS: dict[str, dict[str, Any]] = {
    "conditional.Conditional variant": {"prior": "conditional", "y_dim": 2},
    "count.Count variant": {"likelihood": "zero_inflated_negative_binomial"},
    "gmm_vae.GMMVAE variant": {"marginal": True},
    "latent_dirichlet.LatentDirichlet variant": {"prior": "dirichlet", "decoder": "mixture"},
    "tabular.Tabular variant": {
        "columns": ("count", "real", "categorical:3", "positive", "binary", "categorical:2"),
        "robust": True,
    },
    "vae.VAE sphere": {"prior": "hyperspherical", "z_dim": 3},
    "vae.VAE vamp": {"prior": "vamp"},
    "vq_vae.VQVAE variant": {"prior": "autoregressive", "prior_hidden": (8,)},
}


def classes(folder: str) -> dict[str, type[nn.Module]]:
    found = {}
    for path in sorted((ROOT / folder).glob("[!_]*.py")):
        module = importlib.import_module(f"pvae.{folder}.{path.stem}")
        for name in module.__all__:
            if inspect.isclass(getattr(module, name)):
                found[f"{path.stem}.{name}"] = getattr(module, name)
    return found


MODELS, GUIDES = classes("models"), classes("guides")
WALKED = [*MODELS, *VARIANTS]
OBJECTIVES = [*catalogue.objectives(), "mixed"]
COMPILED = ("vae.VAE", "gaussian.Gaussian")


def objective(name: str) -> pvae.Objective:
    if name == "mixed":
        return pvae.Objective(gradient=pvae.gradients.mixed, num_particles=2)
    recipe = catalogue.objectives()[name]
    try:
        return recipe(num_particles=2)
    except pvae.PvaeError:  # it groups its particles
        return recipe()


def construct(kind: type[nn.Module], known: dict[str, Any]) -> nn.Module:
    """By name, as the command line fills a constructor from what is known of the data."""
    takes = inspect.signature(kind).parameters
    return kind(**{k: _like(v, takes[k].default) for k, v in known.items() if k in takes})


def _like(value: Any, default: Any) -> Any:
    """One width where a constructor takes one, a list of widths where it takes several."""
    return value[0] if isinstance(value, tuple) and isinstance(default, int) else value


def build_model(name: str) -> nn.Module:
    torch.manual_seed(3)
    plain = name.partition(" ")[0]
    return construct(MODELS[plain], {"x_dim": X_DIM, **SMALL, **VARIANTS.get(name, {})})


def example(model: nn.Module, size: int = SIZE) -> Any:
    torch.manual_seed(5)
    with torch.no_grad():
        return model.example_batch(size) if hasattr(model, "example_batch") else model(size=size)


def build_guide(name: str, model: nn.Module, batch: Any) -> nn.Module:
    torch.manual_seed(4)
    known = {
        "x_dim": X_DIM, "latents": model.latents, "model": model, "image_shape": (2, 3),
        "example_batch": batch,
        "x_mean": torch.zeros(X_DIM), "x_scale": torch.ones(X_DIM), "hidden": (8,),
    }  # fmt: skip
    return construct(GUIDES[name], known)


@functools.cache
def _built(model_name: str, guide_name: str) -> Any:
    """The pair and a batch, or the words in which it was refused."""
    model = build_model(model_name)
    batch = example(model)
    try:
        guide = build_guide(guide_name, model, batch)
        pvae.draw(model, guide, batch)
    except pvae.PvaeError as error:
        return str(error)
    return model, guide, batch


def pair(model_name: str, guide_name: str) -> Any:
    """A fresh copy of a pair, and its batch."""
    built = _built(model_name, guide_name)
    if isinstance(built, str):
        pytest.skip(f"does not fit: {built}")
    model, guide, batch = built
    return *copy.deepcopy((model, guide)), batch


def fits(model_name: str, guide_name: str) -> bool:
    return not isinstance(_built(model_name, guide_name), str)


def moves(
    name: str, goal: Any, layout: Any, model: nn.Module, guide: nn.Module, batch: Any
) -> None:
    """One evaluation and its gradient: finite, and some of it reaches the model."""
    loss = goal.evaluate(model, guide, batch, layout=layout)
    assert loss.bound.shape == (SIZE,), name
    assert torch.isfinite(loss.loss), name
    weights = parameters(model, guide, batch)
    found = torch.autograd.grad(loss.loss, list(weights.values()), allow_unused=True)
    moved = {key: g for key, g in zip(weights, found, strict=True) if g is not None}
    assert all(torch.isfinite(gradient).all() for gradient in moved.values()), name
    assert any(key.startswith("model.") and bool(g.any()) for key, g in moved.items()), name


def assert_same(a: Any, b: Any) -> None:
    for one, other in zip(*(b if isinstance(b, tuple) else (b,) for b in (a, b)), strict=True):
        assert torch.equal(one.nan_to_num(-7.0), other.nan_to_num(-7.0))


def test_the_folders_are_found():
    assert {"vae.VAE", "tabular.Tabular", "semi_supervised.SemiSupervised"} <= set(MODELS)
    assert {"gaussian.Gaussian", "exact.Exact", "masked.Masked"} <= set(GUIDES)
    assert {"vae", "iwae", "rws"} <= set(OBJECTIVES)
    assert {name.partition(" ")[0] for name in VARIANTS} <= set(MODELS)


@pytest.mark.parametrize("name", WALKED)
def test_some_guide_fits_every_model(name):
    assert any(fits(name, guide_name) for guide_name in GUIDES)


@pytest.mark.parametrize("name", GUIDES)
def test_every_guide_fits_some_model(name):
    assert any(fits(model_name, name) for model_name in WALKED)


@pytest.mark.parametrize("name", WALKED)
def test_model_generates_and_describes_itself(name):
    model = build_model(name)
    batch = example(model)
    x = batch[0] if isinstance(batch, tuple) else batch
    assert x.shape == (SIZE, X_DIM)
    assert num_rows(batch) == SIZE
    assert_same(batch, example(model))
    assert repr(model).startswith(type(model).__name__)
    assert inspect.getdoc(type(model))
    trace = pyro.poutine.trace(model).get_trace(size=SIZE)
    drawn = trace.nodes["_RETURN"]["value"]
    assert type(drawn) is type(batch)
    sites = {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and n in model.latents}
    for site, shape in model.latents.items():
        assert tuple(sites[site]["value"].shape) == (SIZE, *shape)


@pytest.mark.parametrize("guide_name", GUIDES)
@pytest.mark.parametrize("model_name", WALKED)
class TestPairs:
    def test_weights_values_and_seeds(self, model_name, guide_name):
        model, guide, batch = pair(model_name, guide_name)
        torch.manual_seed(0)
        first = pvae.draw(model, guide, batch, K)
        torch.manual_seed(0)
        second = pvae.draw(model, guide, batch, K)
        assert first.log_weights.shape == (K, SIZE)
        assert torch.isfinite(first.log_weights).all()
        assert torch.equal(first.log_weights, second.log_weights)
        assert set(model.latents) <= set(first.values)

    def test_gradient_reaches_every_parameter(self, model_name, guide_name):
        model, guide, batch = pair(model_name, guide_name)
        pvae.draw(model, guide, batch, K).log_weights.logsumexp(0).sum().backward()
        for role, module in {"model": model, "guide": guide}.items():
            for name, parameter in module.named_parameters():
                assert parameter.grad is not None, f"{role}.{name}"
                assert torch.isfinite(parameter.grad).all(), f"{role}.{name}"

    def test_state_dict_round_trip_and_deep_copy(self, model_name, guide_name):
        model, guide, batch = pair(model_name, guide_name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        fresh_model = build_model(model_name)
        fresh_model.load_state_dict(model.state_dict())
        fresh_guide = build_guide(guide_name, fresh_model, batch)
        fresh_guide.load_state_dict(guide.state_dict())
        for other in [(fresh_model, fresh_guide), copy.deepcopy((model, guide))]:
            torch.manual_seed(1)
            expected = pvae.draw(model, guide, batch, K).log_weights
            torch.manual_seed(1)
            assert torch.equal(pvae.draw(*other, batch, K).log_weights, expected)

    def test_every_objective_that_takes_the_pair_moves_the_model(self, model_name, guide_name):
        model, guide, batch = pair(model_name, guide_name)
        taken = 0
        for name in OBJECTIVES:
            goal = objective(name)
            try:
                layout = goal.prepare(model, guide, batch)
            except pvae.PvaeError:
                continue
            moves(name, goal, layout, model, guide, batch)
            taken += 1
        assert taken >= 2


def representatives() -> list[tuple[str, str]]:
    """Pairs in which every model and every guide occurs, few of them."""
    fitting = [(m, g) for m in WALKED for g in GUIDES if fits(m, g)]
    chosen, missing = [], {*WALKED, *GUIDES}
    while fitting and missing:
        best = max(fitting, key=lambda names: len(missing & set(names)))
        if not missing & set(best):
            break
        chosen.append(best)
        missing -= set(best)
    return chosen


def trained(model_name: str, guide_name: str, engine: str) -> Any:
    model, guide, batch = pair(model_name, guide_name)
    for name in ("vae", "mixed"):
        try:
            objective(name).prepare(model, guide, batch)
        except pvae.PvaeError:
            continue
        return pvae.fit(
            model, guide, batch, objective=objective(name), epochs=2, batch_size=3, engine=engine,
            progress=False,
        )  # fmt: skip
    pytest.skip("neither the pathwise nor the mixed gradient takes this pair")


def test_staged_steps_are_eager_steps():
    """The same noise, so the same parameters, for every model and every guide once."""
    for names in representatives():
        eager, staged = (trained(*names, engine) for engine in ("eager", "staged"))
        assert staged.engine.startswith("staged"), f"{names}: {staged.engine}"
        for role in ("model", "guide"):
            expected = getattr(eager, role).state_dict()
            for key, value in getattr(staged, role).state_dict().items():
                torch.testing.assert_close(
                    value, expected[key], rtol=1e-3, atol=1e-4, msg=f"{names}: {role}.{key}"
                )


def test_compiled_steps_are_eager_steps():
    eager, compiled = (trained(*COMPILED, engine) for engine in ("eager", "compiled"))
    assert compiled.engine.startswith("compiled")
    assert compiled.history[-1]["bound"] == pytest.approx(eager.history[-1]["bound"], rel=1e-3)


def test_walk_catches_a_parameter_that_nothing_reaches():
    """The check of gradients fails for a model with a weight that its density does not use."""
    model = build_model("factor_analysis.FactorAnalysis")
    model.unused = nn.Parameter(torch.zeros(1))
    batch = example(model)
    guide = build_guide("gaussian.Gaussian", model, batch)
    pvae.draw(model, guide, batch, K).log_weights.logsumexp(0).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == ["unused"]


@pytest.mark.parametrize("name", [n for n in MODELS if hasattr(MODELS[n], "log_evidence")])
def test_exact_posterior_gives_the_evidence_at_every_particle(name):
    model = build_model(name).double()
    batch = example(model)
    if not hasattr(model, "posterior"):
        pytest.skip("its evidence is known, its posterior is not")
    guide = pvae.guides.exact.Exact(model)
    log_weights = pvae.draw(model, guide, batch, 50).log_weights
    assert (log_weights - model.log_evidence(batch)).abs().max() < 1e-10
