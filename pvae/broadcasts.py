"""What is spread over particles is computed before it is spread, in graphs for the CPU.

``Normal(loc, scale)`` of a datum scores K particles with ``log(scale)`` and ``2 scale^2``. Written
for the broadcast tensor, as a density writes it, Inductor's loops compute them, and the softplus
that gave ``scale``, K times for each datum and again for the gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, Node

__all__ = ["compute_before_broadcast"]

_LEAST = 4  # times as many elements after the broadcast, from which on it is worth a buffer
_aten = torch.ops.aten
_EXPAND = _aten.expand.default
_DEAR = frozenset({
    _aten.acos.default, _aten.asin.default, _aten.atan.default, _aten.cos.default,
    _aten.digamma.default, _aten.div.Scalar, _aten.div.Tensor, _aten.erf.default,
    _aten.exp.default, _aten.expm1.default, _aten.lgamma.default, _aten.log.default,
    _aten.log1p.default, _aten.reciprocal.default, _aten.rsqrt.default,
    _aten.sigmoid.default, _aten.sin.default, _aten.sqrt.default, _aten.tanh.default,
})  # fmt: skip
_CHEAP = frozenset({
    _aten.abs.default, _aten.add.Tensor, _aten.add.Scalar, _aten.clamp_max.default,
    _aten.clamp_min.default, _aten.maximum.default, _aten.minimum.default, _aten.mul.Scalar,
    _aten.mul.Tensor, _aten.neg.default, _aten.pow.Tensor_Scalar, _aten.square.default,
    _aten.sub.Scalar, _aten.sub.Tensor,
})  # fmt: skip
_REDUCTIONS = frozenset({
    _aten.amax.default, _aten.amin.default, _aten.mean.default, _aten.mean.dim,
    _aten.prod.dim_int, _aten.sum.default, _aten.sum.dim_IntList,
})  # fmt: skip


def compute_before_broadcast(graph: Graph, hold: Any, dear: Iterable[Any] = ()) -> None:
    """Move elementwise operations before the broadcasts they follow, and store what is dear.

    Args:
        graph: Of functional ATen operators, with example values; changed in place.
        hold: The operator that has its argument stored.
        dear: Elementwise operators that take long, beside those of ATen.
    """
    take_long = _DEAR.union(dear)
    elementwise = take_long | _CHEAP
    for node in _on_cpu(graph):
        if node.target in elementwise:
            _move(graph, node)
    graph.eliminate_dead_code()
    costly: set[Node] = set()  # what is not stored and takes long to compute anew
    for node in _on_cpu(graph):
        starts = node.target in take_long or node.target is _aten.index.Tensor
        if not starts and (node.target not in _CHEAP or costly.isdisjoint(node.all_input_nodes)):
            continue
        spreading = [user for user in node.users if user.target in elementwise | {_EXPAND}]
        if any(_is_spread(node, user) for user in spreading):
            _store(graph, node, hold)
        else:
            costly.add(node)


def _move(graph: Graph, node: Node) -> None:
    """``f(broadcast(x))`` becomes ``broadcast(f(x))`` where it is read number by number.

    Others would take its memory for that of as many numbers as it has.
    """
    tensors = [argument for argument in node.args if isinstance(argument, Node)]
    if node.kwargs or not tensors or not all(map(_is_broadcast, tensors)):
        return
    if not any(map(_reads, node.users)):
        return
    small = [a.args[0] if isinstance(a, Node) else a for a in node.args]
    shapes = [_shape(a) for a in small if isinstance(a, Node)]
    small_shape: torch.Size = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    if small_shape.numel() * _LEAST > _shape(node).numel():
        return
    with graph.inserting_before(node):
        moved = _call(graph, node.target, *small)
        spread = _call(graph, _EXPAND, moved, list(_shape(node)))
    node.replace_all_uses_with(spread, delete_user_cb=_reads)


def _reads(user: Node) -> bool:
    tags = getattr(user.target, "tags", ())
    pointwise = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
    return pointwise or user.target in _REDUCTIONS


def _store(graph: Graph, source: Node, hold: Any) -> None:
    with graph.inserting_after(source):
        stored = _call(graph, hold, source)
    source.replace_all_uses_with(stored, delete_user_cb=lambda user: user is not stored)


def _call(graph: Graph, operator: Any, *args: Any) -> Node:
    node = graph.call_function(operator, args)
    values = [a.meta["val"] if isinstance(a, Node) else a for a in args]
    node.meta["val"] = operator(*values)
    return node


def _is_broadcast(node: Any) -> bool:
    return isinstance(node, Node) and node.target is _EXPAND and _is_spread(node.args[0], node)


def _is_spread(source: Any, node: Node) -> bool:
    """Whether ``node`` has many more elements; one number alone stays in a register anyway."""
    return 1 < _shape(source).numel() <= _shape(node).numel() // _LEAST


def _shape(node: Any) -> torch.Size:
    shape: torch.Size = node.meta["val"].shape
    return shape


def _on_cpu(graph: Graph) -> list[Node]:
    def is_on_cpu(node: Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, torch.Tensor) and value.device.type == "cpu"

    return [node for node in graph.nodes if node.op == "call_function" and is_on_cpu(node)]
