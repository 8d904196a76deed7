"""The faithful inverse of a directed graph: which latents each latent's posterior depends on.

Given the parents of every variable of a generative model, the inverse is a factorisation of the
posterior, ``q(z | x) = prod_i q(z_i | inverse parents of z_i)``, that asserts no independence which
the model does not imply. Webb et al. (2018), Faithful inversion of generative models for effective
amortized inference: the graph is moralised and its latents are eliminated one by one, that first
which adds the fewest edges; its neighbours at that moment are its inverse parents.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import combinations

__all__ = ["fill_in", "inverse", "moral_graph"]

Graph = dict[str, set[str]]


def moral_graph(parents: Mapping[str, Collection[str]]) -> Graph:
    """Undirected neighbours: an edge for each arrow, and one between each two parents of a child.

    Args:
        parents: Variable -> its parents, for every variable.

    Raises:
        KeyError: a parent is no variable.
    """
    graph: Graph = {name: set() for name in parents}
    for child, above in parents.items():
        for one, other in combinations([*above, child], 2):
            _join(graph, one, other)
    return graph


def _join(graph: Graph, one: str, other: str) -> None:
    if one != other:
        graph[one].add(other)
        graph[other].add(one)


def fill_in(
    graph: Graph, name: str, observed: Collection[str] = frozenset()
) -> list[tuple[str, str]]:
    """The edges that eliminating a variable would add between its neighbours but those observed."""
    around = sorted(other for other in graph[name] if other not in observed)
    return [(a, b) for a, b in combinations(around, 2) if b not in graph[a]]


def inverse(
    parents: Mapping[str, Collection[str]],
    observed: Iterable[str] = (),
    level: Mapping[str, int] | None = None,
) -> dict[str, tuple[str, ...]]:
    """Inverse parents of each latent, in an order in which the posterior can be sampled.

    Only edges between latents count as added: an encoder gives what is observed to all of them
    alike. Ties are broken against the order of ``parents``: what the model draws last is eliminated
    first, so that the posterior draws a chain in the model's own direction.

    Args:
        parents: Variable -> its parents in the model, in the model's order.
        observed: Variables that are given. They are never eliminated; those that a latent's
            posterior depends on come last among its inverse parents.
        level: Latent -> its level; those of a lower level are drawn before those of a higher one
            (eliminated after them). All are of one level by default.

    Returns:
        Latent -> latents before it in the order, then observed variables, that it depends on.
    """
    graph = moral_graph(parents)
    given = set(observed)
    position = {name: index for index, name in enumerate(parents)}
    levels = dict.fromkeys(parents, 0) | dict(level or {})
    waiting = [name for name in parents if name not in given]
    eliminated: list[tuple[str, set[str]]] = []
    while waiting:
        highest = max(levels[n] for n in waiting)
        candidates = [n for n in waiting if levels[n] == highest]
        name = min(candidates, key=lambda n: (len(fill_in(graph, n, given)), -position[n]))
        around = graph.pop(name)
        for other in around:
            graph[other].discard(name)
        for other in around - given:
            graph[other] |= around - {other}
        waiting.remove(name)
        eliminated.append((name, around))
    eliminated.reverse()
    order = {name: index for index, (name, _) in enumerate(eliminated)}
    return {
        name: (
            *sorted(around - given, key=order.__getitem__),
            *sorted(around & given, key=position.__getitem__),
        )
        for name, around in eliminated
    }
