"""Distributions over the vectors of a codebook: a discrete set of points in space.

Masses, not densities: with respect to counting the code vectors. A value is told by its nearest
code vector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pvae.networks import one_hot

__all__ = ["CodeVectors", "DependentCodes", "NearestCode", "nearest_code"]


def nearest_code(value: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code vector: ``(*, D)`` and ``(C, D)`` to ``(*)``."""
    distance = codebook.square().sum(-1) - 2 * value @ codebook.mT
    return distance.argmin(-1)


class _Codes(constraints.Constraint):
    """Rows that are code vectors, up to rounding."""

    is_discrete, event_dim = True, 2

    def __init__(self, codebook: Tensor) -> None:
        self.codebook = codebook.detach()
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Whether each row is a code vector."""
        nearest = self.codebook[nearest_code(value, self.codebook)]
        return (value - nearest).abs().amax((-1, -2)) < 1e-4

    def __repr__(self) -> str:
        return f"the {len(self.codebook)} code vectors"


class CodeVectors(TorchDistribution):  # type: ignore[misc]
    """M independent draws of a code vector, with weights of their own at each position.

    Args:
        codebook: ``(C, D)``.
        logits: ``(M, C)``.
    """

    arg_constraints = {
        "codebook": constraints.independent(constraints.real, 2),  # type: ignore[no-untyped-call]
        "logits": constraints.independent(constraints.real, 2),  # type: ignore[no-untyped-call]
    }

    def __init__(
        self,
        codebook: Tensor,
        logits: Tensor,
        batch_shape: Any = (),
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.codebook, self.logits = codebook, logits.log_softmax(-1)
        event = (logits.shape[0], codebook.shape[1])
        super().__init__(torch.Size(batch_shape), torch.Size(event), validate_args=validate_args)

    @property
    def support(self) -> Any:
        """Rows of the codebook."""
        return _Codes(self.codebook)

    def expand(self, batch_shape: Any, _instance: Any = None) -> CodeVectors:
        """The same distribution with a larger batch shape."""
        return CodeVectors(self.codebook, self.logits, batch_shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass of the code vectors nearest to ``(*, M, D)``, nats."""
        codes = nearest_code(value.detach(), self.codebook)
        table = self.logits.expand(*codes.shape, -1)
        log_mass: Tensor = table.gather(-1, codes.unsqueeze(-1)).squeeze(-1).sum(-1)
        return log_mass

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Code vectors, ``(*, M, D)``."""
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            logits = self.logits.expand(shape[:-1] + self.logits.shape[-1:])
            gumbel = -torch.empty_like(logits).exponential_().log()
            drawn: Tensor = self.codebook[(logits + gumbel).argmax(-1)]
        return drawn


class DependentCodes(CodeVectors):
    """M code vectors, each with weights that depend on those before it.

    Scoring takes one pass of the network, drawing M.

    Args:
        codebook: ``(C, D)``.
        conditionals: Codes as indicators ``(*, M, C)`` to logits ``(*, M, C)``, those of position m
            by positions before m alone.
        num_positions: M.
    """

    def __init__(
        self,
        codebook: Tensor,
        conditionals: Callable[[Tensor], Tensor],
        num_positions: int,
        batch_shape: Any = (),
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.conditionals = conditionals
        like = codebook.new_zeros(num_positions, len(codebook))
        super().__init__(codebook, like, batch_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> DependentCodes:
        """The same distribution with a larger batch shape."""
        positions = self.event_shape[0]
        return DependentCodes(
            self.codebook, self.conditionals, positions, batch_shape, validate_args=False
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass of the code vectors nearest to ``(*, M, D)``, nats."""
        codes = nearest_code(value.detach(), self.codebook)
        known = one_hot(codes, len(self.codebook), self.codebook.dtype)
        log_mass: Tensor = (self.conditionals(known).log_softmax(-1) * known).sum((-1, -2))
        return log_mass

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Code vectors, ``(*, M, D)``, one position after another."""
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            known = self.codebook.new_zeros(*shape[:-1], len(self.codebook))
            for position in range(shape[-2]):
                logits = self.conditionals(known)[..., position, :]
                gumbel = -torch.empty_like(logits).exponential_().log()
                code = (logits + gumbel).argmax(-1)
                known[..., position, :] = one_hot(code, len(self.codebook), known.dtype)
            drawn: Tensor = known @ self.codebook
        return drawn


class NearestCode(TorchDistribution):  # type: ignore[misc]
    """All mass on the code vectors nearest to M features; the derivative goes to the features.

    Args:
        features: ``(*, M, D)``.
        codebook: ``(C, D)``.
    """

    arg_constraints = {"features": constraints.independent(constraints.real, 2)}  # type: ignore[no-untyped-call]
    has_rsample = True

    def __init__(
        self, features: Tensor, codebook: Tensor, *, validate_args: bool | None = None
    ) -> None:
        self.features, self.codebook = features, codebook
        super().__init__(features.shape[:-2], features.shape[-2:], validate_args=validate_args)

    @property
    def support(self) -> Any:
        """Rows of the codebook."""
        return _Codes(self.codebook)

    def expand(self, batch_shape: Any, _instance: Any = None) -> NearestCode:
        """The same distribution with a larger batch shape."""
        new = cast(NearestCode, self._get_checked_instance(NearestCode, _instance))
        new.codebook = self.codebook
        new.features = self.features.expand(torch.Size(batch_shape) + self.event_shape)
        super(NearestCode, new).__init__(
            torch.Size(batch_shape), self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero at the nearest code vectors, minus infinity elsewhere."""
        own = nearest_code(self.features.detach(), self.codebook)
        same = (nearest_code(value.detach(), self.codebook) == own).all(-1)
        zero = (0 * self.features).sum((-1, -2))
        return torch.where(same, zero, zero - torch.inf)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """The code vectors, straight-through: the features' derivative is the identity."""
        features = self.features.expand(self._extended_shape(sample_shape))
        code = self.codebook.detach()[nearest_code(features.detach(), self.codebook)]
        return code + (features - features.detach())
