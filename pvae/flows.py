"""Normalising flows as distributions that Pyro takes, conditioned on a context or not.

The transformations are zuko's; what is added here is a quick direction for drawing, the density of
a draw without an inverse, and any event shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus
from zuko.flows import MaskedAutoregressiveTransform
from zuko.transforms import MonotonicAffineTransform, MonotonicRQSTransform

from pvae.errors import OptionError, did_you_mean
from pvae.networks import activation_module

__all__ = ["FLOWS", "ConditionalFlow"]

_BINS = 8
_AFFINE = {"univariate": MonotonicAffineTransform, "shapes": ((), ())}
_SPLINE = {"univariate": MonotonicRQSTransform, "shapes": ((_BINS,), (_BINS,), (_BINS - 1,))}

# Name -> (options of zuko's autoregressive transformation, whether noise to value is one pass).
FLOWS: dict[str, tuple[dict[str, Any], bool]] = {
    "coupling": ({**_AFFINE, "passes": 2}, True),
    "iaf": (_AFFINE, True),
    "maf": (_AFFINE, False),
    "nsf": ({**_SPLINE, "passes": 2}, True),
}


class ConditionalFlow(nn.Module):
    r"""``z = loc(c) + scale(c) f_T(... f_1(e; c) ...; c)`` with ``e ~ Normal(0, I)``.

    ``log q(z | c) = log Normal(e; 0, I) - log scale(c) - sum_t log |det df_t / de_t|``. It starts
    near the Gaussian ``Normal(loc(c), scale(c))``, and the splines, which act on ``[-5, 5]``, see
    standardised numbers.

    ``iaf`` (Kingma et al. 2016) draws in one pass and needs one pass a dimension for the density of
    values that it did not draw; ``maf`` (Papamakarios et al. 2017) the other way round;
    ``coupling`` (real NVP, Dinh et al. 2017) and ``nsf`` (rational-quadratic spline couplings,
    Durkan et al. 2019) need one pass and two. The density of its own last draw costs none of them a
    pass more.

    Args:
        event_shape: Shape of a value.
        context_dim: Size of the context's last dimension; 0 for a flow without a context.
        kind: iaf, maf, coupling or nsf.
        transforms: Number T of transformations; each reverses the order of the dimensions.
        hidden: Width of each hidden layer of a transformation's network.
        activation: Its non-linearity.

    Raises:
        OptionError: no flow is called so, or ``transforms`` is not positive.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        context_dim: int = 0,
        *,
        kind: str = "iaf",
        transforms: int = 2,
        hidden: Sequence[int] = (64, 64),
        activation: str = "silu",
    ) -> None:
        super().__init__()
        if kind not in FLOWS:
            raise OptionError(f"no flow is called {kind!r}: {did_you_mean(kind, FLOWS)}")
        if transforms < 1:
            raise OptionError(f"transforms must be at least 1, got {transforms}")
        self.event_shape, self.kind = tuple(event_shape), kind
        self.size = math.prod(self.event_shape)
        options, self.draws_in_one_pass = FLOWS[kind]
        self.steps = nn.ModuleList(
            _step(self.size, context_dim, options, hidden, activation, reverse=bool(i % 2))
            for i in range(transforms)
        )
        self.head = nn.Linear(context_dim, 2 * self.size) if context_dim else None
        self.register_buffer("noise_loc", torch.zeros(self.size))
        if self.head is None:
            self.loc = nn.Parameter(torch.zeros(self.size))
            self.raw_scale = nn.Parameter(torch.full((self.size,), math.log(math.expm1(1.0))))

    def forward(self, context: Tensor | None = None) -> Any:
        """``q(z | context)`` for ``(*, context_dim)``: batch shape ``(*)``, the event shape."""
        if self.head is None:
            loc, raw_scale = self.loc, self.raw_scale
        else:
            loc, raw_scale = self.head(context).chunk(2, -1)
        noise = dist.Normal(self.noise_loc, 1.0).expand(loc.shape).to_event(1)
        steps = [step(context) for step in self.steps]
        transforms = [
            _Steps(steps, in_one_pass=self.draws_in_one_pass),
            _Affine(loc, softplus(raw_scale) + 1e-4, event_dim=1, cache_size=1),
        ]
        if len(self.event_shape) != 1:
            shapes = (self.size,), self.event_shape
            transforms.append(dist.transforms.ReshapeTransform(*shapes, cache_size=1))
        return dist.TransformedDistribution(noise, transforms)


_Affine = dist.transforms.AffineTransform


def _step(
    size: int,
    context_dim: int,
    options: dict[str, Any],
    hidden: Sequence[int],
    activation: str,
    *,
    reverse: bool,
) -> nn.Module:
    """One lazy transformation of zuko, near the identity at first."""
    order = torch.arange(size)
    step: nn.Module = MaskedAutoregressiveTransform(
        features=size,
        context=context_dim,
        order=order.flip(0) if reverse else order,
        hidden_features=tuple(hidden),
        activation=_named(activation),
        **options,
    )
    layers = [module for module in step.modules() if hasattr(module, "weight")]
    with torch.no_grad():
        for parameter in (layers[-1] if layers else step).parameters():
            parameter.mul_(0.1)
    return step


def _named(activation: str) -> Callable[[], nn.Module]:
    return lambda: activation_module(activation)


class _Steps(torch.distributions.Transform):
    """Transformations from noise to value; the last point and its Jacobian are remembered.

    Args:
        steps: Each quick in one direction: its call, not its inverse.
        in_one_pass: Whether that direction is from noise to value.
    """

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, steps: Sequence[Any], *, in_one_pass: bool) -> None:
        super().__init__(cache_size=1)
        self.steps, self.in_one_pass = steps, in_one_pass
        self._last: tuple[Tensor, Tensor] | None = None

    def _quick(self, start: Tensor) -> Tensor:
        point, total = start, start.new_zeros(())
        for step in self.steps:
            point, log_jacobian = step.call_and_ladj(point)
            total = total + log_jacobian
        self._last = start, total
        return point

    def _slow(self, end: Tensor) -> Tensor:
        for step in reversed(self.steps):
            end = step.inv(end)
        return end

    def _call(self, noise: Tensor) -> Tensor:
        return self._quick(noise) if self.in_one_pass else self._slow(noise)

    def _inverse(self, value: Tensor) -> Tensor:
        return self._slow(value) if self.in_one_pass else self._quick(value)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log |det d value / d noise|`` at noise ``x``, value ``y``: ``(*, D) -> (*)``."""
        start, sign = (x, 1) if self.in_one_pass else (y, -1)
        if self._last is None or self._last[0] is not start:
            self._quick(start)
        assert self._last is not None
        return sign * self._last[1]
