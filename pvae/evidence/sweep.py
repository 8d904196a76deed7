"""Log weights of many data: the guide once per datum, the model in pieces that fit the cache.

Both programs can be staged: traced once through Pyro's handlers, and compiled, for blocks of one
size. The draws are the same either way.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pvae.errors import OptionError, did_you_mean
from pvae.particles import Layout, log_joint, module_of, sample_guide
from pvae.staging import COMPILING_PAYS, StagingError, capture, lower

__all__ = ["Sweep", "tensors_of"]

_ENGINES = ("auto", "compiled", "eager", "staged")
_log = logging.getLogger("pvae")


class Sweep:
    """``(K, B)`` log weights, float64, of one block of data after another.

    Args:
        model: The generative program.
        guide: The inference program.
        layout: From :func:`pvae.particles.inspect`.
        num_particles: K.
        max_pairs: Cap on particles x data held at once by the model.
        num_data: N, by which ``auto`` judges whether compiling pays.
        engine: ``"eager"``, ``"staged"``, ``"compiled"`` or ``"auto"``.
    """

    def __init__(
        self,
        model: Any,
        guide: Any,
        layout: Layout,
        num_particles: int,
        max_pairs: int,
        num_data: int,
        engine: str = "auto",
    ) -> None:
        if engine not in _ENGINES:
            raise OptionError(f"no engine is called {engine!r}: {did_you_mean(engine, _ENGINES)}")
        self.model, self.guide, self.layout = model, guide, layout
        self.num_particles, self.max_pairs = num_particles, max_pairs
        self.left, self.engine = num_data, engine
        self.staged: _Staged | None = None

    def __call__(self, rows: Any) -> Tensor:
        """Log weights ``(K, B)`` of a block of B data."""
        size = len(_leaves(rows)[0])
        if self.staged is None and self.engine in ("staged", "compiled"):
            self._stage(rows, self.engine)
        started = time.perf_counter()
        weights = self._weigh(rows)
        self.left -= size
        if self.engine == "auto":
            ahead = (time.perf_counter() - started) * self.left / size
            self.engine = "eager"
            if ahead > COMPILING_PAYS:
                self._stage(rows, "compiled")
        return weights

    def _weigh(self, rows: Any) -> Tensor:
        if not self.layout.vectorize:
            return torch.cat([self.block(rows, 1) for _ in range(self.num_particles)])
        return self.block(rows, self.num_particles)

    def block(self, rows: Any, num_particles: int) -> Tensor:
        """Log weights of one block, by the staged programs where its size is theirs."""
        if self.staged is not None and self.staged.fits(rows):
            return self.staged(rows)
        values, log_q = sample_guide(self.guide, rows, num_particles, self.layout)
        chunk = max(1, self.max_pairs // log_q.shape[1])
        pieces = [
            log_joint(self.model, rows, self.part(values, start, stop), stop - start, self.layout)
            for start, stop in _pieces(num_particles, chunk)
        ]
        return torch.cat([piece.double() for piece in pieces]) - log_q.double()

    def part(self, values: Mapping[Any, Any], start: int, stop: int) -> dict[Any, Any]:
        """A slice of the draws along K; indices that plates took are passed on as they are."""
        return {
            name: value[start:stop] if self._is_draw(value) else value
            for name, value in values.items()
        }

    def _is_draw(self, value: Any) -> bool:
        depth = -self.layout.particle_dim
        return self.layout.vectorize and isinstance(value, Tensor) and value.dim() >= depth

    def _stage(self, rows: Any, engine: str) -> None:
        wanted, self.engine = engine, "eager"
        for compiled in (True, False) if engine == "compiled" else (False,):
            try:
                self.staged = _Staged(self, rows, compiled=compiled)
            except StagingError as error:
                warnings.warn(f"the evaluation is not {engine}: {error}", stacklevel=4)
                engine = "staged"
                continue
            self.engine = "compiled" if compiled else "staged"
            _log.info("evaluation %s, ready in %.1f s", self.engine, self.staged.seconds)
            return
        _log.info("evaluation eager instead of %s", wanted)


class _Staged:
    """Both programs as graphs for blocks of one size.

    Raises:
        StagingError: they cannot be staged; the message is the reason.
    """

    def __init__(self, sweep: Sweep, rows: Any, *, compiled: bool) -> None:
        if not sweep.layout.vectorize:
            raise StagingError("particles are run one by one")
        started = time.perf_counter()
        self.sweep, self.held = sweep, tensors_of(sweep.model, sweep.guide)
        self.shapes = [leaf.shape for leaf in _leaves(rows)]
        with torch.random.fork_rng(_devices(rows)):
            values, _ = sample_guide(sweep.guide, rows, sweep.num_particles, sweep.layout)
        self.names = [name for name, value in values.items() if isinstance(value, Tensor)]
        self.chunk = min(sweep.num_particles, max(1, sweep.max_pairs // self.shapes[0][0]))
        piece = list(self._part([values[name] for name in self.names], self.chunk))
        draw: Callable[..., Any] = capture(self._draw, self.held, rows, flat=True)
        weigh: Callable[..., Any] = capture(self._weigh, self.held, rows, piece, flat=True)
        if compiled:
            draw = lower(draw, [*self.held, *_leaves(rows)])
            weigh = lower(weigh, [*self.held, *_leaves(rows), *piece])
        self.draw, self.weigh = draw, weigh
        self._verify(rows)
        self.seconds = time.perf_counter() - started

    def _draw(self, held: list[Tensor], rows: Any) -> tuple[Tensor, ...]:
        sweep = self.sweep
        values, log_q = sample_guide(sweep.guide, rows, sweep.num_particles, sweep.layout)
        return (log_q.double(), *(values[name] for name in self.names))

    def _weigh(self, held: list[Tensor], rows: Any, piece: list[Tensor]) -> tuple[Tensor]:
        values = dict(zip(self.names, piece, strict=True))
        sweep = self.sweep
        return (log_joint(sweep.model, rows, values, self.chunk, sweep.layout).double(),)

    def fits(self, rows: Any) -> bool:
        return [leaf.shape for leaf in _leaves(rows)] == self.shapes

    def __call__(self, rows: Any) -> Tensor:
        leaves, num_particles = _leaves(rows), self.sweep.num_particles
        log_q, *values = self.draw(*self.held, *leaves)
        log_p = torch.empty_like(log_q)
        for _, stop in _pieces(num_particles, self.chunk):
            # The last piece reaches back over the one before, so that all have one shape.
            piece = self._part(values, stop)
            log_p[stop - self.chunk : stop] = self.weigh(*self.held, *leaves, *piece)[0]
        weights: Tensor = log_p - log_q
        return weights

    def _part(self, values: list[Tensor], stop: int) -> Iterator[Tensor]:
        parts = self.sweep.part(dict(enumerate(values)), stop - self.chunk, stop)
        return iter(parts.values())

    def _verify(self, rows: Any) -> None:
        """The graphs against the programs, on the rows in another order and other noise."""
        other = torch.utils._pytree.tree_map(lambda leaf: leaf.roll(1, 0), rows)
        with torch.random.fork_rng(_devices(rows)):
            torch.manual_seed(1)
            expected = self.sweep.block(other, self.sweep.num_particles)
            torch.manual_seed(1)
            found = self(other)
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise StagingError(
                "the traced graph does not reproduce the program on other data: something in it is "
                "computed outside torch, or from a Python value that changes"
            )


def tensors_of(*programs: Any) -> list[Tensor]:
    """Parameters and buffers of the programs' modules, each once, detached."""
    modules = [m for m in map(module_of, programs) if m is not None]
    found = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return list({id(tensor): tensor for tensor in found}.values())


def _pieces(total: int, size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, total)) for start in range(0, total, size))


def _leaves(rows: Any) -> list[Tensor]:
    leaves: list[Tensor] = torch.utils._pytree.tree_leaves(rows)
    return leaves


def _devices(rows: Any) -> list[int]:
    return sorted({leaf.device.index or 0 for leaf in _leaves(rows) if leaf.is_cuda})
