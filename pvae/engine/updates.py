"""An optimiser's update as tensor operations, for a graph to hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Update"]


class Update:
    """A torch optimiser's update as tensor operations, on that optimiser's own state."""

    def __init__(self, optimizer: torch.optim.Optimizer, tensors: list[Tensor]) -> None:
        self.optimizer, self.group = optimizer, optimizer.param_groups[0]
        self.tensors = tensors
        self.names, self.rule = _RULES[type(optimizer)]
        if isinstance(optimizer, torch.optim.SGD) and not self.group["momentum"]:
            self.names = ()
        if isinstance(optimizer, torch.optim.RMSprop) and not self.group["momentum"]:
            self.names = ("square_avg",)
        for tensor in tensors:
            state = optimizer.state[tensor]
            if not isinstance(optimizer, torch.optim.SGD):
                state.setdefault("step", torch.zeros((), device=tensor.device))
            for name in self.names:
                if state.get(name) is None:
                    state[name] = torch.zeros_like(tensor, memory_format=torch.preserve_format)

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, tensors: list[Tensor]) -> Update | None:
        """The update in the graph, or ``None`` where the optimiser has to step by itself."""
        if type(optimizer) not in _RULES or len(optimizer.param_groups) > 1:
            return None
        group = optimizer.param_groups[0]
        unusual = ("amsgrad", "maximize", "centered", "nesterov", "dampening", "differentiable")
        if any(group.get(name) for name in unusual):
            return None
        return cls(optimizer, tensors)

    def state(self) -> list[Tensor]:
        """The optimiser's moments, tensor by tensor."""
        return [self.optimizer.state[t][name] for t in self.tensors for name in self.names]

    def steps_taken(self) -> int:
        """Steps that the optimiser has counted so far."""
        return max(int(self.optimizer.state[t].get("step", 0)) for t in self.tensors)

    def set_steps(self, count: int) -> None:
        """Let the optimiser count what the graph has taken."""
        for tensor in self.tensors:
            if "step" in self.optimizer.state[tensor]:
                self.optimizer.state[tensor]["step"].fill_(count)

    def corrections(self, step: int) -> tuple[float, float]:
        """What Adam's moments, which began at zero, are multiplied by; ones for the others."""
        if "betas" not in self.group:
            return 1.0, 1.0
        first, second = self.group["betas"]
        return 1 / (1 - first**step), (1 - second**step) ** -0.5

    def __call__(
        self,
        tensors: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        healthy: Tensor,
        scalars: Tensor,
    ) -> None:
        """Move tensors and moments in place, where the step is healthy.

        Args:
            tensors: The parameters.
            gradients: Theirs; ``None`` for one that the loss does not reach.
            healthy: Whether loss and gradients are finite, ``()``.
            scalars: ``(beta, learning rate, *corrections)``, ``(4,)``.
        """
        for tensor, gradient in zip(tensors, gradients, strict=True):
            if gradient is None:
                continue
            state = [self.optimizer.state[tensor][name] for name in self.names]
            old = [tensor, *state]
            for target, value in zip(
                old, self.rule(self.group, gradient, *old, scalars=scalars), strict=True
            ):
                target.copy_(torch.where(healthy, value, target))


def _adam(
    group: Mapping[str, Any], g: Tensor, p: Tensor, m: Tensor, v: Tensor, *, scalars: Tensor
) -> tuple[Tensor, ...]:
    _, rate, first, second = scalars.unbind()
    decay = group["weight_decay"]
    if decay and group.get("decoupled_weight_decay"):
        p = p * (1 - rate * decay)
    elif decay:
        g = g + decay * p
    m = m.lerp(g, 1 - group["betas"][0])
    v = v * group["betas"][1] + (1 - group["betas"][1]) * g * g
    return p - (rate * first) * m / (v.sqrt() * second + group["eps"]), m, v


def _sgd(
    group: Mapping[str, Any], g: Tensor, p: Tensor, *buffer: Tensor, scalars: Tensor
) -> tuple[Tensor, ...]:
    if group["weight_decay"]:
        g = g + group["weight_decay"] * p
    if not buffer:
        return (p - scalars[1] * g,)
    moved = group["momentum"] * buffer[0] + g
    return p - scalars[1] * moved, moved


def _rmsprop(
    group: Mapping[str, Any], g: Tensor, p: Tensor, s: Tensor, *buffer: Tensor, scalars: Tensor
) -> tuple[Tensor, ...]:
    if group["weight_decay"]:
        g = g + group["weight_decay"] * p
    s = s * group["alpha"] + (1 - group["alpha"]) * g * g
    change = g / (s.sqrt() + group["eps"])
    if not buffer:
        return p - scalars[1] * change, s
    moved = group["momentum"] * buffer[0] + change
    return p - scalars[1] * moved, s, moved


_RULES: dict[type, tuple[tuple[str, ...], Callable[..., tuple[Tensor, ...]]]] = {
    torch.optim.Adam: (("exp_avg", "exp_avg_sq"), _adam),
    torch.optim.AdamW: (("exp_avg", "exp_avg_sq"), _adam),
    torch.optim.RMSprop: (("square_avg", "momentum_buffer"), _rmsprop),
    torch.optim.SGD: (("momentum_buffer",), _sgd),
}
