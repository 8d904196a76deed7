"""From an encoder's output to one diagonal Gaussian for each latent site."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["normal_sites", "num_outputs"]

Latents = Mapping[str, Sequence[int]]


def num_outputs(latents: Latents) -> int:
    """How many numbers an encoder gives for all sites: a mean and a scale of each dimension."""
    return sum(2 * math.prod(shape) for shape in latents.values())


def normal_sites(output: Tensor, latents: Latents) -> dict[str, Any]:
    """Site -> ``Normal(loc, scale)`` of batch shape ``(*,)``, from ``(*, num_outputs)``."""
    parts = torch.split(output, [2 * math.prod(shape) for shape in latents.values()], -1)
    found = {}
    for (name, shape), part in zip(latents.items(), parts, strict=True):
        loc, raw = part.reshape(*part.shape[:-1], 2, *shape).unbind(part.dim() - 1)
        found[name] = dist.Normal(loc, softplus(raw) + 1e-4).to_event(len(shape))
    return found
