"""Faithful inverses of small graphs, checked against independences of Gaussians by brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from pvae.inversion import fill_in, inverse, moral_graph


def test_moral_graph_marries_parents():
    graph = moral_graph({"a": (), "b": (), "c": ("a", "b"), "d": ("c",)})
    assert graph == {"a": {"b", "c"}, "b": {"a", "c"}, "c": {"a", "b", "d"}, "d": {"c"}}


def test_fill_in_counts_the_edges_that_elimination_adds():
    graph = moral_graph({"a": (), "b": ("a",), "c": ("a",)})
    assert fill_in(graph, "a") == [("b", "c")]
    assert fill_in(graph, "b") == []


def test_chain_keeps_its_direction():
    found = inverse({"z2": (), "z1": ("z2",), "x": ("z1",)}, {"x"})
    assert list(found.items()) == [("z2", ("x",)), ("z1", ("z2", "x"))]


def test_collider_couples_what_the_prior_does_not():
    found = inverse({"a": (), "b": (), "x": ("a", "b")}, {"x"})
    assert found == {"a": ("x",), "b": ("a", "x")}


def test_fork_keeps_its_branches_apart():
    """Given the root, each branch depends on its own observation alone."""
    parents = {"r": (), "a": ("r",), "b": ("r",), "x": ("a",), "y": ("b",)}
    found = inverse(parents, {"x", "y"})
    assert found["a"] == ("r", "x")
    assert found["b"] == ("r", "y")
    assert set(found["r"]) == {"x", "y"}


def test_state_space_model_is_drawn_forward_in_time():
    parents, steps = {}, 6
    for t in range(steps):
        parents[f"z{t}"] = (f"z{t - 1}",) if t else ()
        parents[f"x{t}"] = (f"z{t}",)
    found = inverse(parents, {f"x{t}" for t in range(steps)})
    assert list(found) == [f"z{t}" for t in range(steps)]
    for t in range(steps):
        assert [n for n in found[f"z{t}"] if n[0] == "z"] == ([f"z{t - 1}"] if t else [])
        assert {n for n in found[f"z{t}"] if n[0] == "x"} == {f"x{s}" for s in range(t, steps)}


def test_levels_are_drawn_in_their_order():
    parents = {"z": (), "w": (), "x": ("z", "w")}
    assert list(inverse(parents, {"x"}, {"z": 1, "w": 0})) == ["w", "z"]
    assert list(inverse(parents, {"x"}, {"z": 0, "w": 1})) == ["z", "w"]


def test_observed_variables_have_no_inverse():
    assert inverse({"x": ()}, {"x"}) == {}


def random_graph(size: int, seed: int) -> dict[str, tuple[str, ...]]:
    generator = torch.Generator().manual_seed(seed)
    names = [f"v{i}" for i in range(size)]
    edge = torch.rand(size, size, generator=generator) < 0.4
    return {n: tuple(names[j] for j in range(i) if edge[i, j]) for i, n in enumerate(names)}


def covariance(parents: dict[str, tuple[str, ...]], seed: int) -> torch.Tensor:
    """Of a linear-Gaussian model on the graph, with generic weights and unit noises."""
    names = list(parents)
    generator = torch.Generator().manual_seed(100 + seed)
    weights = torch.zeros(len(names), len(names), dtype=torch.float64)
    for child, above in parents.items():
        for one in above:
            size = 0.5 + torch.rand((), generator=generator, dtype=torch.float64)
            weights[names.index(child), names.index(one)] = size
    eye = torch.eye(len(names), dtype=torch.float64)
    inner = torch.linalg.inv(eye - weights)
    return inner @ inner.T


def conditional_weights(sigma: torch.Tensor, target: int, given: list[int]) -> torch.Tensor:
    return torch.linalg.solve(sigma[given][:, given], sigma[given, target])


@pytest.mark.parametrize("seed", range(12))
def test_inverse_is_faithful_on_random_graphs(seed):
    """``p(z_i | all before it, x)`` has no weight outside the inverse parents, exactly."""
    parents = random_graph(7, seed)
    names, observed = list(parents), {"v5", "v6"}
    sigma = covariance(parents, seed)
    before: list[str] = []
    for name, above in inverse(parents, observed).items():
        given = [*before, *sorted(observed)]
        weights = conditional_weights(sigma, names.index(name), [names.index(n) for n in given])
        assert set(above) <= set(given)
        for other, weight in zip(given, weights, strict=True):
            assert other in above or abs(weight) < 1e-10, (name, other)
        before.append(name)


def test_a_missing_edge_would_be_noticed():
    """The check above fails for the model's own factorisation: it forgets the collider."""
    failures = 0
    for seed in range(12):
        parents = random_graph(7, seed)
        names, observed = list(parents), ["v5", "v6"]
        sigma = covariance(parents, seed)
        for index, name in enumerate(names[:5]):
            given = [*names[:index], *observed]
            weights = conditional_weights(sigma, index, [names.index(n) for n in given])
            pairs = zip(given, weights, strict=True)
            failures += any(abs(w) > 1e-6 for n, w in pairs if n not in (*parents[name], *observed))
    assert failures > 10


def test_order_of_elimination_is_that_of_least_fill():
    """A hub of four leaves is eliminated last: no edge is added, whatever the order of names."""
    for order in itertools.islice(itertools.permutations("abcd"), 6):
        parents = {"hub": (), **{name: ("hub",) for name in order}}
        parents |= {f"x{name}": (name,) for name in order}
        found = inverse(parents, {f"x{name}" for name in order})
        assert next(iter(found)) == "hub"
        assert all(found[name] == ("hub", f"x{name}") for name in order)
