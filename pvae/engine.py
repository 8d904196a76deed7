"""One optimisation step: noise, loss, gradients, guard, update.

Randomness comes from ``(seed, step)`` alone, so that a step can be repeated, to find out what
went wrong or to continue a run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pvae.data import num_rows
from pvae.errors import NonFiniteError, OptionError, did_you_mean
from pvae.objectives import Loss, Objective, PyroObjective
from pvae.particles import Layout

__all__ = ["Eager", "build_optimizer", "mix", "seed_noise"]

_MASK = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """A 63-bit seed from several integers (splitmix64), so that near ones give unrelated streams."""
    state = 0
    for number in numbers:
        state = (state ^ (number & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


def seed_noise(device: torch.device, *numbers: int) -> None:
    """Seed the default generator of the CPU, and of the device if it is another."""
    seed = mix(*numbers)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        torch.cuda.default_generators[index].manual_seed(seed)


def build_optimizer(
    optimizer: str | type[torch.optim.Optimizer] | torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    *,
    lr: float,
    options: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """One optimiser over all parameters, fused where torch has it so.

    Args:
        optimizer: A name from ``torch.optim`` in small letters (adam, adamw, sgd, rmsprop, …), a
            class, or an instance, which is taken as it is.
        parameters: What it updates.
        lr: Learning rate.
        options: Further arguments of its constructor (``{"momentum": 0.9}``).

    Raises:
        OptionError: there is none of that name, or it does not take the options.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    if not lr > 0:
        raise OptionError(f"lr must be positive, got {lr}")
    kind = optimizer if isinstance(optimizer, type) else _optimizer_class(optimizer)
    given = dict(options or {})
    try:
        if "fused" in kind.__init__.__code__.co_varnames and not {"fused", "foreach"} & set(given):
            return kind(parameters, lr=lr, fused=True, **given)
        return kind(parameters, lr=lr, **given)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{kind.__name__} refused its options {given}: {error}") from error


def _optimizer_class(name: str) -> Any:
    known = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and key != "Optimizer"
    }
    unfit = {"lbfgs", "sparseadam", "muon"}  # a closure, sparse gradients, matrices only
    known = {key: value for key, value in known.items() if key not in unfit}
    if name.lower() not in known:
        raise OptionError(f"no optimizer is called {name!r}: {did_you_mean(name, known)}")
    return known[name.lower()]


@dataclass
class Eager:
    """The plain step: Pyro's handlers run at every call. It works for every pair.

    Args:
        model: The generative program.
        guide: The inference program.
        objective: What is maximised.
        optimizer: Over all parameters.
        parameters: Name -> parameter.
        layout: From ``objective.prepare``.
        device: Where everything lies.
        seed: Seed of the noise.
        num_data: N.
        preprocess: Fresh noise for each batch (dynamic binarisation, dequantisation).
        clip_norm: Largest norm of the whole gradient; ``None`` for no clipping.
    """

    model: Any
    guide: Any
    objective: Objective | PyroObjective
    optimizer: torch.optim.Optimizer
    parameters: Mapping[str, Tensor]
    layout: Layout | None
    device: torch.device
    seed: int
    num_data: int
    preprocess: Callable[[Any], Any] | None = None
    clip_norm: float | None = None

    def __call__(self, batch: Any, step: int, beta: float) -> Loss:
        """Take one step; the loss returned is from before the update, on the device.

        Raises:
            NonFiniteError: a loss or gradient is not finite; the parameters are unchanged.
        """
        loss = self._loss(batch, step, beta)
        self.optimizer.zero_grad(set_to_none=True)
        loss.loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        healthy = torch.isfinite(norm) & torch.isfinite(loss.loss)
        # On a CPU this reads a value that is there already; a GPU would have to wait for it.
        if self.device.type == "cpu" and not bool(healthy):
            raise self.diagnose(batch, step, beta)
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.clip_norm, norm)
        self.optimizer.step()
        return loss

    def _loss(self, batch: Any, step: int, beta: float) -> Loss:
        seed_noise(self.device, self.seed, step)
        if self.preprocess is not None:
            batch = self.preprocess(batch)
        return self.objective.evaluate(
            self.model,
            self.guide,
            batch,
            layout=self.layout,  # type: ignore[arg-type]
            beta=beta,
            num_data=self.num_data,
        )

    def diagnose(self, batch: Any, step: int, beta: float) -> NonFiniteError:
        """Repeat the step with the same noise and name what was not finite."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            particles = self._loss(batch, step, beta).particles
        where = f"step {step}"
        if particles is not None:
            for role, terms in (("model", particles.log_p), ("guide", particles.log_q)):
                for name, term in terms.items():
                    bad = ~torch.isfinite(term).all(0)
                    if bool(bad.any()):
                        rows = bad.nonzero().flatten().tolist()
                        return NonFiniteError(
                            f"{where}: {role} site {name!r} has a log density that is not finite in "
                            f"{len(rows)} of {num_rows(batch)} rows of the batch (rows "
                            f"{_some(rows)}); the parameters are as before the step: look at these "
                            "data, or lower lr",
                        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._loss(batch, step, beta).loss.backward()  # type: ignore[no-untyped-call]
        bad_names = [
            name
            for name, p in self.parameters.items()
            if p.grad is not None and not bool(torch.isfinite(p.grad).all())
        ]
        self.optimizer.zero_grad(set_to_none=True)
        return NonFiniteError(
            f"{where}: the gradient of {_some(bad_names) or 'the loss'} is not finite although every "
            "log density is; the parameters are as before the step: clip the gradient (clip_norm) "
            "or lower lr"
        )


def _some(items: Sequence[Any], most: int = 5) -> str:
    shown = ", ".join(map(str, items[:most]))
    return shown + (", …" if len(items) > most else "")
