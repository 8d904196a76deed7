"""A pair looked at once: where its plates and sites lie, and whether it can work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pvae.errors import ProgramError
from pvae.particles.batches import observed_keys, tensors_of
from pvae.particles.checks import (
    check_latent_supports,
    check_shapes,
    check_sites,
    check_vectorized,
)
from pvae.particles.densities import attempted_log_prob
from pvae.particles.plates import find_data_plates
from pvae.particles.running import attempt, given, quiet
from pvae.particles.supports import base_family, check_supports, observed_supports
from pvae.particles.traces import (
    latent_nodes,
    observed_nodes,
    plate_frames,
    random_nodes,
    values_to_replay,
)
from pvae.particles.types import Batch, Layout, Program

__all__ = ["check_follows", "inspect"]


def inspect(
    model: Program,
    guide: Program,
    batch: Batch,
    *,
    data_plate: str | None = None,
    vectorize: bool = True,
) -> Layout:
    """Run a pair once to find its plates and sites, and refuse what cannot work.

    Draws from a copy of the random state: the caller's stream is left where it was.

    Raises:
        ProgramError: The programs do not fit each other; the message names site and remedy.
        DataError: Observed data outside the support of their likelihood.
    """
    with quiet(batch):
        guide_trace = attempt("guide", guide, batch)
        prior_trace = attempt("model", model, batch)  # on its own draws
        check_sites(prior_trace, guide_trace)
        check_shapes(prior_trace, guide_trace)
        try:
            model_trace = attempt("model", given(model, values_to_replay(guide_trace)), batch)
        except ProgramError:
            check_latent_supports(prior_trace, guide_trace)  # where it is the cause, it is said
            raise
        check_latent_supports(model_trace, guide_trace)
        layout = _find_layout(model_trace, guide_trace, batch, data_plate, vectorize=vectorize)
        check_supports(model_trace, prior_trace)
        check_vectorized(model, guide, batch, layout)
    return layout


def check_follows(model: Program, batch: Batch, other: Batch, layout: Layout) -> None:
    """Refuse a model that observes data of its own: shuffled rows would meet those of others.

    Args:
        model: The generative program.
        batch: B data.
        other: The same in another order.
        layout: That of the pair.

    Raises:
        ProgramError: A site in the data plate observes the same rows on both.
    """
    pairs = zip(tensors_of(batch), tensors_of(other), strict=True)
    if all(torch.equal(one, two) for one, two in pairs):
        return
    with quiet(batch):
        nodes, others = (observed_nodes(attempt("model", model, each)) for each in (batch, other))
    for name, node in nodes.items():
        values: list[Any] = [node["value"], others[name]["value"] if name in others else None]
        dim = layout.data_dim - node["fn"].event_dim
        if name in layout.outside or not all(isinstance(value, Tensor) for value in values):
            continue
        if values[0].dim() < -dim or not torch.equal(*values):
            continue
        if bool((values[0] != values[0].roll(1, dim)).any()):
            raise ProgramError(
                f"site {name!r} observes the same rows whatever the batch is, so shuffled data "
                "would meet the latents of others: let it observe what the model is called with"
            )


def _find_layout(
    model_trace: Any, guide_trace: Any, batch: Batch, data_plate: str | None, *, vectorize: bool
) -> Layout:
    data_dim, data_plates = find_data_plates(model_trace, batch, data_plate)
    nodes = [*random_nodes(model_trace).values(), *random_nodes(guide_trace).values()]
    depth = max(
        [-data_dim]
        + [-frame.dim for node in nodes for frame in plate_frames(node)]
        + [len(node["fn"].batch_shape) for node in nodes]
    )
    latents = latent_nodes(model_trace)
    local = [
        n for n, node in latents.items() if any(f.name in data_plates for f in plate_frames(node))
    ]
    guide_sites = latent_nodes(guide_trace)
    drawn = [n for n in guide_sites if n in latents]
    rows = next(
        frame.size
        for node in observed_nodes(model_trace).values()
        for frame in plate_frames(node)
        if frame.name in data_plates
    )
    shared = [n for n in latents if n not in local] + [
        n for n, node in guide_sites.items()
        if n not in latents and not _has_rows(node["fn"].batch_shape, data_dim, rows)
    ]  # fmt: skip
    score_sites = {
        n: type(base_family(node["fn"])).__name__
        for n, node in guide_sites.items()
        if not node["fn"].has_rsample
    }
    observed = observed_nodes(model_trace)
    apart = [n for n, node in observed.items() if not _by_row(node, data_dim, data_plates, rows)]
    return Layout(
        particle_dim=-1 - depth,
        data_dim=data_dim,
        data_plates=data_plates,
        latents=tuple(local),
        globals=tuple(shared),
        observed=tuple(observed),
        outside=frozenset([*shared, *apart]),
        entries=observed_keys(observed, batch),
        score_sites=score_sites,
        supports=observed_supports(observed, batch),
        in_order=drawn == list(latents),
        vectorize=vectorize,
        event_dims={n: node["fn"].event_dim for n, node in guide_sites.items()},
    )


def _by_row(node: Any, data_dim: int, data_plates: frozenset[str], rows: int) -> bool:
    """Whether an observed site is in the data plate, or has its rows without saying so."""
    at_data = [frame.name for frame in plate_frames(node) if frame.dim == data_dim]
    if at_data:
        return at_data[0] in data_plates
    return _has_rows(attempted_log_prob("model", node).shape, data_dim, rows)


def _has_rows(batch_shape: Any, data_dim: int, rows: int) -> bool:
    """Whether a site has one value for each datum; a guide need not say it by a plate."""
    return len(batch_shape) >= -data_dim and batch_shape[data_dim] == rows
