"""Moments, discrepancies and dimensions: what holds the aggregated posterior to the prior."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pvae.errors import ObjectiveError, OptionError
from pvae.families import marginals
from pvae.particles import LatentSite
from pvae.penalties.protocol import Penalty, factorises, flat, not_negative

__all__ = ["Discrepancy", "FreeDimensions", "Moments"]


@dataclass(frozen=True)
class Moments(Penalty):
    r"""Distance of the aggregated posterior's covariance from the identity (DIP-VAE).

    ``off_diagonal sum_(i != j) C_ij^2 + diagonal sum_i (C_ii - 1)^2`` with C the batch's covariance
    of the posterior means (kind I), to which the mean posterior covariance is added (kind II). The
    square of a batch's covariance is biased upward by O(1/B). Kumar, Sattigeri & Balakrishnan
    (2018), Variational inference of disentangled latent concepts from unlabeled observations.
    """

    off_diagonal: float
    diagonal: float
    kind: str = "ii"

    def __post_init__(self) -> None:
        not_negative("dip", off_diagonal=self.off_diagonal, diagonal=self.diagonal)
        if self.kind not in ("i", "ii"):
            raise OptionError(f"kind is 'i' or 'ii', got {self.kind!r}: take 'ii'")

    def check_site(self, name: str, site: LatentSite) -> None:
        """A Gaussian posterior."""
        if not isinstance(marginals(site.posterior), torch.distributions.Normal):
            raise ObjectiveError(
                f"{self!r} compares the moments of Gaussian posteriors, and site {name!r} has "
                f"{type(site.posterior).__name__}: use a Gaussian guide, or "
                "penalty=pvae.penalties.mmd(...), which needs draws alone"
            )

    def covariance(self, site: LatentSite) -> Tensor:
        """C, ``(D, D)``, estimated from the batch."""
        posterior = marginals(site.posterior)
        means = flat(posterior.mean)[0]
        centred = means - means.mean(0)
        covariance = centred.T @ centred / len(means)
        if self.kind == "i":
            return covariance
        if factorises(site.posterior) or not hasattr(site.posterior, "covariance_matrix"):
            return covariance + torch.diag(flat(posterior.variance)[0].mean(0))
        return covariance + site.posterior.covariance_matrix[0].mean(0)  # type: ignore[no-any-return]

    def of_site(self, site: LatentSite, beta: Any, num_data: float) -> Tensor:
        """``()``."""
        covariance = self.covariance(site)
        diagonal = covariance.diagonal()
        off = covariance.square().sum() - diagonal.square().sum()
        value: Tensor = self.off_diagonal * off + self.diagonal * (diagonal - 1).square().sum()
        return value

    def __repr__(self) -> str:
        return f"dip({self.off_diagonal:g}, {self.diagonal:g}, kind={self.kind!r})"


_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Discrepancy(Penalty):
    r"""Squared maximum mean discrepancy between draws of q(z) and of the prior.

    ``weight (E k(z, z') + E k(y, y') - 2 E k(z, y))`` with ``z ~ q(z)``, ``y ~ p(z)``, by its
    U-statistic over the batch, which is unbiased and so may be negative (zero for a batch of one
    datum, which has no pairs). With ``C = 2 D scale^2``,
    twice the expected squared norm of a prior draw, the kernels are::

        rbf: exp(-|z - y|^2 / C)        imq: sum_s s C / (s C + |z - y|^2),  s from 0.1 to 10

    InfoVAE (Zhao, Song & Ermon 2019) and WAE-MMD (Tolstikhin et al. 2018). A prior that is learned
    is moved only where its draws are reparameterised.
    """

    weight: float
    kernel: str = "imq"
    scale: float = 1.0
    uses_posterior: ClassVar[bool] = False

    def __post_init__(self) -> None:
        not_negative("mmd", weight=self.weight)
        if self.kernel not in ("imq", "rbf"):
            raise OptionError(f"kernel is 'imq' or 'rbf', got {self.kernel!r}: take 'imq'")
        if not 0 < self.scale < math.inf:
            raise OptionError(f"mmd takes a scale above 0, got {self.scale}: try 1")

    def of_site(self, site: LatentSite, beta: Any, num_data: float) -> Tensor:
        """``()``: mean over the K particles of the batch's statistic."""
        prior = site.prior.rsample() if site.prior.has_rsample else site.prior.sample()
        value = self.statistic(flat(site.value), flat(prior))
        weighted: Tensor = self.weight * value.mean()
        return weighted

    def statistic(self, z: Tensor, y: Tensor) -> Tensor:
        """The U-statistic of two samples ``(K, B, D)``: ``(K,)``."""
        rows = z.shape[1]
        pairs = rows * (rows - 1)
        if not pairs:  # the cross term alone would pull the datum to one draw of the prior
            return 0 * z.sum((1, 2))
        apart = ~torch.eye(rows, dtype=torch.bool, device=z.device)
        within = ((self._kernel(z, z) + self._kernel(y, y)) * apart).sum((1, 2)) / pairs
        value: Tensor = within - 2 * self._kernel(z, y).mean((1, 2))
        return value

    def _kernel(self, z: Tensor, y: Tensor) -> Tensor:
        squares = z.square().sum(-1)[:, :, None] + y.square().sum(-1)[:, None]
        distance = (squares - 2 * z @ y.mT).clamp(min=0)
        width = 2 * z.shape[-1] * self.scale**2
        if self.kernel == "rbf":
            return torch.exp(-distance / width)
        terms = [s * width / (s * width + distance) for s in _SCALES]
        return torch.stack(terms).sum(0)

    def __repr__(self) -> str:
        return f"mmd({self.weight:g}, kernel={self.kernel!r})"


@dataclass(frozen=True)
class FreeDimensions(Penalty):
    r"""Free bits for every dimension: ``beta sum_d max(0, nats - mean KL_d)``.

    Together with ``beta KL`` the cost is ``beta sum_d max(nats, mean KL_d)`` (Kingma et al. 2016),
    for draw by draw with ``analytic_kl=True`` and on average otherwise.

    Attributes:
        nats: Below which a dimension's KL, mean over the batch, costs nothing.
    """

    nats: float

    def __post_init__(self) -> None:
        not_negative("free_dimensions", nats=self.nats)

    def check_site(self, name: str, site: LatentSite) -> None:
        """Posterior and prior factorise, and their KL is known."""
        for role, distribution in (("posterior", site.posterior), ("prior", site.prior)):
            if not factorises(distribution):
                raise ObjectiveError(
                    f"{self!r} needs a KL of each dimension on its own, and the {role} of site "
                    f"{name!r} ({type(distribution).__name__}) does not factorise: use "
                    "free_bits=, which counts whole sites"
                )
        try:
            self._each(site)
        except NotImplementedError:
            raise ObjectiveError(
                f"{self!r} needs a KL in closed form, and none is known between "
                f"{type(marginals(site.posterior)).__name__} and "
                f"{type(marginals(site.prior)).__name__} of site {name!r}: use free_bits="
            ) from None

    def _each(self, site: LatentSite) -> Tensor:
        """Mean KL of each dimension, ``(D,)``."""
        posterior, prior = marginals(site.posterior), marginals(site.prior)
        kl = torch.distributions.kl_divergence(posterior, prior)
        return flat(kl).mean((0, 1))

    def of_site(self, site: LatentSite, beta: Any, num_data: float) -> Tensor:
        """``()``."""
        value: Tensor = beta * (self.nats - self._each(site)).clamp(min=0).sum()
        return value

    def __repr__(self) -> str:
        return f"free_dimensions({self.nats:g})"
