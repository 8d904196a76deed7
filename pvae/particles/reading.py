"""A model read alone: what it does on a batch, and what depends on what."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pvae.errors import ProgramError
from pvae.particles.batches import arguments
from pvae.particles.densities import attempted_log_prob
from pvae.particles.plates import find_data_plates
from pvae.particles.running import attempt, given, quiet
from pvae.particles.supports import check_supports
from pvae.particles.traces import random_nodes
from pvae.particles.types import Batch, Program

__all__ = ["ModelSite", "read_dependencies", "read_model"]


class ModelSite(NamedTuple):
    """One random statement of a model, as it came out on a batch.

    Attributes:
        distribution: Its distribution, batch shape as the plates made it.
        value: Its value.
        is_observed: Whether the value is given.
        plates: Its plates, with name, dim (``None`` for a sequential one), size and full_size.
        enumerate: What ``infer`` says of enumeration.
        mask: Tensor of ``poutine.mask``, or ``None``.
        log_prob: Log density of the value, batch shape.
    """

    distribution: Any
    value: Any
    is_observed: bool
    plates: tuple[Any, ...]
    enumerate: str | None
    mask: Any
    log_prob: Tensor


class _Bounded(Messenger):  # type: ignore[misc]
    """Stops a program that never ends, and remembers the last site it drew."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.seen, self.last = most, 0, ""

    def _pyro_sample(self, msg: Any) -> None:
        self.seen, self.last = self.seen + 1, msg["name"]
        if self.seen > self.most:
            raise ProgramError(self.refusal())

    def refusal(self) -> str:
        return (
            f"site {self.last!r} comes after {self.seen} sites and the model still goes on: bound "
            "its recursion, or draw the sites of a loop as one site with an event dimension"
        )


def read_model(
    model: Program,
    batch: Batch,
    *,
    values: Mapping[str, Any] | None = None,
    seed: int = 0,
    most: int = 4000,
) -> tuple[dict[str, ModelSite], int, frozenset[str]]:
    """Run a model once on its own draws and tell what it did.

    Args:
        model: The generative program.
        batch: B data.
        values: Latent site -> value to take instead of a draw, within its support or not.
        seed: Seed of the draws; the caller's random streams are left where they are.
        most: Number of sites after which the program counts as endless.

    Returns:
        Every random site in the order of the program, the dimension of the data plate and its
        names.

    Raises:
        ProgramError: The model fails on the batch, does not end, or has no data plate.
        DataError: Observed data outside the support of their likelihood.
    """
    bounded = _Bounded(most)
    checked = contextlib.nullcontext() if values is None else pyro.validation_enabled(False)
    with quiet(batch), checked:
        torch.manual_seed(seed)
        try:
            trace = attempt("model", bounded(given(model, values or {})), batch)
        except ProgramError as error:
            if bounded.seen > most or isinstance(error.__cause__, RecursionError):
                raise ProgramError(bounded.refusal()) from error
            raise
        data_dim, data_plates = find_data_plates(trace, batch, None)
        if values is None:
            check_supports(trace, attempt("model", model, batch))
        sites = {name: _model_site(node) for name, node in random_nodes(trace).items()}
    return sites, data_dim, data_plates


def _model_site(node: Any) -> ModelSite:
    found = node["infer"].get("enumerate")
    return ModelSite(
        distribution=node["fn"],
        value=node["value"],
        is_observed=bool(node["is_observed"]),
        plates=tuple(node["cond_indep_stack"]),
        enumerate=found if isinstance(found, str) else None,
        mask=node["mask"] if isinstance(node["mask"], Tensor) else None,
        log_prob=attempted_log_prob("model", node),
    )


def read_dependencies(
    model: Program, batch: Batch, *, seed: int = 0
) -> dict[str, frozenset[Any]] | None:
    """Site -> what its density is computed from, by labels that travel with the tensors.

    A label is the name of another site, or ``("batch", key)`` for a tensor of the batch. ``None``
    where a program does what labels cannot follow.
    """
    from pyro.infer.inspect import TrackProvenance
    from pyro.ops.provenance import ProvenanceTensor, get_provenance

    def labelled(key: Any, value: Any) -> Any:
        fits = isinstance(value, Tensor) and value.dim() > 0
        return ProvenanceTensor(value, frozenset({("batch", key)})) if fits else value

    args, kwargs = arguments(batch)
    args = tuple(labelled(key, value) for key, value in enumerate(args))
    kwargs = {key: labelled(key, value) for key, value in kwargs.items()}
    with quiet(batch), pyro.validation_enabled(False):
        torch.manual_seed(seed)
        try:
            trace = poutine.trace(TrackProvenance()(model)).get_trace(*args, **kwargs)
            return {
                name: frozenset(get_provenance(node["fn"].log_prob(node["value"])))
                for name, node in random_nodes(trace).items()
            }
        except Exception:  # whatever it is, the model ran without labels
            return None
