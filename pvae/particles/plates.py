"""The plate that indexes the data: which it is, how long, and what it scales by."""

from __future__ import annotations

from typing import Any

from pvae.errors import ProgramError
from pvae.particles.batches import leading_size
from pvae.particles.running import attempt, quiet
from pvae.particles.traces import in_braces, observed_nodes, plate_frames, random_nodes
from pvae.particles.types import Batch, Layout, Program

__all__ = ["count_data", "find_data_plates", "inner_scale", "plate_scale"]


def find_data_plates(
    model_trace: Any, batch: Batch, data_plate: str | None
) -> tuple[int, frozenset[str]]:
    """The data plate's dimension, and the names it goes by there."""
    rows = leading_size(batch)
    observed = observed_nodes(model_trace)
    frames = [frame for node in observed.values() for frame in plate_frames(node)]
    wanted = data_plate if data_plate is not None else "data"
    named = {frame.dim: frame for frame in frames if frame.name == wanted}
    if data_plate is not None and not named:
        raise ProgramError(
            f"no observed site is inside a plate called {data_plate!r}: the plates there are "
            f"{in_braces(sorted({frame.name for frame in frames}))}"
        )
    fitting = {f.dim: f for f in frames if f.size == rows or f.full_size not in (None, f.size)}
    found = named or fitting
    if not found:
        raise ProgramError(
            f"the model has no data plate: put observed sites {in_braces(observed)} inside "
            f'`with pyro.plate("data", {rows}, dim=-1)`, its size the number of rows of the batch'
        )
    if len(found) > 1:
        either = " and ".join(f"{f.name!r} (dim {f.dim})" for f in found.values())
        raise ProgramError(
            f"the model has two data plates, {either}, each as long as the batch: call one of them "
            '"data" or pass data_plate= (fit has it of its objective: pvae.vae(data_plate=...))'
        )
    data_dim, size = int(next(iter(found))), next(iter(found.values())).size
    return data_dim, frozenset(f.name for f in frames if f.dim == data_dim and f.size == size)


def count_data(trace: Any, layout: Layout, batch: Batch) -> int:
    """B: the size of the data plate, which a subsampled plate makes smaller than the batch."""
    sites = random_nodes(trace)
    for name, node in sites.items():
        for frame in plate_frames(node):
            if frame.dim == layout.data_dim and name not in layout.outside:
                return int(frame.size)
    for name in layout.latents:  # of a guide without plates
        if name in sites:
            return int(sites[name]["fn"].batch_shape[layout.data_dim])
    return leading_size(batch)


def inner_scale(node: Any, layout: Layout) -> float:
    """N/B of the subsampled plates within a datum that a site is in; one where there is none."""
    factor = 1.0
    for frame in node["cond_indep_stack"]:
        if frame.dim != layout.data_dim and frame.full_size is not None:
            factor *= frame.full_size / frame.size
    return factor


def plate_scale(model: Program, batch: Batch) -> float:
    """N/B of a model whose data plate is subsampled to B of N data by the caller; one otherwise.

    A plate that picks its rows itself, out of a batch of all N, counts as one.
    """
    with quiet(batch):
        trace = attempt("model", model, batch)
    rows = leading_size(batch)
    frames = [f for node in observed_nodes(trace).values() for f in plate_frames(node)]
    spans = [f for f in frames if f.full_size and f.size == rows]
    return max((float(f.full_size / f.size) for f in spans), default=1.0)
