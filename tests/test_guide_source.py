"""The source of a derived guide: it runs alone, and is the same guide."""

from __future__ import annotations

import ast

import pyro
import pytest
import torch
from derived_programs import SemiSupervised, zoo

import pvae
from pvae.guide_source import Call, _constraint
from pvae.guides.derived import Auto

FAMILIES = {"two_layer": "flow", "positive_parts": "full", "state_space": "low_rank"}


def executed(guide: Auto) -> torch.nn.Module:
    """The guide of the source, with the weights of the derived one."""
    names: dict[str, object] = {}
    exec(compile(guide.source(), "guide.py", "exec"), names)
    other = names["Guide"]()
    other.load_state_dict(guide.state_dict())
    return other


def weights(model, guide, batch):
    pyro.set_rng_seed(3)
    particles = pvae.draw(model, guide, batch, 3)
    return [particles.log_weights, *particles.log_q.values(), *particles.global_log_q.values()]


@pytest.mark.parametrize("name", zoo())
def test_source_is_the_same_density(name):
    pyro.set_rng_seed(0)
    model, batch = zoo()[name]()
    guide = pvae.guides.auto(model, batch, hidden=(8,), family=FAMILIES.get(name, "diagonal"))
    other = executed(guide)
    assert not isinstance(other, Auto)
    pairs = zip(weights(model, guide, batch), weights(model, other, batch), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


def test_source_stands_alone():
    model, batch = zoo()["gmm_vae"]()
    text = pvae.guides.auto(model, batch, hidden=(8,), family="flow").source()
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    tops = {name.split(".")[0] for name in imported}
    assert tops == {"__future__", "math", "collections", "typing", "pyro", "torch", "zuko"}
    assert "class FlowHead" in text
    assert "class FullHead" not in text
    assert "class SequenceEncoder" not in text


def test_source_takes_labels_or_draws_them():
    pyro.set_rng_seed(0)
    model, x, y = SemiSupervised(), torch.rand(6, 9).bernoulli(), torch.eye(3)[torch.arange(6) % 3]
    guide = pvae.guides.auto(model, (x,), also=[(x, y)], hidden=(8,))
    other = executed(guide)
    for batch in ((x,), (x, y)):
        pairs = zip(weights(model, guide, batch), weights(model, other, batch), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)


@pytest.mark.parametrize("total", [40, None])
def test_source_keeps_a_subsampled_plate(total):
    """Rows of a part of the data, or rows that the plate picks itself."""

    def given(x):
        with pyro.plate("data", 40, subsample=x, dim=-1):
            z = pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))
            pyro.sample("x", pyro.distributions.Normal(z, 1.0), obs=x)

    def picked(x):
        with pyro.plate("data", len(x), subsample_size=4, dim=-1) as rows:
            z = pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))
            pyro.sample("x", pyro.distributions.Normal(z, 1.0), obs=x[rows])

    model, x = (given, torch.randn(5)) if total else (picked, torch.randn(12))
    guide = pvae.guides.auto(model, x, hidden=(8,))
    pairs = zip(weights(model, guide, x), weights(model, executed(guide), x), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    assert pvae.draw(model, guide, x, 2).scale == (8.0 if total else 3.0)


def test_constraints_are_written_as_they_are_called():
    constraints = torch.distributions.constraints
    for value in (
        constraints.real,
        constraints.simplex,
        constraints.corr_cholesky,
        constraints.interval(-1.0, 2.0),
        constraints.greater_than(0.5),
        constraints.independent(constraints.unit_interval, 2),
        pyro.distributions.constraints.ordered_vector,
    ):
        scope = {"constraints": constraints, "dist": pyro.distributions}
        again = eval(_constraint(value), scope)
        assert repr(again) == repr(value)
    assert str(Call(dict, (), {"a": [1, 2]})) == "dict(a=(1, 2))"
