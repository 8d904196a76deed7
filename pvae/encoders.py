"""Encoders by the shape of the data: vectors, images, sequences and sets to features.

Each takes a tensor ``(B, *shape)`` as it is in the batch, standardises it and gives features, of
shape ``(B, F)`` for a vector or an image, ``(B, T, F)`` for a sequence (a row for each step, each
of which sees all the others) and ``(B, N, ..., F)`` for a set (a row for each element).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pvae.networks import MLP, activation_module

__all__ = ["ImageEncoder", "Scaled", "SequenceEncoder", "SetEncoder", "VectorEncoder"]


class Scaled(nn.Module):
    """``(x - mean) / scale``, feature by feature, of numbers, counts or categories.

    Args:
        shape: Shape of one datum.
        counts: Take ``log(1 + x)`` first.
        categories: Values are category numbers below this one, to be made one-hot: a new last axis.
        missing: Values may be NaN: they become zero, and a new last axis says which they were.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        *,
        counts: bool = False,
        categories: int = 0,
        missing: bool = False,
    ) -> None:
        super().__init__()
        self.counts, self.categories, self.missing = counts, categories, missing
        self.register_buffer("mean", torch.zeros(tuple(shape)))
        self.register_buffer("scale", torch.ones(tuple(shape)))
        extra = categories or (2 if missing else 0)
        self.shape = (*shape, extra) if extra else tuple(shape)

    def fit(self, x: Tensor, *, pooled: Sequence[int] = (0,)) -> None:
        """Take mean and scale from data ``(B, *shape)``, over the axes in ``pooled``."""
        if self.categories:
            return
        x = self._numbers(x)
        known = ~x.isnan()
        count = known.sum(tuple(pooled), keepdim=True).clamp(min=1)
        zeroed = x.where(known, torch.zeros_like(x))
        mean = zeroed.sum(tuple(pooled), keepdim=True) / count
        gap = (zeroed - mean).where(known, torch.zeros_like(x))
        variance = gap.square().sum(tuple(pooled), keepdim=True) / count
        self.mean.copy_(mean[0].expand(self.mean.shape))
        scale = variance.sqrt()[0].expand(self.scale.shape)
        self.scale.copy_(scale.where(scale > 0, torch.ones_like(scale)))

    def set(self, mean: Tensor, scale: Tensor) -> None:
        """Take mean and scale of the data as they are, each ``(D,)`` or of a datum's shape."""
        if self.categories:
            return
        mean, scale = mean.reshape(self.mean.shape), scale.reshape(self.scale.shape)
        if self.counts:
            mean, scale = torch.log1p(mean), scale / (1 + mean)
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    def _numbers(self, x: Tensor) -> Tensor:
        x = x.to(self.mean.dtype)
        return torch.log1p(x) if self.counts else x

    def forward(self, x: Tensor) -> Tensor:
        """``(B, *shape)`` to ``(B, *self.shape)``."""
        if self.categories:
            numbers = torch.arange(self.categories, device=x.device)
            return (x.unsqueeze(-1) == numbers).to(self.mean.dtype)
        x = (self._numbers(x) - self.mean) / self.scale
        if self.missing:
            absent = x.isnan()
            x = torch.stack([x.masked_fill(absent, 0.0), absent.to(x.dtype)], -1)
        return x


class VectorEncoder(nn.Module):
    """A multilayer perceptron: ``(B, *shape) -> (B, F)``.

    Args:
        scaled: Standardises the data.
        hidden: Width of each layer, the last of which is F; empty for the data themselves.
        activation: Non-linearity after each.
    """

    def __init__(
        self, scaled: Scaled, *, hidden: Sequence[int] = (200, 200), activation: str = "silu"
    ) -> None:
        super().__init__()
        self.scaled = scaled
        size = math.prod(scaled.shape)
        self.size = hidden[-1] if hidden else size
        self.network: nn.Module = nn.Identity()
        if hidden:
            body = MLP(size, hidden[-1], hidden[:-1], activation_name=activation)
            self.network = nn.Sequential(body, activation_module(activation))

    def forward(self, x: Tensor) -> Tensor:
        """The features."""
        features: Tensor = self.network(self.scaled(x).reshape(len(x), -1))
        return features


class ImageEncoder(nn.Module):
    """Convolutions that halve the picture twice: ``(B, C, H, W) -> (B, F)``.

    Args:
        scaled: Standardises the data.
        image_shape: ``(C, H, W)`` or ``(H, W)``; the data may come flat.
        channels: Channels of the three convolutions.
        width: F.
        activation: Non-linearity after each layer.
    """

    def __init__(
        self,
        scaled: Scaled,
        image_shape: Sequence[int],
        *,
        channels: Sequence[int] = (32, 64, 64),
        width: int = 200,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.scaled = scaled
        self.image_shape = (1, *image_shape) if len(image_shape) == 2 else tuple(image_shape)
        self.size = width
        extra = scaled.shape[-1] if scaled.categories or scaled.missing else 1
        depth, height, breadth = self.image_shape
        layers: list[nn.Module] = []
        inputs = depth * extra
        for index, outputs in enumerate(channels):
            stride = 1 if index == 0 else 2
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1),
                activation_module(activation),
            ]
            inputs = outputs
            height, breadth = math.ceil(height / stride), math.ceil(breadth / stride)
        flat = inputs * height * breadth
        self.network = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(flat, width), activation_module(activation)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The features."""
        x = self.scaled(x)
        depth, height, breadth = self.image_shape
        x = x.reshape(len(x), depth, height, breadth, -1).movedim(-1, 2).flatten(1, 2)
        features: Tensor = self.network(x)
        return features


class SequenceEncoder(nn.Module):
    """Dilated convolutions until each step sees all others: ``(B, T, *shape) -> (B, T, F)``.

    Args:
        scaled: Standardises the data.
        steps: T on the example, which sets the number of layers; another T may come later.
        width: F.
        activation: Non-linearity of each layer.
    """

    def __init__(
        self, scaled: Scaled, steps: int, *, width: int = 64, activation: str = "silu"
    ) -> None:
        super().__init__()
        self.scaled = scaled
        self.size = width
        self.first = nn.Linear(math.prod(scaled.shape[1:]), width)
        self.activation = activation_module(activation)
        self.layers = nn.ModuleList(
            nn.Conv1d(width, width, 3, padding=2**index, dilation=2**index)
            for index in range(max(1, math.ceil(math.log2(max(steps, 2)))))
        )

    def forward(self, x: Tensor) -> Tensor:
        """The features of each step."""
        x = self.scaled(x)
        h = self.first(x.reshape(*x.shape[:2], -1)).mT
        for layer in self.layers:
            h = h + layer(self.activation(h))
        features: Tensor = self.activation(h).mT
        return features


class SetEncoder(nn.Module):
    """One perceptron for each element: ``(B, N, ..., *shape) -> (B, N, ..., F)``.

    What is outside the elements' plate sees their mean. Zaheer et al. (2017), Deep sets.

    Args:
        scaled: Standardises the data.
        axes: Number of axes that elements are counted along.
        hidden: Width of each layer, the last of which is F.
        activation: Non-linearity after each.
    """

    def __init__(
        self,
        scaled: Scaled,
        axes: int = 1,
        *,
        hidden: Sequence[int] = (64, 64),
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.scaled, self.axes = scaled, axes
        size = math.prod(scaled.shape[axes:])
        self.size = hidden[-1] if hidden else size
        self.network: nn.Module = nn.Identity()
        if hidden:
            body = MLP(size, hidden[-1], hidden[:-1], activation_name=activation)
            self.network = nn.Sequential(body, activation_module(activation))

    def forward(self, x: Tensor) -> Tensor:
        """The features of each element."""
        x = self.scaled(x).unsqueeze(-1)
        features: Tensor = self.network(x.flatten(1 + self.axes))
        return features
