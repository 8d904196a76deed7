"""The parameters of a pair: their names, and which program they belong to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from pyro import poutine
from pyro.poutine.messenger import unwrap
from torch import Tensor, nn

from pvae.particles.batches import arguments
from pvae.particles.densities import node_log_prob
from pvae.particles.running import given, quiet, trace_of
from pvae.particles.traces import detached, random_nodes, values_to_replay
from pvae.particles.types import Batch, Program

__all__ = ["module_of", "named_tensors", "owned", "parameters"]


def parameters(model: Program, guide: Program, batch: Batch) -> dict[str, nn.Parameter | Tensor]:
    """All trainable tensors of a pair, by a stable name, each once.

    They come from ``parameters()`` where a program is (a method of) a module, and from the
    parameter statements of its trace (``pyro.param``, ``pyro.module``).

    Raises:
        ProgramError: There is none.
    """
    found: dict[int, tuple[str, Tensor]] = {}
    for role, program in (("model", model), ("guide", guide)):
        owner = module_of(program)
        if owner is not None:
            for name, value in owner.named_parameters():
                found.setdefault(id(value), (f"{role}.{name}", value))
    with quiet(batch):
        trace = poutine.trace(_both(model, guide), param_only=True).get_trace(batch)
    for name, node in trace.nodes.items():
        if node["type"] == "param":
            leaf = node["value"].unconstrained()
            found.setdefault(id(leaf), (f"store.{name}", leaf))
    return {name: value for name, value in found.values() if value.requires_grad}


def _both(model: Program, guide: Program) -> Callable[[Batch], None]:
    def run(batch: Batch) -> None:
        args, kwargs = arguments(batch)
        given(model, values_to_replay(trace_of(guide, batch)))(*args, **kwargs)

    return run


def owned(
    model: Program, guide: Program, batch: Batch, weights: Mapping[str, Tensor]
) -> tuple[set[str], set[str]]:
    """Names of the parameters that the model's density and the guide's draws and density reach.

    It is found by differentiation, so that it does not matter where a parameter lives; one that
    both programs use (tied weights, everything under ``guides.Exact``) is in both sets.
    """
    with quiet(batch), torch.enable_grad():
        guide_trace = trace_of(guide, batch)
        drawn = values_to_replay(guide_trace)
        model_trace = trace_of(given(model, detached(drawn)), batch)
        ends = [
            [node_log_prob(node).sum() for node in random_nodes(trace).values()]
            for trace in (model_trace, guide_trace)
        ]
    ends[1] += [v.sum() for v in drawn.values() if isinstance(v, Tensor)]
    of_model, of_guide = (_reached(scalars, weights) for scalars in ends)
    return of_model, of_guide


def _reached(scalars: list[Tensor], weights: Mapping[str, Tensor]) -> set[str]:
    """Names of the parameters on which any of the scalars depends."""
    live = [scalar for scalar in scalars if scalar.requires_grad]
    if not live:
        return set()
    gradients = torch.autograd.grad(live, list(weights.values()), allow_unused=True)
    return {name for name, g in zip(weights, gradients, strict=True) if g is not None}


def named_tensors(model: Program, guide: Program) -> dict[str, Tensor]:
    """Parameters and buffers of the modules of a pair, as ``role.name``, each once."""
    own: dict[int, tuple[str, Tensor]] = {}
    for role, program in (("model", model), ("guide", guide)):
        module = module_of(program)
        for name, tensor in module.state_dict(keep_vars=True).items() if module else ():
            own.setdefault(id(tensor), (f"{role}.{name}", tensor))
    return dict(own.values())


def module_of(program: Program) -> nn.Module | None:
    """The module that a program is, or is a method of; ``None`` for a plain function.

    Pyro's handlers (``poutine.scale(model, scale=0.1)``) and ``functools.partial`` are looked
    through.
    """
    program = unwrap(program)
    while isinstance(program, functools.partial):
        program = program.func
    owner = getattr(program, "__self__", program)
    return owner if isinstance(owner, nn.Module) else None
