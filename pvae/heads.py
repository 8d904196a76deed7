"""From a context to a distribution on a support: the last layer of an amortised guide.

A continuous head draws ``u`` in unconstrained space and pushes it through the bijection onto the
support. Its numbers are relative to the prior's own location and scale there, so that a head whose
output is zero is the prior, somewhat narrower, as well as its family can be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import transforms as bijections
from torch.nn.functional import softplus

from pvae.spaces import Space

__all__ = [
    "BernoulliHead",
    "CategoricalHead",
    "DiagonalHead",
    "FlowHead",
    "FullHead",
    "LowRankHead",
    "Trunk",
    "positive",
]


def positive(raw: Tensor) -> Tensor:
    """Free numbers to positive ones, zero to 0.69."""
    return softplus(raw) + 1e-4


class Trunk(nn.Module):
    """From a context ``(*, context)`` to numbers ``(*, outputs)``.

    A linear map, to which a hidden layer is added if ``hidden`` is not zero. Without a context the
    numbers are parameters ``(*batch, outputs)``, zero at first.

    Args:
        context: Size of the context.
        outputs: Number of outputs.
        hidden: Width of the hidden layer.
        batch: Batch shape of the parameters, without a context.
    """

    def __init__(
        self, context: int, outputs: int, *, hidden: int = 0, batch: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.context, self.hidden = context, hidden
        if not context:
            self.constant = nn.Parameter(torch.zeros(*batch, outputs))
            return
        self.linear = nn.Linear(context, outputs)
        if hidden:
            self.inner = nn.Linear(context, hidden)
            self.outer = nn.Linear(hidden, outputs, bias=False)

    def forward(self, context: Tensor | None) -> Tensor:
        """The outputs."""
        if context is None:
            return self.constant
        outputs: Tensor = self.linear(context)
        if self.hidden:
            outputs = outputs + self.outer(torch.nn.functional.silu(self.inner(context)))
        return outputs


class DiagonalHead(nn.Module):
    """``Normal(loc, diag(scale^2))`` in unconstrained space.

    Args:
        context: Size of the context; zero for free parameters.
        event_shape: Shape of one value.
        support: Its constraint.
        hidden: Width of the hidden layer, see :class:`Trunk`.
        batch: Batch shape of the parameters, without a context.
    """

    def __init__(
        self,
        context: int,
        event_shape: Sequence[int],
        support: Any,
        *,
        hidden: int = 0,
        batch: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.space = Space(event_shape, support)
        self.trunk = Trunk(context, 2 * self.space.size, hidden=hidden, batch=batch)

    def forward(self, context: Tensor | None) -> Any:
        """The distribution, its batch shape that of the context."""
        space = self.space
        loc, raw = self.trunk(context).chunk(2, -1)
        shape = loc.shape[:-1] + space.shape
        loc = (space.loc + space.scale * loc).reshape(shape)
        scale = (space.scale * positive(raw)).reshape(shape)
        base = dist.Normal(loc, scale).to_event(len(space.shape))
        if space.transform is None:
            return base
        return dist.TransformedDistribution(base, [space.transform])


class FullHead(nn.Module):
    """``Normal(loc, L L')`` in unconstrained space, L a lower triangle.

    Args:
        context: Size of the context; zero for free parameters.
        event_shape: Shape of one value.
        support: Its constraint.
        hidden: Width of the hidden layer, see :class:`Trunk`.
        batch: Batch shape of the parameters, without a context.
    """

    def __init__(
        self,
        context: int,
        event_shape: Sequence[int],
        support: Any,
        *,
        hidden: int = 0,
        batch: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.space = Space(event_shape, support)
        size = self.space.size
        outputs = size + size * (size + 1) // 2
        self.trunk = Trunk(context, outputs, hidden=hidden, batch=batch)

    def forward(self, context: Tensor | None) -> Any:
        """The distribution, its batch shape that of the context."""
        space, n = self.space, self.space.size
        loc, diagonal, below = self.trunk(context).split([n, n, n * (n - 1) // 2], -1)
        rows, columns = torch.tril_indices(n, n, offset=-1, device=loc.device)
        tril = loc.new_zeros((*loc.shape[:-1], n, n))
        tril[..., rows, columns] = below / math.sqrt(n)
        tril = tril + torch.diag_embed(positive(diagonal))
        base = dist.MultivariateNormal(
            space.loc + space.scale * loc, scale_tril=space.scale.unsqueeze(-1) * tril
        )
        return space.place(base)


class LowRankHead(nn.Module):
    """``Normal(loc, F F' + diag(scale^2))`` in unconstrained space, F of a low rank.

    Args:
        context: Size of the context; zero for free parameters.
        event_shape: Shape of one value.
        support: Its constraint.
        rank: Number of columns of F.
        hidden: Width of the hidden layer, see :class:`Trunk`.
        batch: Batch shape of the parameters, without a context.
    """

    def __init__(
        self,
        context: int,
        event_shape: Sequence[int],
        support: Any,
        *,
        rank: int = 4,
        hidden: int = 0,
        batch: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.space = Space(event_shape, support)
        self.rank = min(rank, self.space.size)
        outputs = self.space.size * (2 + self.rank)
        self.trunk = Trunk(context, outputs, hidden=hidden, batch=batch)

    def forward(self, context: Tensor | None) -> Any:
        """The distribution, its batch shape that of the context."""
        space, n, rank = self.space, self.space.size, self.rank
        loc, raw, factor = self.trunk(context).split([n, n, n * rank], -1)
        factor = factor.reshape(*factor.shape[:-1], n, rank) / math.sqrt(n * rank)
        base = dist.LowRankMultivariateNormal(
            space.loc + space.scale * loc,
            space.scale.unsqueeze(-1) * factor,
            (space.scale * positive(raw)).square(),
        )
        return space.place(base)


class FlowHead(nn.Module):
    """Neural spline flow in unconstrained space: ``u = loc + scale * spline(noise)``.

    Splines are monotonic rational-quadratic (Durkan et al. 2019, Neural spline flows), coupled so
    that draws and densities cost the same; ``loc`` and ``scale`` are those of a diagonal head.

    Args:
        context: Size of the context; zero for free parameters.
        event_shape: Shape of one value.
        support: Its constraint.
        hidden: Width of the hidden layer, see :class:`Trunk`.
        transforms: Number of splines.
        bins: Number of pieces of a spline.
        width: Width of the network that gives a spline's pieces.
    """

    def __init__(
        self,
        context: int,
        event_shape: Sequence[int],
        support: Any,
        *,
        hidden: int = 0,
        transforms: int = 3,
        bins: int = 8,
        width: int = 64,
    ) -> None:
        super().__init__()
        from zuko.flows.autoregressive import MaskedAutoregressiveTransform
        from zuko.transforms import MonotonicRQSTransform

        self.space = Space(event_shape, support)
        size = self.space.size
        self.trunk = Trunk(context, 2 * size, hidden=hidden)
        self.splines = nn.ModuleList(
            MaskedAutoregressiveTransform(
                size,
                context,
                passes=2,
                order=torch.arange(size) if index % 2 == 0 else torch.arange(size).flip(0),
                univariate=MonotonicRQSTransform,
                shapes=[(bins,), (bins,), (bins - 1,)],
                hidden_features=(width,),
            )
            for index in range(transforms)
        )

    def forward(self, context: Tensor | None) -> Any:
        """The distribution, its batch shape that of the context."""
        loc, raw = self.trunk(context).chunk(2, -1)
        noise = dist.Normal(torch.zeros_like(loc), torch.ones_like(raw)).to_event(1)
        loc = self.space.loc + self.space.scale * loc
        scale = self.space.scale * positive(raw)
        steps = [spline(context) for spline in self.splines]
        affine = bijections.AffineTransform(loc, scale, event_dim=1)
        return self.space.place(dist.TransformedDistribution(noise, [*steps, affine]))


class CategoricalHead(nn.Module):
    """A category, as its number or as a one-hot vector: its logits are the context's.

    Args:
        context: Size of the context; zero for free parameters.
        event_shape: Shape of one value.
        categories: Number of values C.
        one_hot: Whether the last dimension of the event is one-hot.
        hidden: Width of the hidden layer, see :class:`Trunk`.
        batch: Batch shape of the parameters, without a context.
    """

    log_prior: Tensor

    def __init__(
        self,
        context: int,
        event_shape: Sequence[int],
        categories: int,
        *,
        one_hot: bool = False,
        hidden: int = 0,
        batch: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.event_shape, self.one_hot, self.categories = tuple(event_shape), one_hot, categories
        self.shape = self.event_shape if one_hot else (*self.event_shape, categories)
        self.size = math.prod(self.shape)
        self.register_buffer("log_prior", torch.zeros(self.size))
        self.trunk = Trunk(context, self.size, hidden=hidden, batch=batch)

    def fit(self, draws: Tensor) -> None:
        """Begin at the frequencies of draws ``(S, *event_shape)``."""
        share = (self.features(draws).sum(0) + 0.5) / (len(draws) + 0.5 * self.categories)
        self.log_prior.copy_(share.log())

    def features(self, value: Tensor) -> Tensor:
        """Values as zeros and ones ``(*, n)``, for others to be conditioned on."""
        batch = value.shape[: value.dim() - len(self.event_shape)]
        if not self.one_hot:
            numbers = torch.arange(self.categories, device=value.device)
            value = value.unsqueeze(-1) == numbers
        return value.to(self.log_prior.dtype).reshape(*batch, self.size)

    def forward(self, context: Tensor | None) -> Any:
        """The distribution, its batch shape that of the context."""
        logits = self.trunk(context) + self.log_prior
        logits = logits.reshape(*logits.shape[:-1], *self.shape)
        if self.one_hot:
            return dist.OneHotCategorical(logits=logits).to_event(len(self.event_shape) - 1)
        return dist.Categorical(logits=logits).to_event(len(self.event_shape))


class BernoulliHead(nn.Module):
    """Independent zeros and ones: their logits are the context's.

    Args:
        context: Size of the context; zero for free parameters.
        event_shape: Shape of one value.
        hidden: Width of the hidden layer, see :class:`Trunk`.
        batch: Batch shape of the parameters, without a context.
    """

    log_prior: Tensor

    def __init__(
        self,
        context: int,
        event_shape: Sequence[int],
        *,
        hidden: int = 0,
        batch: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.size = math.prod(self.event_shape)
        self.register_buffer("log_prior", torch.zeros(self.size))
        self.trunk = Trunk(context, self.size, hidden=hidden, batch=batch)

    def fit(self, draws: Tensor) -> None:
        """Begin at the frequencies of draws ``(S, *event_shape)``."""
        share = (draws.to(self.log_prior.dtype).flatten(1).sum(0) + 0.5) / (len(draws) + 1)
        self.log_prior.copy_(torch.logit(share.reshape(self.size)))

    def features(self, value: Tensor) -> Tensor:
        """Values as -1 and 1 ``(*, n)``, for others to be conditioned on."""
        batch = value.shape[: value.dim() - len(self.event_shape)]
        return 2 * value.to(self.log_prior.dtype).reshape(*batch, self.size) - 1

    def forward(self, context: Tensor | None) -> Any:
        """The distribution, its batch shape that of the context."""
        logits = self.trunk(context) + self.log_prior
        logits = logits.reshape(*logits.shape[:-1], *self.event_shape)
        return dist.Bernoulli(logits=logits).to_event(len(self.event_shape))
