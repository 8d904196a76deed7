"""Importance sampling: the log evidence of held-out data, with error and diagnostics."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pvae import log_weights as algebra
from pvae.allocation import keep_large_blocks
from pvae.data import as_batch, num_rows, take
from pvae.errors import OptionError, ProgramError
from pvae.evidence.sweep import Sweep, tensors_of
from pvae.particles import Layout, inspect, module_of
from pvae.seeds import mix

__all__ = ["Evidence", "evaluation", "importance"]

Progress = Callable[[int, int], None]

_MAX_DRAWS = 2**17  # pairs whose latent draws are held at once: small beside what the model makes
_MAX_PAIRS = {"cpu": 2**11}  # a decoder's activations for these stay in the processor's cache


@dataclass(frozen=True)
class Evidence:
    """The log evidence of N data, nats per datum.

    Attributes:
        log_evidence: ``(N,)`` estimates of ``log p(x_n)``, float64.
        stderr: ``(N,)`` their standard errors (delta method); zero where exact.
        ess: ``(N,)`` effective sample sizes of the weights.
        pareto_k: ``(N,)`` Pareto tail indices; above 0.7 the estimate cannot be trusted.
        elbo: ``(N,)`` mean log weight: the ELBO of the same draws.
        num_particles: K.
        kind: ``"exact"``, ``"estimate"``, ``"lower bound"`` or ``"upper bound"``.
        method: How it was computed.
        methods: How each datum's was, where that differs (see ``pvae.evidence.auto``).
    """

    log_evidence: Tensor
    stderr: Tensor
    ess: Tensor
    pareto_k: Tensor
    elbo: Tensor
    num_particles: int
    kind: str = "estimate"
    method: str = "importance"
    methods: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.log_evidence)

    @property
    def mean(self) -> float:
        """Mean over the data, nats per datum."""
        return float(self.log_evidence.mean())

    @property
    def mean_stderr(self) -> float:
        """Standard error of :attr:`mean` over the draw of the data, nats."""
        if len(self) < 2:
            return math.inf
        return float(self.log_evidence.std() / math.sqrt(len(self)))

    @property
    def unreliable(self) -> float:
        """Share of data whose k-hat exceeds 0.7."""
        return float((self.pareto_k > 0.7).double().mean())

    def __repr__(self) -> str:
        return (
            f"Evidence({self.mean:.3f} ± {self.mean_stderr:.3f} nats, N={len(self)}, "
            f"K={self.num_particles}, {self.kind} by {self.method}, "
            f"{100 * self.unreliable:.1f} % with k-hat > 0.7)"
        )

    @classmethod
    def exact(cls, log_evidence: Tensor, method: str = "closed form") -> Evidence:
        """Wrap densities ``(N,)`` that are known exactly."""
        value = log_evidence.detach().double().cpu()
        zero = torch.zeros_like(value)
        no_tail = torch.full_like(value, -math.inf)
        return cls(value, zero, zero + 1, no_tail, value, 1, "exact", method)

    def shifted(self, offset: Tensor) -> Evidence:
        """The same evidence on another scale: ``log p + offset``, ``(N,)`` nats."""
        offset = offset.double().cpu()
        changed = {"log_evidence": self.log_evidence + offset, "elbo": self.elbo + offset}
        kept = {f.name: getattr(self, f.name) for f in fields(self)}
        return Evidence(**{**kept, **changed})


def importance(
    model: Any,
    guide: Any,
    x: Any,
    num_particles: int = 5000,
    *,
    max_pairs: int | None = None,
    seed: int = 0,
    data_plate: str | None = None,
    vectorize: bool = True,
    engine: str = "auto",
    smooth: bool = False,
    progress: Progress | None = None,
) -> Evidence:
    r"""Estimate ``log p(x_n) = log E_q[p(x_n, z) / q(z | x_n)]`` by K draws for each datum.

    Exactly K draws are used, however they are cut into pieces; the guide (the encoder) is run once
    per datum, the model on pieces of at most ``max_pairs`` particle-datum pairs. Weights are kept
    and reduced in float64. The expectation of the estimate is the IW-ELBO of K particles, a lower
    bound that rises with K (Burda et al. 2016).

    Args:
        model: The generative program.
        guide: The inference program.
        x: Data: an array, tensor, tuple or dict of them, N rows.
        num_particles: K.
        max_pairs: Cap on particles x data held at once by the model; 2048 on a CPU, 262144 on
            another device, if left out.
        seed: Seed of the draws; the caller's random stream is untouched.
        data_plate: Name of the plate that indexes the data, where several could.
        vectorize: Run particles at once.
        engine: ``"eager"``, ``"staged"`` or ``"compiled"`` programs; ``"auto"`` compiles where more
            than a minute of eager work lies ahead. The draws are the same.
        smooth: Replace the largest weights by the quantiles of a Pareto distribution fitted to them
            (PSIS, Vehtari et al. 2024): a little bias for much less variance. k-hat stays that of
            the raw weights.
        progress: Called with (data done, N).

    Returns:
        An :class:`Evidence` of N data.

    Raises:
        ProgramError: The programs do not fit each other, or have a latent site that all data share.
        OptionError: ``num_particles`` or ``max_pairs`` is below one.
    """
    for name, number in (("num_particles", num_particles), ("max_pairs", max_pairs)):
        if number is not None and number < 1:
            raise OptionError(f"{name} must be at least 1, got {number}")
    device = next((t.device for t in tensors_of(model, guide)), torch.device("cpu"))
    batch = as_batch(x, device=device, model=model, streams=True)
    total = num_rows(batch)
    if max_pairs is None:
        max_pairs = _MAX_PAIRS.get(device.type, 2**18)
    block = max(1, min(total, max_pairs, _MAX_DRAWS // num_particles))
    pieces = []
    with evaluation(model, guide, seed=seed, device=device):
        layout = inspect(
            model, guide, _rows(batch, 0, min(block, total)), data_plate=data_plate,
            vectorize=vectorize,
        )  # fmt: skip
        _refuse_shared(layout)
        weigh = Sweep(model, guide, layout, num_particles, max_pairs, total, engine)
        for start in range(0, total, block):
            rows = _rows(batch, start, min(start + block, total))
            log_weights = weigh(rows)
            _refuse_other_rows(log_weights.shape[1], num_rows(rows))
            pieces.append(_reduce(log_weights, smooth=smooth))
            if progress is not None:
                progress(min(start + block, total), total)
    log_evidence, stderr, ess, pareto_k, elbo = (
        torch.cat(column).cpu() for column in zip(*pieces, strict=True)
    )
    method = "psis" if smooth else "importance"
    return Evidence(log_evidence, stderr, ess, pareto_k, elbo, num_particles, method=method)


@contextlib.contextmanager
def evaluation(model: Any, guide: Any, *, seed: int, device: torch.device) -> Iterator[None]:
    """No gradients, evaluation mode, Pyro's checks off, and a random stream of its own."""
    import pyro

    keep_large_blocks()
    modules = [m for m in (module_of(model), module_of(guide)) if m is not None]
    training = [(m, m.training) for module in modules for m in module.modules()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), pyro.validation_enabled(False):
        # Apart from data that the caller drew after torch.manual_seed(seed).
        torch.manual_seed(mix(seed, -4))
        for module in modules:
            module.eval()
        try:
            yield
        finally:
            for module, flag in training:
                module.training = flag


def _rows(batch: Any, start: int, stop: int) -> Any:
    first = next(iter(batch.values())) if isinstance(batch, Mapping) else batch
    tensor = first[0] if isinstance(first, tuple) else first
    return take(batch, torch.arange(start, stop, device=tensor.device))


def _refuse_shared(layout: Layout) -> None:
    if layout.globals:
        raise ProgramError(
            f"site {layout.globals[0]!r} is shared by all data, so there is no evidence of one "
            "datum: move it inside the data plate, or condition on it"
        )


def _refuse_other_rows(data: int, rows: int) -> None:
    if data != rows:
        raise ProgramError(
            f"the data plate holds {data} data where the batch has {rows} rows: give each datum a "
            "row, the first dimension of its tensors, and let the plate span them all"
        )


def _reduce(log_weights: Tensor, *, smooth: bool) -> tuple[Tensor, ...]:
    smoothed, pareto_k = algebra.psis(log_weights.cpu())
    used = smoothed if smooth else log_weights
    return (
        algebra.log_mean_exp(used),
        algebra.stderr(used),
        algebra.ess(used),
        pareto_k,
        log_weights.mean(0),
    )
