"""One step on a batch that is cut into parts: over processes, or one after the other.

The loss of a batch is a mean over its data, so it is the mean of its parts' losses, weighed by
their rows, and so is its gradient: however many processes share the parts, they take the step that
one process would have taken. Part ``p`` of P takes its noise from ``(seed, step, p)``.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pvae.distributed import Group
from pvae.errors import NonFiniteError

if TYPE_CHECKING:
    from pvae.engine import Problem

__all__ = ["Gradients", "cut", "own", "part_rows", "step_in_parts"]

# Rows of one part and the KL weight -> its sums of metrics, a number that is finite if its loss is,
# and the gradient of its mean loss for each parameter.
Gradients = Callable[[Tensor, float], tuple[Tensor, Tensor, Sequence[Tensor | None]]]


def part_rows(rows: int, parts: int) -> int:
    """Rows of all parts of a batch but the last: those in front are full, so that sizes repeat."""
    return math.ceil(rows / parts)


def cut(index: Tensor, parts: int) -> Sequence[Tensor]:
    """A batch ``(B,)`` as at most ``parts`` parts, disjoint and in order."""
    return torch.split(index, part_rows(len(index), parts))


def own(group: Group | None, parts: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """Parts number rank, rank + size and so on, which are those of this process."""
    rank, size = (0, 1) if group is None else (group.rank, group.size)
    return ((part, parts[part]) for part in range(rank, len(parts), size))


def step_in_parts(
    problem: Problem, gradients_of: Gradients, index: Tensor, step: int, beta: float
) -> Tensor:
    """Gradients of all parts, added over them and over the group, then one step of the optimiser.

    Args:
        problem: What the step is about.
        gradients_of: Gives those of one part.
        index: Rows of the whole batch.
        step: Its number.
        beta: KL weight.

    Returns:
        Sums of the metrics over the whole batch, the same on every rank.

    Raises:
        NonFiniteError: A loss or gradient of some part is not finite; no rank has moved.
        LostRankError: A rank did not answer.
    """
    tensors = list(problem.parameters.values())
    sums, check, gradients = _add(problem, gradients_of, index, step, beta)
    if problem.group is not None:
        sums, check, gradients = _exchange(problem.group, tensors, sums, check, gradients)
    norm = nn.utils.get_total_norm([g for g in gradients if g is not None])
    if problem.waits and not bool(torch.isfinite(norm) & torch.isfinite(check)):
        raise _diagnose(problem, gradients_of, index, step, beta)
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = gradient
    if problem.clip_norm is not None:
        nn.utils.clip_grads_with_norm_(tensors, problem.clip_norm, norm)
    problem.optimizer.step()
    problem.optimizer.zero_grad(set_to_none=True)
    return sums


def _add(
    problem: Problem, gradients_of: Gradients, index: Tensor, step: int, beta: float
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Sums over the parts of this process."""
    sums = torch.zeros(4, device=problem.device, dtype=torch.float64)
    check = torch.zeros((), device=problem.device, dtype=torch.float64)
    total: list[Tensor | None] = [None] * len(problem.parameters)
    for part, rows in own(problem.group, cut(index, problem.parts)):
        problem.seed_noise(step, part)
        weight = _weight(rows, index)
        found, finite, gradients = gradients_of(rows, beta)
        sums, check = sums + found, check + finite
        for k, gradient in enumerate(gradients):
            if gradient is not None:
                before = total[k]
                total[k] = (
                    gradient * weight if before is None else before.add_(gradient, alpha=weight)
                )
    return sums, check, total


def _weight(rows: Tensor, index: Tensor) -> float:
    """Of the mean over a part in the mean over the batch."""
    return len(rows) / len(index)


def _exchange(
    group: Group,
    tensors: Sequence[Tensor],
    sums: Tensor,
    check: Tensor,
    gradients: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The same over all ranks; a parameter that no part reached has no gradient, as ever."""
    reached = torch.tensor([float(g is not None) for g in gradients], dtype=torch.float64)
    asked = torch.tensor([float(group.asked == n) for n in _SIGNALS], dtype=torch.float64)
    filled = [
        torch.zeros_like(t) if g is None else g for t, g in zip(tensors, gradients, strict=True)
    ]
    device = sums.device
    sums, check, reached, asked, *added = group.sum(
        [sums, check, reached.to(device), asked.to(device), *filled]
    )
    heard = [n for n, count in zip(_SIGNALS, asked.tolist(), strict=True) if count]
    group.heard = heard[0] if heard else None
    return sums, check, [g if n else None for g, n in zip(added, reached.tolist(), strict=True)]


_SIGNALS = (int(signal.SIGINT), int(signal.SIGTERM))


def _diagnose(
    problem: Problem, gradients_of: Gradients, index: Tensor, step: int, beta: float
) -> NonFiniteError:
    """The same error on every rank: that of the first rank that has one."""
    text = ""
    for part, rows in own(problem.group, cut(index, problem.parts)):
        problem.seed_noise(step, part)
        _, finite, gradients = gradients_of(rows, beta)
        healthy = [bool(torch.isfinite(g).all()) for g in gradients if g is not None]
        if not (bool(torch.isfinite(finite)) and all(healthy)):
            text = str(problem.diagnose(rows, step, beta, part))
            break
    texts = [text] if problem.group is None else problem.group.gather(text)
    found = next((text for text in texts if text), None)
    return NonFiniteError(
        found or f"step {step}: the sum of the parts' gradients is not finite: lower lr"
    )
