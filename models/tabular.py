"""Tables with columns of several kinds and missing cells.

    z ~ Normal(0, I),    x_d | z ~ family_d(decoder(z)_d)

where column d is real (Student-t or Gaussian), positive (log-normal), binary (Bernoulli),
categorical or a count (negative binomial). The likelihood is over the observed cells, which is
sound where cells are missing at random. Nazábal, Olmos, Ghahramani & Valera (2020), Handling
incomplete heterogeneous data using VAEs; Mattei & Frellsen (2019), MIWAE.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pvae.count_distributions import negative_binomial
from pvae.errors import OptionError
from pvae.networks import MLP
from pvae.tables import KINDS, MixedColumns, num_categories

__all__ = ["Tabular"]


class Tabular(nn.Module):
    """Rows ``(B, D)`` in which NaN marks a missing cell, a category is its number from 0.

    Args:
        x_dim: Number of columns D.
        columns: Kind of each: real, positive, binary, count or ``categorical:C``; all real if left
            out.
        z_dim: Number of latent dimensions.
        hidden: Width of each hidden layer of the decoder.
        activation: Its non-linearity.
        robust: Student-t instead of Gaussian real columns, whose tails are learned.
        skip: Add a linear map of z to the decoder's outputs: factor analysis is then within it.
        x_mean: Mean of each column, where its family begins; of the observed cells.
        x_scale: Standard deviation of each.

    Raises:
        OptionError: a kind that does not exist, or not one for each column.
    """

    takes_missing = True
    train_defaults = {"guide": "masked"}
    allowed: Tensor
    x_mean: Tensor
    x_scale: Tensor
    prior_loc: Tensor

    def __init__(
        self,
        x_dim: int,
        *,
        columns: Sequence[str] | None = None,
        z_dim: int = 10,
        hidden: Sequence[int] = (128, 128),
        activation: str = "silu",
        robust: bool = False,
        skip: bool = False,
        x_mean: Tensor | None = None,
        x_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        columns = tuple(columns) if columns is not None else ("real",) * x_dim
        if len(columns) != x_dim:
            raise OptionError(f"columns names {len(columns)} kinds, the data have {x_dim} columns")
        self.x_dim, self.z_dim, self.columns, self.robust = x_dim, z_dim, columns, robust
        categories = num_categories(columns)
        self.num_categories = max([*categories, 1])
        kinds = [column.partition(":")[0] for column in columns]
        for kind in KINDS:
            places = torch.tensor([i for i, k in enumerate(kinds) if k == kind], dtype=torch.long)
            self.register_buffer(f"{kind}_index", places, persistent=False)
        allowed = torch.arange(self.num_categories) < torch.tensor(categories)[:, None]
        self.register_buffer("allowed", allowed[self._index("categorical")], persistent=False)
        self.register_buffer("x_mean", torch.zeros(x_dim) if x_mean is None else x_mean.clone())
        self.register_buffer("x_scale", torch.ones(x_dim) if x_scale is None else x_scale.clone())
        self.register_buffer("prior_loc", torch.zeros(z_dim))
        self.sizes = {kind: self._size(kind) for kind in KINDS if kind in kinds}
        outputs = sum(self.sizes.values())
        self.decoder = MLP(z_dim, outputs, hidden, activation_name=activation)
        self.skip = nn.Linear(z_dim, outputs, bias=False) if skip else None
        if "count" in kinds:
            self.log_dispersion = nn.Parameter(torch.zeros(kinds.count("count")))
        if robust and "real" in kinds:
            self.log_tail = nn.Parameter(torch.full((kinds.count("real"),), 2.0))

    def _index(self, kind: str) -> Tensor:
        index: Tensor = getattr(self, f"{kind}_index")
        return index

    def _size(self, kind: str) -> int:
        each = {"real": 2, "positive": 2, "categorical": self.num_categories}
        return len(self._index(kind)) * each.get(kind, 1)

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Latent sites and their event shapes."""
        return {"z": (self.z_dim,)}

    def forward(self, x: Tensor | None = None, size: int = 1) -> Tensor:
        """Score rows ``x`` of shape ``(B, D)``, or generate ``size`` whole ones with ``x=None``."""
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.prior_loc, 1.0).to_event(1))
            sampled: Tensor = pyro.sample("x", self.decode(z), obs=x)
        return sampled

    def decode(self, z: Tensor) -> Any:
        """``p(x | z)`` for ``z`` of shape ``(*, z_dim)``: events of shape ``(D,)``."""
        outputs = self.decoder(z)
        if self.skip is not None:
            outputs = outputs + self.skip(z)
        pieces = outputs.split(list(self.sizes.values()), -1)
        return MixedColumns(
            {
                kind: (self._index(kind), getattr(self, f"_{kind}")(piece))
                for kind, piece in zip(self.sizes, pieces, strict=True)
            }
        )

    def _moments(self, kind: str) -> tuple[Tensor, Tensor]:
        index = self._index(kind)
        return self.x_mean[index], self.x_scale[index]

    def _real(self, output: Tensor) -> Any:
        mean, scale = self._moments("real")
        loc, raw = output.chunk(2, -1)
        loc, scale = mean + scale * loc, scale * (softplus(raw) + 1e-2)
        if self.robust:
            return dist.StudentT(2 + self.log_tail.exp(), loc, scale)
        return dist.Normal(loc, scale)

    def _positive(self, output: Tensor) -> Any:
        """A log-normal that begins with the column's mean and deviation."""
        mean, scale = self._moments("positive")
        spread = torch.log1p((scale / mean.clamp(min=1e-6)) ** 2).sqrt()
        centre = mean.clamp(min=1e-6).log() - spread**2 / 2
        loc, raw = output.chunk(2, -1)
        return dist.LogNormal(centre + spread * loc, spread * (softplus(raw) + 1e-2))

    def _binary(self, output: Tensor) -> Any:
        return dist.Bernoulli(logits=output)

    def _categorical(self, output: Tensor) -> Any:
        logits = output.reshape(*output.shape[:-1], -1, self.num_categories)
        return dist.Categorical(logits=logits.masked_fill(~self.allowed, -torch.inf))

    def _count(self, output: Tensor) -> Any:
        mean, _ = self._moments("count")
        return negative_binomial(output + mean.clamp(min=1e-2).log(), self.log_dispersion)

    def example_batch(self, size: int) -> Tensor:
        """``size`` rows of the model, about a third of their cells missing."""
        x: Tensor = self(size=size)
        return x.masked_fill(torch.rand_like(x) < 1 / 3, torch.nan)
