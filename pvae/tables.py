"""Rows of columns of several kinds, some of whose cells are missing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pvae.errors import OptionError, did_you_mean

__all__ = ["KINDS", "MixedColumns", "num_categories"]

KINDS = ("real", "positive", "binary", "categorical", "count")


def num_categories(columns: Sequence[str]) -> list[int]:
    """How many categories each column has; 0 where it is not categorical.

    Args:
        columns: Kind of each column: real, positive, binary, count or ``categorical:C``.

    Raises:
        OptionError: a kind that does not exist, or a categorical one without C.
    """
    found = []
    for column in columns:
        kind, _, number = column.partition(":")
        if kind not in KINDS:
            raise OptionError(
                f"no kind of column is called {column!r}: {did_you_mean(kind, KINDS)}"
            )
        if (kind == "categorical") != bool(re.fullmatch(r"[1-9]\d*", number)):
            raise OptionError(
                f"column kind {column!r} is not understood: write categorical with its number of "
                "categories, as categorical:3, and the others without one"
            )
        found.append(int(number or 0))
    return found


class _Cells(constraints.Constraint):
    """Every cell in the support of its column, or missing."""

    def __init__(self, groups: Mapping[str, tuple[Tensor, Any]]) -> None:
        self.groups = groups
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Rows ``(*, D)`` -> ``(*, D)``."""
        inside = value.isnan()
        for index, column in self.groups.values():
            cells = value[..., index]
            fitting = column.support.check(cells) | cells.isnan()
            inside = inside.index_copy(-1, index, fitting)
        return inside

    def __repr__(self) -> str:
        return "each column's own support"


class MixedColumns(TorchDistribution):  # type: ignore[misc]
    r"""Independent columns, each of its own family; a cell that is NaN is missing.

    ``log p(x) = sum over observed cells d of log p_d(x_d)``: the missing ones are integrated out,
    which for independent columns means left out. Gradients are finite whatever is missing.

    Args:
        groups: Kind -> (places of its columns, their distribution of batch shape ``(*, n)``).
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(
        self, groups: Mapping[str, tuple[Tensor, Any]], *, validate_args: bool | None = None
    ) -> None:
        self.groups = dict(groups)
        shapes = [column.batch_shape[:-1] for _, column in self.groups.values()]
        width = sum(len(index) for index, _ in self.groups.values())
        batch = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
        super().__init__(batch, torch.Size([width]), validate_args=validate_args)

    @property
    def support(self) -> Any:
        """Each column's own support; NaN is in all of them."""
        return constraints.independent(_Cells(self.groups), 1)  # type: ignore[no-untyped-call]

    @property
    def is_nominal(self) -> Tensor:
        """``(D,)``: columns whose values are names (binary, categorical), so that means are not."""
        index = next(iter(self.groups.values()))[0]
        nominal = torch.zeros(self.event_shape, dtype=torch.bool, device=index.device)
        for kind in self.groups.keys() & {"binary", "categorical"}:
            nominal[self.groups[kind][0]] = True
        return nominal

    def expand(self, batch_shape: Any, _instance: Any = None) -> MixedColumns:
        """The same distribution with a larger batch shape."""
        batch = torch.Size(batch_shape)
        groups = {
            kind: (index, column.expand(batch + column.batch_shape[-1:]))
            for kind, (index, column) in self.groups.items()
        }
        return MixedColumns(groups, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of the observed cells of ``(*, D)``, nats: ``(*,)``."""
        if self._validate_args:
            self._validate_sample(value)
        total: Any = 0.0
        for kind, (index, column) in self.groups.items():
            cells = value[..., index]
            missing = cells.isnan()
            # A NaN must not reach a density: 0 * NaN is NaN in its gradient.
            filled = cells.masked_fill(missing, 1.0 if kind == "positive" else 0.0)
            total = total + column.log_prob(filled).masked_fill(missing, 0.0).sum(-1)
        result: Tensor = total
        return result

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Whole rows ``(*, D)``, no cell missing."""
        with torch.no_grad():
            return self._joined(lambda column: column.sample(sample_shape))

    @property
    def mean(self) -> Tensor:
        """Each column's mean; of a binary one its probability, of a categorical one its mode."""
        return self._joined(
            lambda column: column.logits.argmax(-1) if hasattr(column, "_num_events")
            else column.mean
        )  # fmt: skip

    def _joined(self, values: Any) -> Tensor:
        columns = {kind: values(column) for kind, (_, column) in self.groups.items()}
        floats = [cells for cells in columns.values() if cells.is_floating_point()]
        dtype = floats[0].dtype if floats else torch.get_default_dtype()
        order = torch.cat([index for index, _ in self.groups.values()]).argsort()
        return torch.cat([cells.to(dtype) for cells in columns.values()], -1)[..., order]
