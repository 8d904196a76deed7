"""A few of each datum's particles, weighed with their gradients; the others without."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pvae.particles.densities import local_terms, node_terms
from pvae.particles.plates import count_data
from pvae.particles.running import replay
from pvae.particles.traces import detached, random_nodes, values_to_replay
from pvae.particles.types import (
    Batch,
    Chosen,
    Gate,
    Layout,
    Particles,
    Program,
    by_datum,
    by_program,
)
from pvae.particles.weighing import weigh

__all__ = ["weigh_chosen"]


def weigh_chosen(
    model: Program,
    batch: Batch,
    guide_trace: Any,
    layout: Layout,
    num_particles: int,
    choose: Callable[[Tensor], Tensor],
    *,
    score: dict[str, Tensor] | None,
    gate: Gate | None,
) -> Particles:
    """All particles without gradients, and the chosen ones with them (see :class:`Chosen`).

    Args:
        model: As for :func:`pvae.draw`.
        batch: Likewise.
        guide_trace: Its draws keep their paths to the guide's parameters.
        layout: Of the pair.
        num_particles: K.
        choose: Log weights ``(K, B)``, held fixed -> numbers of the particles to keep, ``(n, B)``.
        score: ``log q`` at the draws held fixed, ``(K, B)`` each, where it was asked for.
        gate: Passed through by the chosen draws on their way into the model.
    """
    values = values_to_replay(guide_trace)
    with torch.no_grad():
        model_trace = replay(model, batch, detached(values), num_particles, layout)
        whole = weigh(model_trace, guide_trace, layout, num_particles, batch)
        kept = choose(whole.log_weights)
    count = len(kept)
    few = dict(values)
    for name in layout.latents:
        draws = _taken(values[name], kept, layout, name)
        few[name] = draws if gate is None else gate(draws, layout, layout.event_dims[name])
    trace = replay(model, batch, few, count, layout)
    num_data = count_data(trace, layout, batch)
    log_p = local_terms(node_terms(random_nodes(trace), layout, count, num_data))
    log_q = local_terms(node_terms(random_nodes(guide_trace), layout, num_particles, num_data))
    chosen = Chosen(
        log_p=log_p,
        log_q={n: term.gather(0, kept) for n, term in log_q.items()},
        score=None if score is None else {n: t.gather(0, kept) for n, t in score.items()},
        weight=whole.log_weights.softmax(0).gather(0, kept),
    )
    return dataclasses.replace(whole, chosen=chosen, gate=gate)


def _taken(value: Tensor, kept: Tensor, layout: Layout, name: str) -> Tensor:
    """A site's draws ``(K, inner plates, B, inner plates, event)`` of the kept particles alone."""
    draws = by_datum(value, layout, name)
    index = kept.reshape(*kept.shape, *[1] * (draws.dim() - 2))
    return by_program(draws.gather(0, index.expand(-1, -1, *draws.shape[2:])), layout, name)
