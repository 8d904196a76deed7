"""From a context to a distribution on a support: the last layer of an amortised guide.

A continuous head draws ``u`` in unconstrained space and pushes it through the bijection onto the
support. Its numbers are offsets from the prior's own location and scale there, so that a head whose
output is zero is the prior, as well as its family can be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions import transforms as bijections
from torch.nn.functional import softplus

__all__ = [
    "CategoricalHead",
    "DiagonalHead",
    "BernoulliHead",
    "FlowHead",
    "FullHead",
    "LowRankHead",
    "LowerTriangular",
    "aligned",
    "flattened",
    "joined",
    "summarised",
    "Space",
    "Trunk",
    "bijection",
    "positive",
]


def positive(raw: Tensor) -> Tensor:
    """Free numbers to positive ones, zero to one: ``softplus(raw + log(e - 1))``."""
    return softplus(raw + math.log(math.e - 1)) + 1e-4


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


class LowerTriangular(bijections.Transform):
    """``n (n + 1) / 2`` free numbers to a lower triangle with a positive diagonal, one-to-one.

    Args:
        size: n.
    """

    domain = constraints.real_vector
    codomain = constraints.lower_cholesky
    bijective = True

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LowerTriangular) and other.size == self.size

    __hash__ = None  # type: ignore[assignment]

    def _call(self, x: Tensor) -> Tensor:
        n = self.size
        rows, columns = torch.tril_indices(n, n, offset=-1, device=x.device)
        tril = x.new_zeros((*x.shape[:-1], n, n))
        tril[..., rows, columns] = x[..., n:]
        return tril + torch.diag_embed(x[..., :n].exp())

    def _inverse(self, y: Tensor) -> Tensor:
        rows, columns = torch.tril_indices(self.size, self.size, offset=-1, device=y.device)
        diagonal = y.diagonal(dim1=-2, dim2=-1).log()
        return torch.cat([diagonal, y[..., rows, columns]], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum of the diagonal's logarithms: ``(*, n (n + 1) / 2) -> (*,)``."""
        return x[..., : self.size].sum(-1)

    def forward_shape(self, shape: Any) -> Any:
        """The shape of the output."""
        return torch.Size((*shape[:-1], self.size, self.size))

    def inverse_shape(self, shape: Any) -> Any:
        """The shape of the input."""
        return torch.Size((*shape[:-2], self.size * (self.size + 1) // 2))


def bijection(support: Any, event_shape: Sequence[int]) -> Any:
    """From unconstrained space onto a support; ``None`` where there is nothing to do.

    Raises:
        NotImplementedError: there is no such map.
    """
    unit = support
    while isinstance(unit, constraints.independent):
        unit = unit.base_constraint
    if unit is constraints.real:
        return None
    if unit is constraints.lower_cholesky:
        return LowerTriangular(event_shape[-1])
    if unit is constraints.positive_definite:
        cholesky = dist.transforms.CholeskyTransform()
        return bijections.ComposeTransform([LowerTriangular(event_shape[-1]), cholesky.inv])
    return torch.distributions.biject_to(support)


class Space(nn.Module):
    """The unconstrained space of a site, and the way from there onto its support.

    Args:
        event_shape: Shape of one value.
        support: Its constraint.

    Attributes:
        loc: Location of the prior in this space, ``(n,)``.
        scale: Its scale, kept within [0.05, 20].
        spread: Its scale, by which values are divided where others are conditioned on them.
    """

    loc: Tensor
    scale: Tensor
    spread: Tensor

    def __init__(self, event_shape: Sequence[int], support: Any) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.transform = bijection(support, self.event_shape)
        shape = torch.Size(self.event_shape)
        self.shape = tuple(self.transform.inverse_shape(shape) if self.transform else shape)
        self.size = math.prod(self.shape)
        self.register_buffer("loc", torch.zeros(self.size))
        self.register_buffer("scale", torch.ones(self.size))
        self.register_buffer("spread", torch.ones(self.size))

    def fit(self, draws: Tensor) -> None:
        """Set location and scale from draws ``(S, *event_shape)``, by their quantiles."""
        free = self.free(draws.to(self.loc.dtype))
        quantiles = torch.tensor([0.16, 0.5, 0.84], dtype=free.dtype, device=free.device)
        low, middle, high = torch.quantile(free.nan_to_num(), quantiles, dim=0)
        spread = (high - low) / 2
        self.loc.copy_(middle)
        self.scale.copy_(spread.clamp(0.05, 20.0))
        self.spread.copy_(spread.where(spread > 1e-6, torch.ones_like(spread)))

    def free(self, value: Tensor) -> Tensor:
        """Values ``(*, *event_shape)`` as free numbers ``(*, n)``."""
        batch = value.shape[: value.dim() - len(self.event_shape)]
        free = value if self.transform is None else self.transform.inv(value)
        return free.reshape(*batch, self.size)

    def features(self, value: Tensor) -> Tensor:
        """Values as standardised free numbers ``(*, n)``, for others to be conditioned on."""
        standard = (self.free(value) - self.loc) / self.spread
        if self.transform is None:
            return standard
        return standard.nan_to_num().clamp(-10.0, 10.0)  # a value on the edge of its support

    def place(self, base: Any) -> Any:
        """A distribution over ``(n,)`` as one over the support."""
        steps: list[Any] = []
        if self.shape != (self.size,):
            steps.append(
                bijections.ReshapeTransform(torch.Size((self.size,)), torch.Size(self.shape))
            )
        if self.transform is not None:
            steps.append(self.transform)
        return dist.TransformedDistribution(base, steps) if steps else base


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


# --- contexts ------------------------------------------------------------------------------------


def aligned(features: Tensor, dims: Sequence[int]) -> Tensor:
    """Features ``(sizes..., F)`` whose axis i becomes batch dimension ``dims[i]``."""
    order = sorted(range(len(dims)), key=lambda axis: dims[axis])
    shape = [1] * -min(dims)
    for axis in order:
        shape[dims[axis]] = features.shape[axis]
    return features.permute(*order, -1).reshape(*shape, features.shape[-1])


def summarised(features: Tensor, dims: Sequence[int]) -> Tensor:
    """The mean over batch dimensions ``dims`` of features ``(*batch, F)``, each kept as one."""
    return features.mean([dim - 1 for dim in dims], keepdim=True)


def flattened(features: Tensor, depth: int) -> Tensor:
    """Features of a global site as one vector: the last ``depth`` batch dimensions go into F."""
    batch = features.shape[:-1]
    ahead = batch[: max(len(batch) - depth, 0)]
    return features.reshape(*ahead, *(1,) * depth, -1)


def joined(*parts: Tensor) -> Tensor:
    """Features side by side, their batch shapes broadcast."""
    shapes = [part.shape[:-1] for part in parts]
    batch = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    return torch.cat([part.expand(*batch, part.shape[-1]) for part in parts], -1)
