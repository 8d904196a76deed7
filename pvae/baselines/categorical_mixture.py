"""Mixture of products of categoricals by EM: the latent class model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Unpack

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pvae.baselines.density import at_least
from pvae.baselines.em import Parameters, Score, Summarize
from pvae.baselines.mixture import Options, Smoothed, random_rows, whole_numbers
from pvae.errors import DataError

__all__ = ["CategoricalMixture"]

_MIN_PROBABILITY = 1e-6  # so that no level is impossible


class CategoricalMixture(Smoothed):
    r"""Mixture of independent categories (latent classes): ``sum_k pi_k prod_d p_kd(x_d)``.

    Rows hold whole numbers from 0 to ``num_levels - 1``. The log prior is
    ``s sum_kdl m_dl log p_kdl``, with m the levels' global shares and s ``smoothing``: the M-step
    adds s pseudo-rows with these shares. Components start at random rows mixed half and half with
    the global shares.

    Lazarsfeld & Henry (1968). Latent structure analysis.

    Args:
        n_components: K, or several to choose from by the mean log density of ``valid`` or BIC.
        num_levels: L; the largest number in the training rows plus one if ``None``.
        smoothing: s, in pseudo-rows per component.
        **options: Those of every :class:`pvae.baselines.mixture.Mixture`.

    Attributes:
        weights: pi, ``(K,)`` float64.
        probabilities: p, ``(K, D, L)`` float64.

    Raises:
        OptionError: An option out of its range.
    """

    name = "categorical-mixture"

    probabilities: Tensor
    _shares: Tensor
    _levels: int

    def __init__(
        self,
        n_components: int | Sequence[int] = 10,
        *,
        num_levels: int | None = None,
        smoothing: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(n_components, smoothing=smoothing, **options)
        self.num_levels = None if num_levels is None else at_least("num_levels", num_levels, 2)

    @property
    def num_parameters(self) -> int:
        """``K D (L - 1)`` probabilities and ``K - 1`` weights."""
        width = self._fitted_shape()[1]
        size: int = self.chosen
        return size * width * (self._levels - 1) + size - 1

    def _check_support(self, x: Tensor, role: str) -> None:
        whole_numbers(x, role, "CategoricalMixture")
        if self.num_levels is not None:
            _check_levels(x, self.num_levels)

    def _log_density(self, x: Tensor) -> Tensor:
        _check_levels(x, self._levels)
        return super()._log_density(x)

    def prepare(self, x: Tensor) -> None:
        """Find each feature's shares of the levels."""
        self._levels = levels = self.num_levels or max(2, int(x.max()) + 1)
        parts = [one_hot(rows.long(), levels).sum(0) for rows in torch.split(x, 1024)]
        self._shares = torch.stack(parts).sum(0).double() / len(x)

    def initial(
        self, x: Tensor, size: int, generator: torch.Generator
    ) -> tuple[Tensor, Parameters]:
        """Random rows mixed half and half with the global shares, with equal weights."""
        probabilities = self._near(random_rows(x, size, generator))
        return probabilities.new_full((size,), 1 / size), {"probabilities": probabilities}

    def _near(self, rows: Tensor) -> Tensor:
        mixed = 0.5 * one_hot(rows.long(), self._levels).double() + 0.5 * self._shares
        return _floored(mixed)

    def score(self, parameters: Parameters, dtype: torch.dtype) -> Score:
        """One product of the rows' indicators with the log probabilities."""
        size, width, levels = parameters["probabilities"].shape
        table = parameters["probabilities"].log().reshape(size, width * levels).T.to(dtype)

        def score(x: Tensor) -> tuple[Tensor, Summarize]:
            indicators = one_hot(x.long(), levels).flatten(1).to(dtype)
            return indicators @ table, lambda responsibilities: (
                (responsibilities.T @ indicators).unflatten(1, (width, levels)),
            )

        return score

    def maximise(self, counts: Tensor, statistics: tuple[Tensor, ...]) -> Parameters:
        """The shares among the expected rows and the pseudo-rows."""
        (levels,) = statistics
        return {"probabilities": _floored(self.pulled(counts, levels, self._shares))}

    def log_prior(self, parameters: Parameters) -> Tensor:
        """``s sum_kdl m_dl log p_kdl``."""
        return self.smoothing * (self._shares * parameters["probabilities"].log()).sum()

    def slack(self, before: Parameters, after: Parameters, counts: Tensor) -> float:
        """What the floor of the probabilities may cost: L floors for every expected entry."""
        del after
        _, width, levels = before["probabilities"].shape
        return levels * _MIN_PROBABILITY * width * float((counts + self.smoothing).sum())

    def seeded(self, parameters: Parameters, which: Tensor, rows: Tensor) -> Parameters:
        """As at the start, at the rows."""
        near = self._near(rows)
        return {"probabilities": parameters["probabilities"].index_copy(0, which, near)}

    def block_width(self, size: int, width: int) -> int:
        """A row's indicators."""
        return max(size, width * self._levels)

    def draw(self, parameters: Parameters, which: Tensor, generator: torch.Generator) -> Tensor:
        """Independent levels."""
        probabilities = parameters["probabilities"][which]
        n, width, levels = probabilities.shape
        drawn = torch.multinomial(probabilities.reshape(-1, levels), 1, generator=generator)
        return drawn.reshape(n, width).double()

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        super()._restore(state)
        self._levels = self.probabilities.shape[2]


def _check_levels(x: Tensor, levels: int) -> None:
    unknown = x >= levels
    if unknown.any():
        row, feature = unknown.nonzero()[0].tolist()
        raise DataError(
            f"CategoricalMixture knows levels 0 to {levels - 1}, got {x[row, feature].item():g} in "
            f"row {row}, feature {feature}: fit it with a larger num_levels"
        )


def _floored(shares: Tensor) -> Tensor:
    floored = shares.clamp(min=_MIN_PROBABILITY)
    return floored / floored.sum(-1, keepdim=True)
