"""Chains in time: a Markov chain as one distribution over ``(T, Z)``, and steps that are padding.

A sequence that is shorter than the longest of its set is padded; what stands there never counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor
from torch.distributions import constraints, kl_divergence

__all__ = ["GaussianChain", "Padded", "num_steps", "step_mask"]

# z_{t-1} (*, Z) and what else is known at t (*, C) -> mean and standard deviation (*, Z)
Step = Callable[[Tensor, Any], tuple[Tensor, Tensor]]


def step_mask(x: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Which steps of ``x`` ``(B, T, D)`` are data: ``(B, T)``, boolean.

    Without ``lengths`` ``(B,)`` these are the steps that are not marked by negative numbers.
    """
    if lengths is None:
        return x[..., 0] >= 0
    return torch.arange(x.shape[1], device=x.device) < lengths[:, None]


def num_steps(x: Tensor, num_features: int) -> Tensor:
    """Steps of each padded sequence in ``x`` ``(N, T * D)`` or ``(N, T, D)``: ``(N,)``, int64."""
    return step_mask(x.reshape(len(x), -1, num_features)).sum(-1)


class GaussianChain(TorchDistribution):  # type: ignore[misc]
    r"""``prod_t Normal(z_t; loc(z_{t-1}, c_t), scale(z_{t-1}, c_t))``, an event ``(T, Z)``.

    Its density is taken for all steps in one call of ``step``, since every ``z_{t-1}`` is then
    known; only drawing takes T calls, one after another.

    Args:
        step: ``z_{t-1}`` ``(*, Z)`` and ``c_t`` ``(*, C)`` (``None`` without a context) to mean
            and standard deviation ``(*, Z)``.
        start: ``z_0``, ``(Z,)``.
        length: T.
        context: ``c_t`` of each datum, ``(*batch, T, C)``.
        mask: Which steps count, ``(*batch, T)``; at the others the density is one.
        batch_shape: Batch shape; that of context or mask if left out.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(
        self,
        step: Step,
        start: Tensor,
        length: int,
        *,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        batch_shape: Any = None,
        validate_args: bool | None = None,
    ) -> None:
        self.step, self.start, self.length = step, start, length
        self.context, self.mask = context, mask
        self._drawn: tuple[Tensor, Tensor, Tensor] | None = None
        if batch_shape is None:
            known = context.shape[:-2] if context is not None else None
            known = mask.shape[:-1] if known is None and mask is not None else known
            batch_shape = known or ()
        shape = torch.Size((length, start.shape[-1]))
        super().__init__(torch.Size(batch_shape), shape, validate_args=validate_args)

    @property
    def support(self) -> Any:
        """Real arrays."""
        return constraints.independent(constraints.real, 2)  # type: ignore[no-untyped-call]

    def expand(self, batch_shape: Any, _instance: Any = None) -> GaussianChain:
        """The same chain with a larger batch shape; the context is shared, not copied."""
        return GaussianChain(
            self.step,
            self.start,
            self.length,
            context=self.context,
            mask=self.mask,
            batch_shape=batch_shape,
            validate_args=False,
        )

    def at(self, t: int, previous: Tensor) -> Any:
        """``p(z_t | z_{t-1})`` of step t, counted from zero: events ``(Z,)``."""
        context = None if self.context is None else self.context[..., t, :]
        loc, scale = self.step(previous, context)
        return Normal(loc, scale).to_event(1)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws ``(*sample, *batch, T, Z)``, differentiable in all that they depend on."""
        shape = self._extended_shape(sample_shape)
        noise = torch.randn(shape, dtype=self.start.dtype, device=self.start.device)
        previous = self.start.expand(shape[:-2] + shape[-1:])
        # Cut at once: the gradient of an index is as large as all that it was taken from.
        contexts = [None] * self.length if self.context is None else self.context.unbind(-2)
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        for context, each in zip(contexts, noise.unbind(-2), strict=True):
            loc, scale = self.step(previous, context)
            previous = torch.addcmul(loc, scale, each)
            steps.append((previous, loc, scale))
        value, locs, scales = (torch.stack(parts, -2) for parts in zip(*steps, strict=True))
        self._drawn = (value, locs, scales)  # its density needs them again
        return value

    def _moments(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each ``z_t`` given the one before in ``value``."""
        if self._drawn is not None and self._drawn[0] is value:
            return self._drawn[1:]
        start = self.start.expand(*value.shape[:-2], 1, value.shape[-1])
        return self.step(torch.cat([start, value[..., :-1, :]], -2), self.context)

    def step_log_prob(self, value: Tensor) -> Tensor:
        """``log p(z_t | z_{t-1})`` at each step, ``(*, T, Z) -> (*, T)``, zero at padding."""
        log_prob: Tensor = Normal(*self._moments(value)).log_prob(value).sum(-1)
        return log_prob if self.mask is None else log_prob.masked_fill(~self.mask, 0.0)

    def kl_along(self, value: Tensor, other: Any) -> Tensor:
        """``sum_t KL(self(z_t | z_{t-1}) || other(z_t | z_{t-1}))`` along a path, nats.

        Over paths ``(*, T, Z)`` that are drawn from this chain its mean is the KL of the two, with
        less noise than the difference of their log densities has.

        Raises:
            NotImplementedError: ``other`` is no chain.
        """
        if not isinstance(other, GaussianChain):
            raise NotImplementedError
        ours, theirs = Normal(*self._moments(value)), Normal(*other._moments(value))
        total = kl_divergence(ours, theirs).sum(-1)
        if self.mask is not None:
            total = total.masked_fill(~self.mask, 0.0)
        return total.sum(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """``(*, T, Z) -> (*,)``, nats."""
        if self._validate_args:
            self._validate_sample(value)
        total = self.step_log_prob(value).sum(-1)
        shape = torch.broadcast_shapes(total.shape, self.batch_shape)  # type: ignore[no-untyped-call]
        return total.expand(shape)


class _Steps(constraints.Constraint):
    """A constraint on steps ``(*, T * D)`` that lets those pass that hold padding alone."""

    event_dim = 1

    def __init__(self, of_a_step: Any, num_features: int, padding: float) -> None:
        self.base_constraint, self.num_features, self.padding = of_a_step, num_features, padding
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """``(*, T * D) -> (*,)``."""
        steps = value.reshape(*value.shape[:-1], -1, self.num_features)
        inside: Tensor = self.base_constraint.check(steps) | (steps == self.padding).all(-1)
        return inside.all(-1)


class Padded(TorchDistribution):  # type: ignore[misc]
    """Steps that are independent given what they depend on, some of them padding.

    An event is a whole sequence, flattened: ``(T * D,)``.

    Args:
        base: Distribution of each step: batch ``(*, T)``, events ``(D,)``.
        mask: Which steps count, ``(*, T)``; the values of the others are not looked at.
        padding: What is written there by ``sample``.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, base: Any, mask: Tensor, *, padding: float = -1.0, validate_args: bool | None = None
    ) -> None:
        self.base, self.mask, self.padding = base, mask, padding
        batch = torch.broadcast_shapes(base.batch_shape, mask.shape)  # type: ignore[no-untyped-call]
        event = torch.Size([batch[-1] * base.event_shape[0]])
        super().__init__(batch[:-1], event, validate_args=validate_args)

    @property
    def support(self) -> Any:
        """That of a step at every step that counts; padding may be anything."""
        return _Steps(self.base.support, self.base.event_shape[0], self.padding)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Padded:
        """The same distribution with a larger batch shape."""
        steps = torch.Size(batch_shape) + self.mask.shape[-1:]
        return Padded(self.base.expand(steps), self.mask, padding=self.padding, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """``(*, T * D) -> (*,)``, nats: the sum over the steps that count."""
        steps = value.reshape(*value.shape[:-1], -1, self.base.event_shape[0])
        counted = steps.masked_fill(~self.mask[..., None], 0)
        log_prob: Tensor = self.base.log_prob(counted).masked_fill(~self.mask, 0.0)
        return log_prob.sum(-1)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws ``(*, T * D)``, padding where it is in the mask."""
        drawn: Tensor = self.base.sample(sample_shape)
        return drawn.masked_fill(~self.mask[..., None], self.padding).flatten(-2)
