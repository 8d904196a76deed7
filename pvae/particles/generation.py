"""Data that a model draws by itself, with their latents: exact posterior draws."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pvae.errors import ProgramError
from pvae.particles.batches import leading_size, tensors_of, with_entries
from pvae.particles.densities import local_terms, node_terms
from pvae.particles.inspection import inspect
from pvae.particles.programs import log_joint
from pvae.particles.running import attempt, quiet, reason
from pvae.particles.simulation import keys_to_draw
from pvae.particles.traces import random_nodes
from pvae.particles.types import Batch, Layout, Program, sum_terms

__all__ = ["generate"]


def generate(
    model: Program,
    guide: Program,
    num_data: int,
    example: Batch | None = None,
    *,
    data_plate: str | None = None,
    vectorize: bool = True,
) -> tuple[Batch, dict[str, Tensor], Layout]:
    """Data that a model draws, with their latents: one exact posterior draw for each datum.

    Args:
        model: The generative program. Without an example it is called as ``model(size=num_data)``
            and returns the data; with one it is called on it, its observed sites drawn instead.
        guide: The inference program, by which the latent sites are told.
        num_data: B.
        example: B data whose observed tensors are replaced; what else is in the batch (covariates,
            say) stays.
        data_plate: Name of the plate that indexes the data, where several could.
        vectorize: Whether the programs take all particles at once.

    Returns:
        The batch, latent site -> value with one particle, and the layout of the pair.

    Raises:
        ProgramError: The model does not generate that way, or what it returns is not what it drew.
    """
    if example is None:
        trace, batch = _generated(model, num_data)
    else:
        trace = attempt("model", poutine.uncondition(model), example)
        with quiet(example):
            observed = keys_to_draw(model, example)
        batch = with_entries(example, {k: trace.nodes[n]["value"] for n, k in observed.items()})
    layout = inspect(model, guide, batch, data_plate=data_plate, vectorize=vectorize)
    sites = random_nodes(trace)
    latents = [n for n in (*layout.latents, *layout.globals) if n in sites]
    values = {n: _one_particle(sites[n], layout) for n in latents}
    drawn = sum_terms(local_terms(node_terms(sites, layout, 1, leading_size(batch))))
    _refuse_other_density(drawn, log_joint(model, batch, values, 1, layout))
    return batch, values, layout


def _refuse_other_density(drawn: Tensor, scored: Tensor) -> None:
    """A model must score its draws by the density that it drew them from."""
    if not torch.allclose(drawn, scored, rtol=1e-3, atol=1e-2):
        raise ProgramError(
            f"the model gives its own draw {float(drawn[0, 0]):.6g} nats when drawing and "
            f"{float(scored[0, 0]):.6g} when scoring it: let it return the values of its observed "
            "sites, and let no site depend on the data but through them"
        )


def _generated(model: Program, num_data: int) -> tuple[Any, Batch]:
    remedy = "let the model return simulated data when called so, or pass example data"
    try:
        trace = poutine.trace(model).get_trace(size=num_data)
    except Exception as error:
        raise ProgramError(
            f"model(size={num_data}) does not generate ({reason(error)}): {remedy}"
        ) from error
    batch = trace.nodes["_RETURN"]["value"]
    if next(tensors_of(batch), None) is None:
        raise ProgramError(
            f"model(size={num_data}) returns {type(batch).__name__}, not data: {remedy}"
        )
    return trace, batch


def _one_particle(node: Any, layout: Layout) -> Tensor:
    """A site's value with every batch dimension of the layout, the particle's of size one."""
    value: Tensor = node["value"]
    batch_dims = -layout.particle_dim - (0 if layout.vectorize else 1)
    return value.reshape((1,) * (batch_dims - len(node["fn"].batch_shape)) + value.shape)
