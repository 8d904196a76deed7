"""What a head is given: features of data and of other sites, brought to one batch shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["aligned", "flattened", "joined", "summarised"]


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


def joined(*parts: Tensor, depth: int) -> Tensor:
    """Features side by side, their batch shapes broadcast.

    Leading batch dimensions of size one beyond the site's own ``depth`` are left to its plates.
    """
    shapes = [part.shape[:-1] for part in parts]
    batch = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    wide = [part.expand(*batch, part.shape[-1]) for part in parts]
    context = wide[0] if len(wide) == 1 else torch.cat(wide, -1)
    while context.dim() - 1 > depth and context.shape[0] == 1:
        context = context.squeeze(0)
    return context
