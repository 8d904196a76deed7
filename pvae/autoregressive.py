"""A distribution over rows of numbers that is given by its conditionals, drawn one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

__all__ = ["Autoregressive"]


class Autoregressive(TorchDistribution):  # type: ignore[misc]
    r"""``p(x) = prod_i p(x_i | x_1 ... x_(i-1))``, all factors from one pass of a masked network.

    Scoring takes one pass, drawing one for each group of features: that is what makes it a
    distribution, which any handler may draw from or score, rather than a program that reads its
    own data.

    Args:
        conditionals: Takes rows ``(*, D)`` and gives a distribution over rows, batch shape ``(*)``
            and event shape ``(D,)``, whose feature i depends on features before i alone.
        order: Groups of features in the order in which they are drawn; together all D.
        batch_shape: Shape of the batch.
        support: Of a row, as ``torch.distributions`` states it.
        like: Any tensor of the type and device of a draw.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(
        self,
        conditionals: Callable[[Tensor], Any],
        order: Sequence[Sequence[int]],
        batch_shape: Sequence[int],
        *,
        support: Any,
        like: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        self.conditionals, self.order = conditionals, order
        self._row_support, self.like = support, like
        size = sum(map(len, order))
        super().__init__(torch.Size(batch_shape), torch.Size((size,)), validate_args=validate_args)

    @property
    def support(self) -> Any:
        """The support of a row."""
        return self._row_support

    def expand(self, batch_shape: Any, _instance: Any = None) -> Autoregressive:
        """The same distribution with a larger batch shape."""
        return Autoregressive(
            self.conditionals,
            self.order,
            batch_shape,
            support=self._row_support,
            like=self.like,
            validate_args=False,
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of rows ``(*, D)``, nats."""
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)  # type: ignore[no-untyped-call]
        scored: Tensor = self.conditionals(value.expand(*shape, -1)).log_prob(value)
        return scored

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Rows, one group of features after another: as many passes as there are groups."""
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        with torch.no_grad():
            x = self.like.new_zeros(shape)
            for group in self.order:
                index = torch.as_tensor(group, device=x.device)
                drawn = self.conditionals(x).sample()
                x = x.index_copy(-1, index, drawn.index_select(-1, index))
        return x
