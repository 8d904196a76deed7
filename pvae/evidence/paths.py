r"""The two ends of a path of densities, and their gradients, on a flat unconstrained space.

Between ``f_0(u) = q(z | x) |dz/du|`` (guide, or prior) and ``f_1(u) = p(x, z) |dz/du|`` lies the
geometric path ``f_beta = f_0^(1 - beta) f_1^beta``. Whatever beta, all that a sampler needs at a
point is both log densities and both gradients, so these are what a :class:`Point` holds and what
the traced graph computes. What does not depend on the point (the encoder's pass over the data) is
computed once for a block of data.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pvae.particles import Layout, path_ends
from pvae.staging import StagingError, capture, lower

__all__ = ["Path", "Point", "hoist"]


class Point(NamedTuple):
    """Where each chain of each datum stands.

    Attributes:
        flat: ``(K, B, L)`` free real numbers u.
        log_f0: ``(K, B)`` log density of the path's start, normalised.
        log_f1: ``(K, B)`` log density of its end, whose integral is the evidence.
        grad0: ``(K, B, L)`` gradient of ``log_f0``.
        grad1: ``(K, B, L)`` gradient of ``log_f1``.
    """

    flat: Tensor
    log_f0: Tensor
    log_f1: Tensor
    grad0: Tensor
    grad1: Tensor

    def log_density(self, beta: Tensor) -> Tensor:
        """``log f_beta``, ``(K, B)``, for ``beta`` of shape ``(B,)``."""
        return torch.lerp(self.log_f0, self.log_f1, beta)

    def gradient(self, beta: Tensor) -> Tensor:
        """Gradient of ``log f_beta``, ``(K, B, L)``."""
        return torch.lerp(self.grad0, self.grad1, beta[:, None])

    @property
    def log_ratio(self) -> Tensor:
        """``log f_1 - log f_0 = log p(x, z) - log q(z | x)``, ``(K, B)``, float64."""
        return self.log_f1.double() - self.log_f0.double()


@dataclass
class Path:
    """The ends of a pair's path; traced once for each shape of chains and data.

    Attributes:
        model: The generative program.
        guide: The inference program; ``None`` for the prior.
        layout: What ``inspect`` found.
        staged: Trace into graphs; without it, or where tracing fails, the programs run as written.
        compiled: Compile the graphs, where there is a compiler.
    """

    model: Any
    guide: Any
    layout: Layout
    staged: bool = True
    compiled: bool = False
    _graphs: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def on(self, batch: Any) -> Callable[[Tensor], Point]:
        """``u -> Point`` for one block of data."""
        leaves = torch.utils._pytree.tree_leaves(batch)
        ready: dict[int, Any] = {}

        def evaluate(flat: Tensor) -> Point:
            flat = flat.contiguous()  # as the graph was traced: its views depend on it
            if len(flat) not in ready:
                ready[len(flat)] = self._ready(flat, batch, leaves)
            return Point(flat, *ready[len(flat)](flat))

        return evaluate

    def _ends(self, flat: Tensor, batch: Any) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            at = flat.detach().requires_grad_()
            ends = path_ends(self.model, self.guide, batch, at, self.layout)
            grads = [torch.autograd.grad(end.sum(), at, retain_graph=True)[0] for end in ends]
        return *(end.detach() for end in ends), *grads

    def _ready(self, flat: Tensor, batch: Any, leaves: list[Any]) -> Callable[..., Any]:
        """The graph with the block's own part done, or the programs as written."""
        as_written = functools.partial(self._ends, batch=batch)
        if not self.staged:
            return as_written
        key = tuple(flat.shape), *(getattr(leaf, "shape", leaf) for leaf in leaves)
        try:
            if key not in self._graphs:
                held, moving = hoist(capture(lambda u, x: self._ends(u, x), flat, batch))
                if self.compiled:
                    moving = self._lowered(moving, [flat, *held(*leaves)])
                self._graphs[key] = held, moving
            held, moving = self._graphs[key]
            fixed = held(*leaves)
            _check(moving(flat, *fixed), as_written(flat))
        except StagingError as error:
            self.staged = False
            warnings.warn(
                f"the pair is annealed as written, not as a traced graph: {error}", stacklevel=2
            )
            return as_written
        return lambda flat: moving(flat, *fixed)

    def _lowered(self, graph: Any, inputs: list[Tensor]) -> Any:
        try:
            return lower(graph, inputs)
        except StagingError as error:
            self.compiled = False
            warnings.warn(f"the densities are not compiled: {error}", stacklevel=2)
            return graph


def _check(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(found, expected, strict=True):
        if not torch.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise StagingError(
                "it does not reproduce the programs on other data: something in them is computed "
                "outside torch"
            )


def hoist(graph: Any) -> tuple[Callable[..., list[Tensor]], Callable[..., tuple[Tensor, ...]]]:
    """Split a traced function of point and batch into what the batch alone decides and the rest.

    Args:
        graph: A ``torch.fx.GraphModule`` whose first input is the point, the others the batch.

    Returns:
        ``held(*batch)``, a list of tensors, and ``moving(u, *held)``, what the graph returns.
    """
    nodes = list(graph.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    moves = {inputs[0]}
    for node in nodes:
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node.op != "output" and (random or moves.intersection(node.all_input_nodes)):
            moves.add(node)
    needed = {source for node in nodes if node in moves or node.op == "output"
              for source in node.all_input_nodes if source not in moves}  # fmt: skip
    boundary = [node for node in nodes if node in needed and node.op != "get_attr"]
    held, moving = torch.fx.Graph(), torch.fx.Graph()
    copies = {node: held.node_copy(node) for node in inputs[1:]}
    for node in nodes:
        if node.op != "output" and node not in moves and node not in copies:
            copies[node] = held.node_copy(node, copies.__getitem__)
    held.output([copies[node] for node in boundary])
    copies = {inputs[0]: moving.node_copy(inputs[0])}
    copies.update({node: moving.placeholder(f"held_{i}") for i, node in enumerate(boundary)})
    for node in nodes:
        if node.op == "output" or (node not in copies and (node in moves or node in needed)):
            copies[node] = moving.node_copy(node, copies.__getitem__)
    held.eliminate_dead_code()
    return torch.fx.GraphModule(graph, held), torch.fx.GraphModule(graph, moving)
