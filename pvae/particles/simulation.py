"""Data drawn from a model in a batch's form, and dreams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pvae.errors import ProgramError
from pvae.particles.batches import entries_of, observed_keys, with_entries
from pvae.particles.programs import log_guide
from pvae.particles.running import attempt, given, plated, quiet, trace_of
from pvae.particles.traces import latent_nodes, observed_nodes, values_to_replay
from pvae.particles.types import Batch, Layout, Program

__all__ = ["check_dreams", "keys_to_draw", "log_dreams", "sample_observed", "simulate", "simulated"]


def simulate(
    model: Program, batch: Batch, *, guide: Program | None = None, check: bool = True
) -> tuple[dict[str, Tensor], Batch]:
    """Draw latents from the model, and data given them, in the form of a batch.

    Args:
        model: The generative program.
        batch: A template of B rows. What the model observes of it is replaced; the rest (labels,
            lengths, masks) is passed on and stays as it is.
        guide: Draws the latents given the batch instead of the model's prior, so that the data
            are draws of the posterior predictive.
        check: Make sure that the model does not read what it is to draw.

    Returns:
        Latent site -> values ``(B, ...)``, and the batch with what the model drew.

    Raises:
        ProgramError: An observed site is no tensor of the batch, or the model reads what it is to
            draw (as an autoregressive decoder does).
    """
    with quiet(batch):
        observed = keys_to_draw(model, batch)
        if check:
            _refuse_reading(model, batch, observed)
    drawn = {}
    if guide is not None:
        with torch.no_grad(), poutine.block():
            drawn = values_to_replay(trace_of(guide, batch))
    return simulated(model, batch, observed, drawn)


def simulated(
    model: Program, batch: Batch, observed: Mapping[str, Any], drawn: Mapping[str, Any]
) -> tuple[dict[str, Tensor], Batch]:
    """As :func:`simulate`, once it is known which tensors of the batch are observed."""
    with torch.no_grad(), poutine.block():
        trace = trace_of(_generator(model, drawn), batch)
    latents = {
        n: node["value"] for n, node in latent_nodes(trace).items()
        if n not in observed and not node["infer"].get("was_observed")
    }  # fmt: skip
    made = {key: trace.nodes[name]["value"] for name, key in observed.items()}
    return latents, with_entries(batch, made)


def log_dreams(model: Program, guide: Program, batch: Batch, layout: Layout) -> Tensor:
    """``log q(z' | x')`` where the model drew ``z'`` and then ``x'``: ``(1, B)``, nats."""
    latents, dreamt = simulated(model, batch, layout.entries, {})
    return log_guide(guide, dreamt, latents, 1, layout)


def check_dreams(model: Program, batch: Batch) -> None:
    """Refuse a model whose own draws could not be told from data of the batch's form.

    Raises:
        ProgramError: An observed site is no tensor of the batch, or the model reads what it is to
            draw.
    """
    with quiet(batch):
        _refuse_reading(model, batch, keys_to_draw(model, batch))


def sample_observed(
    model: Program, batch: Batch, values: Mapping[str, Any], num_particles: int, layout: Layout
) -> dict[str, Tensor]:
    """Observed site -> draws ``(K, B, ...)`` of ``p(x | z)``, given latents ``(K, B, ...)``."""
    trace = trace_of(_generator(plated(model, num_particles, layout), values), batch)
    return {name: trace.nodes[name]["value"] for name in layout.observed}


def _generator(model: Program, values: Mapping[str, Any]) -> Program:
    """The model with its observed sites drawn too, at given values of others."""
    return given(poutine.uncondition(model), values)


def keys_to_draw(model: Program, batch: Batch) -> dict[str, Any]:
    """Observed site -> key of the batch's tensor that it observes; refused where it is none."""
    observed = observed_nodes(attempt("model", model, batch))
    found = observed_keys(observed, batch)
    for name in observed:
        if name not in found:
            raise ProgramError(
                f"observed site {name!r} is not a tensor of the batch itself (it is computed from "
                "the batch), so data cannot be simulated in the batch's form: prepare the data "
                "before they are passed, or pass simulator="
            )
    return found


def _refuse_reading(model: Program, batch: Batch, observed: Mapping[str, Any]) -> None:
    """Other data in the template must give the same draws."""
    entries = dict(entries_of(batch))
    other = {
        key: torch.zeros_like(entries[key]) if bool(entries[key].any()) else entries[key] + 1
        for key in observed.values()
    }
    drawn = []
    for template in (batch, with_entries(batch, other)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            trace = attempt("model", _generator(model, {}), template)
        drawn.append({name: trace.nodes[name]["value"] for name in observed})
    for name in observed:
        if not torch.equal(drawn[0][name], drawn[1][name]):
            raise ProgramError(
                f"the model reads its data while it draws site {name!r} (as an autoregressive "
                "decoder does), so what it draws is no sample: pass simulator="
            )
