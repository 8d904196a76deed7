"""Programs run under handlers, and the traces they leave."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pvae.errors import ProgramError
from pvae.particles.batches import arguments, tensors_of
from pvae.particles.types import Batch, Layout, Program

__all__ = ["attempt", "given", "plated", "quiet", "reason", "replay", "run_guide", "trace_of"]


class _Substitute(Messenger):  # type: ignore[misc]
    """Gives latent sites (and subsampled plates) the values that the guide drew."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class _Detach(Messenger):  # type: ignore[misc]
    """Cuts the path from each draw back to the parameters it was drawn with."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and isinstance(msg["value"], Tensor):
            msg["value"] = msg["value"].detach()


@contextlib.contextmanager
def quiet(batch: Batch) -> Iterator[None]:
    """No gradients and no trace left in the random streams or in an outer handler."""
    devices = sorted({t.device.index or 0 for t in tensors_of(batch) if t.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.no_grad(), poutine.block():
        yield


def trace_of(program: Program, batch: Batch) -> Any:
    """The trace of a program called on a batch."""
    args, kwargs = arguments(batch)
    return poutine.trace(program).get_trace(*args, **kwargs)


def attempt(role: str, program: Program, batch: Batch) -> Any:
    """The trace of a program called on a batch; whatever fails in it is a ``ProgramError``."""
    try:
        return trace_of(program, batch)
    except ProgramError:
        raise
    except Exception as error:
        raise ProgramError(f"the {role} failed on the batch: {reason(error)}") from error


def reason(error: Exception) -> str:
    """An error's class and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def given(program: Program, values: Mapping[str, Any]) -> Program:
    """The program at given values of its latent sites (and rows of its subsampled plates)."""
    return _Substitute(values)(program)  # type: ignore[no-any-return]


def plated(program: Program, num_particles: int, layout: Layout) -> Program:
    """The program inside a plate of particles, unless they are run one by one."""
    if not layout.vectorize:
        return program
    return pyro.plate("particles", num_particles, dim=layout.particle_dim)(program)  # type: ignore[no-any-return]


def run_guide(
    guide: Program, batch: Batch, num_particles: int, layout: Layout, *, detach: bool
) -> Any:
    """The guide's trace with K particles; with ``detach``, no path leads through its draws."""
    # Outermost, so that the trace records what it left.
    with _Detach() if detach else contextlib.nullcontext():
        return trace_of(plated(guide, num_particles, layout), batch)


def replay(
    program: Program, batch: Batch, values: Mapping[str, Any], num_particles: int, layout: Layout
) -> Any:
    """A program's trace with K particles, at given values ``(K, B, ...)`` of its latent sites."""
    return trace_of(given(plated(program, num_particles, layout), values), batch)
