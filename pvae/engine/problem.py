"""What a step is about, what is read of it, and what went wrong in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pvae.data import take
from pvae.distributed import Group
from pvae.errors import NonFiniteError
from pvae.nonfinite import first_operation
from pvae.objectives import Loss, Objective, PyroObjective
from pvae.particles import Layout, module_of
from pvae.precision import precision_context
from pvae.seeds import seed_noise

__all__ = ["METRICS", "Problem", "metrics"]

METRICS = ("bound", "elbo", "reconstruction", "kl")


@dataclass
class Problem:
    """What a step is about.

    Attributes:
        model: The generative program.
        guide: The inference program.
        objective: What is maximised.
        optimizer: Over all of ``parameters``.
        parameters: Name -> parameter that the step moves.
        layout: From ``objective.prepare``.
        data: All N data, on the device.
        device: Where everything lies.
        seed: Seed of the noise.
        num_data: N.
        preprocess: Fresh noise for each batch (dynamic binarisation, dequantisation).
        clip_norm: Largest norm of the whole gradient; ``None`` for no clipping.
        precision: ``"full"``, or ``"bfloat16"`` for linear and convolution layers.
        frozen: Name -> parameter of the programs that the step does not move but others do.
        parts: Into how many parts a batch is cut, see :mod:`pvae.parts`.
        group: The processes that share the parts.
    """

    model: Any
    guide: Any
    objective: Objective | PyroObjective
    optimizer: torch.optim.Optimizer
    parameters: Mapping[str, Tensor]
    layout: Layout | None
    data: Any
    device: torch.device
    seed: int
    num_data: int
    preprocess: Callable[[Any], Any] | None = None
    clip_norm: float | None = None
    precision: str = "full"
    frozen: Mapping[str, Tensor] = field(default_factory=dict)
    parts: int = 1
    group: Group | None = None

    @property
    def waits(self) -> bool:
        """Whether each step is waited for: a CPU reads at once what it has computed."""
        return self.device.type == "cpu"

    def seed_noise(self, step: int, part: int | None = None) -> None:
        """The noise of a step, or of one part of its batch."""
        seed_noise(self.device, self.seed, step, *(() if part is None else (part,)))

    def loss(self, index: Tensor, beta: Any) -> Loss:
        """The objective on the rows ``index`` of the data."""
        batch = take(self.data, index)
        if self.preprocess is not None:
            batch = self.preprocess(batch)
        with precision_context(self.precision):
            return self.objective.evaluate(
                self.model,
                self.guide,
                batch,
                layout=self.layout,  # type: ignore[arg-type]
                beta=beta,
                num_data=self.num_data,
            )

    def buffers(self) -> list[Tensor]:
        """Buffers of both programs, each once (batch normalisation changes them)."""
        modules = [m for m in (module_of(self.model), module_of(self.guide)) if m is not None]
        return list({id(b): b for module in modules for b in module.buffers()}.values())

    def diagnose(
        self, index: Tensor, step: int, beta: Any, part: int | None = None
    ) -> NonFiniteError:
        """Repeat a step, or a part of it, with the same noise and name what was not finite."""
        where, remedy = f"step {step}", "the parameters are as before the step"
        self.seed_noise(step, part)
        with torch.no_grad():
            particles = self.loss(index, beta).particles
        origin = self._origin(index, step, beta, part)
        terms = (
            [] if particles is None else [("model", particles.log_p), ("guide", particles.log_q)]
        )
        for role, sites in terms:
            for name, term in sites.items():
                bad = ~torch.isfinite(term).all(0)
                if bool(bad.any()):
                    rows = sorted(index[bad.to(index.device)].tolist())
                    return NonFiniteError(
                        f"{where}: {role} site {name!r} has a log density that is not finite in "
                        f"{len(rows)} of {len(index)} rows of the batch (data rows {_some(rows)})"
                        f"{origin}; {remedy}: look at these data, or lower lr"
                    )
        self.seed_noise(step, part)
        names = self._bad_gradients(index, beta)
        return NonFiniteError(
            f"{where}: the gradient of {_some(names) or 'the loss'} is not finite although every "
            f"log density is{origin}; {remedy}: clip the gradient (clip_norm) or lower lr"
        )

    def _origin(self, index: Tensor, step: int, beta: Any, part: int | None) -> str:
        """The operation at fault, in words; none where the data themselves are."""
        self.seed_noise(step, part)
        try:
            found = first_operation(lambda: self._bad_gradients(index, beta))
        except Exception:  # programs that cannot be watched are diagnosed without it
            found = None
        return "" if found is None else f"; first in the operation {found}"

    def _bad_gradients(self, index: Tensor, beta: Any) -> list[str]:
        tensors = list(self.parameters.values())
        gradients = torch.autograd.grad(self.loss(index, beta).loss, tensors, allow_unused=True)
        return [
            name
            for name, gradient in zip(self.parameters, gradients, strict=True)
            if gradient is not None and not bool(torch.isfinite(gradient).all())
        ]


def metrics(loss: Loss) -> Tensor:
    """Sums over the batch of bound, ELBO, reconstruction and KL: ``(4,)`` nats."""
    columns = (loss.bound, loss.elbo, loss.reconstruction, loss.kl)
    return torch.stack([column.detach().sum() for column in columns])


def _some(items: Sequence[Any], most: int = 5) -> str:
    shown = ", ".join(map(str, items[:most]))
    return shown + (", …" if len(items) > most else "")
