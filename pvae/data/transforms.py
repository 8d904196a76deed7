"""Invertible maps from the original scale of the data to the model's, with exact Jacobians.

Each maps ``(N, D)`` to ``(N, D)``, entry by entry. The precision is that of the argument.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from pvae.errors import DataError

__all__ = ["Chain", "Logit", "Scale", "Standardize", "Transform"]


class Transform(ABC):
    """An invertible map ``y = T(x)`` of ``(N, D)``."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """``y = T(x)``: original scale to the model's scale."""

    @abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """``x = T^-1(y)``: the model's scale to the original scale."""

    @abstractmethod
    def log_abs_det_jacobian(self, x: Tensor) -> Tensor:
        """``log |det dT/dx|`` at ``x`` on the original scale: ``(N, D) -> (N,)``, nats."""

    def to(self, device: torch.device | str) -> Transform:
        """The same map with its constants on ``device``."""
        return self


@dataclass(frozen=True)
class Scale(Transform):
    """``y = x / levels``: dequantised grey levels into the unit interval."""

    levels: int

    @override
    def __call__(self, x: Tensor) -> Tensor:
        return x / self.levels

    @override
    def inverse(self, y: Tensor) -> Tensor:
        return y * self.levels

    @override
    def log_abs_det_jacobian(self, x: Tensor) -> Tensor:
        return x.new_full(x.shape[:1], -x.shape[1] * math.log(self.levels))


@dataclass(frozen=True)
class Logit(Transform):
    """``y = logit(a + (1 - 2a) x)`` of the unit interval, squeezed by ``a`` to stay finite.

    The default ``a`` is the one used for MNIST by Papamakarios, Pavlakou & Murray (2017), Masked
    autoregressive flow for density estimation.
    """

    squeeze: float = 1e-6

    @override
    def __call__(self, x: Tensor) -> Tensor:
        return self._squeezed(x).log() - self._squeezed(1 - x).log()

    @override
    def inverse(self, y: Tensor) -> Tensor:
        return (y.sigmoid() - self.squeeze) / (1 - 2 * self.squeeze)

    @override
    def log_abs_det_jacobian(self, x: Tensor) -> Tensor:
        log_product = self._squeezed(x).log() + self._squeezed(1 - x).log()
        return (math.log1p(-2 * self.squeeze) - log_product).sum(1)

    def _squeezed(self, x: Tensor) -> Tensor:
        return self.squeeze + (1 - 2 * self.squeeze) * x


@dataclass(frozen=True, eq=False)
class Standardize(Transform):
    """``y = (x - mean) / std``, feature by feature, both ``(D,)`` float64."""

    mean: Tensor
    std: Tensor

    @classmethod
    def fit(cls, x: Tensor) -> Standardize:
        """Mean and population standard deviation of ``(N, D)``; a constant feature gets std 1.

        Raises:
            DataError: A feature is too large to square.
        """
        x = x.double()
        std, mean = torch.std_mean(x, 0, correction=0)
        return cls.of_moments(mean, std, x.amin(0), x.amax(0))

    @classmethod
    def of_moments(cls, mean: Tensor, std: Tensor, low: Tensor, high: Tensor) -> Standardize:
        """From each feature's mean, population standard deviation and range, ``(D,)`` float64.

        Raises:
            DataError: A feature is too large to square.
        """
        # Rounding gives a constant feature such as 0.1 a tiny std, so that std == 0 would miss it.
        constant = low == high
        std = std.masked_fill(constant, 1.0)
        bad = ~(std.isfinite() & (std > 0))
        if bool(bad.any()):
            feature = int(bad.nonzero()[0])
            raise DataError(
                f"feature {feature} has a standard deviation of {std[feature].item()}, expected a "
                "positive finite one: rescale this feature"
            )
        return cls(mean.where(~constant, low), std)

    @override
    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean.to(x)) / self.std.to(x)

    @override
    def inverse(self, y: Tensor) -> Tensor:
        return y * self.std.to(y) + self.mean.to(y)

    @override
    def log_abs_det_jacobian(self, x: Tensor) -> Tensor:
        return -self.std.log().sum().to(x).expand(x.shape[0])

    @override
    def to(self, device: torch.device | str) -> Standardize:
        return Standardize(self.mean.to(device), self.std.to(device))

    def __repr__(self) -> str:
        return f"Standardize({self.mean.numel()} features)"


@dataclass(frozen=True, eq=False)
class Chain(Transform):
    """``T = T_n o ... o T_1``; the identity without parts."""

    parts: tuple[Transform, ...] = ()

    @override
    def __call__(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x

    @override
    def inverse(self, y: Tensor) -> Tensor:
        for part in reversed(self.parts):
            y = part.inverse(y)
        return y

    @override
    def log_abs_det_jacobian(self, x: Tensor) -> Tensor:
        total = x.new_zeros(x.shape[0])
        for part in self.parts:
            total = total + part.log_abs_det_jacobian(x)
            x = part(x)
        return total

    def __add__(self, last: Transform) -> Chain:
        return Chain((*self.parts, last))

    @override
    def to(self, device: torch.device | str) -> Chain:
        return Chain(tuple(part.to(device) for part in self.parts))

    def __repr__(self) -> str:
        return " -> ".join(map(repr, self.parts)) or "identity"
