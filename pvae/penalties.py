"""Penalties on the latents of a batch: total correlation, moments, discrepancies, free bits.

A penalty is a function of a latent site's draws, posteriors and priors over the batch; its value,
a number of nats per datum, is added to the loss. Where a bound is a sum over data, a penalty looks
at the aggregated posterior ``q(z) = mean_n q(z|x_n)`` and compares data with each other.

Estimates from one batch are biased as their docstrings say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pvae.errors import ObjectiveError, OptionError
from pvae.families import marginals
from pvae.networks import MLP
from pvae.particles import LatentSite, Layout

__all__ = [
    "Decomposition",
    "DensityRatio",
    "Discrepancy",
    "FreeDimensions",
    "Moments",
    "Penalty",
    "density_ratio",
    "dip",
    "free_dimensions",
    "mmd",
    "total_correlation",
]


class Penalty:
    """The interface of a penalty; it looks at one latent site, drawn inside the data plate.

    Attributes:
        uses_posterior: Whether it needs ``q(z|x)`` itself, beside draws from it.
    """

    uses_posterior: ClassVar[bool] = True

    def check(self, sites: Mapping[str, LatentSite], layout: Layout) -> None:
        """Raise ObjectiveError where it is unsound for the pair, from one look at its sites."""
        if len(sites) != 1:
            raise ObjectiveError(
                f"{self!r} looks at one latent site of each datum, and the model has "
                f"{len(sites)} ({', '.join(map(repr, sites)) or 'all data share theirs'}): use "
                "beta= or kl_term= for a KL of several sites"
            )
        name, site = next(iter(sites.items()))
        if len(site.posterior.batch_shape) != 2:
            raise ObjectiveError(
                f"{self!r} takes a latent site that is one event of each datum, and {name!r} lies "
                "in a plate of its own: add .to_event(n) for it"
            )
        others = [n for n in layout.event_dims if n != name]
        if others and self.uses_posterior:
            raise ObjectiveError(
                f"{self!r} needs q({name} | x), and the guide draws {others[0]!r} beside it, over "
                "which it would have to be integrated: use penalty=pvae.penalties.mmd(...), which "
                "needs draws alone"
            )
        self.check_site(name, site)

    def check_site(self, name: str, site: LatentSite) -> None:
        """Raise ObjectiveError where it is unsound for the one site."""

    def start(self, sites: Mapping[str, LatentSite]) -> None:
        """Build what the penalty learns by itself."""

    def networks(self) -> dict[str, nn.Module]:
        """Those that it has built, trained by its own loss."""
        return {}

    def __call__(self, sites: Mapping[str, LatentSite], beta: Any, num_data: float) -> Tensor:
        """``()`` nats per datum, to be added to the loss.

        Args:
            sites: Latent site -> draws, posterior and prior, batch shape ``(K, B)``.
            beta: KL weight at this step.
            num_data: N.
        """
        return self.of_site(next(iter(sites.values())), beta, num_data)

    def of_site(self, site: LatentSite, beta: Any, num_data: float) -> Tensor:
        """``()`` nats per datum of the one site."""
        raise NotImplementedError


def _not_negative(name: str, **weights: float) -> None:
    for key, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise OptionError(f"{name} takes {key} of 0 or more, got {weight}: try 10")


def _need_marginals(penalty: Penalty, name: str, distribution: Any) -> None:
    if marginals(distribution) is None:
        raise ObjectiveError(
            f"{penalty!r} needs the density of each dimension of site {name!r} on its own, which "
            f"{type(distribution).__name__} does not tell: use a Gaussian guide, or "
            "penalty=pvae.penalties.mmd(...), which needs draws alone"
        )


def _flat(value: Tensor) -> Tensor:
    """Draws ``(K, B, event)`` as ``(K, B, D)``."""
    return value.reshape(*value.shape[:2], -1)


# --- total correlation ---------------------------------------------------------------------------


def aggregated(site: LatentSite, num_data: float, estimator: str = "mss") -> tuple[Tensor, Tensor]:
    r"""``log q(z)`` and ``sum_d log q(z_d)`` of each draw, estimated from the batch: ``(K, B)``.

    ``q(z) = (1/N) sum_n q(z|x_n)`` at a draw ``z ~ q(z|x_i)``, from B of the N data:

    - ``"mss"``: ``(1/N) q(z|x_i) + (N-1)/(N(B-1)) sum_(j != i) q(z|x_j)``, unbiased for q(z) where
      the others are a random sample of the rest: minibatch stratified sampling, averaged over the
      order of the batch. Its logarithm is biased downward, by O(1/B), and not at all at B = N.
    - ``"mws"``: ``(1/(NB)) sum_j q(z|x_j)``: minibatch weighted sampling, a lower bound in
      expectation; at B = N it is short by exactly ``log N``. In a total correlation over D
      dimensions that makes a constant, ``(D - 1) log N``, without a gradient.

    Chen, Li, Grosse & Duvenaud (2018), Isolating sources of disentanglement in VAEs.

    Args:
        site: Draws and posteriors, batch shape ``(K, B)``.
        num_data: N.
        estimator: ``"mss"`` or ``"mws"``.
    """
    event = site.posterior.event_shape
    rows = site.value.shape[1]
    points = site.value.movedim(1, 0).unsqueeze(2)  # (B, K, 1, event) against batch shape (K, B)
    pairs = marginals(site.posterior).log_prob(points)
    pairs = pairs.reshape(*pairs.shape[: pairs.dim() - len(event)], -1)  # (B, K, B, D)
    whole = pairs.sum(-1) if _factorises(site.posterior) else site.posterior.log_prob(points)
    own = torch.eye(rows, dtype=torch.bool, device=pairs.device)[:, None]
    if estimator == "mss":
        others = math.log(max(num_data - 1, 1e-30) / (num_data * max(rows - 1, 1)))
        weights = pairs.new_full(own.shape, others).masked_fill(own, -math.log(num_data))
    else:
        weights = torch.full_like(whole, -math.log(num_data * rows))
    joint = torch.logsumexp(whole + weights, 2)
    each = torch.logsumexp(pairs + weights[..., None], 2).sum(-1)
    return joint.T, each.T


def _factorises(distribution: Any) -> bool:
    while isinstance(distribution, torch.distributions.Independent):
        distribution = distribution.base_dist
    return bool(distribution.event_shape == ())


@dataclass(frozen=True)
class Decomposition(Penalty):
    r"""Weights on the three parts of the KL, beside the KL itself.

    ``E_x KL(q(z|x) || p(z))`` is the sum of the mutual information ``E log q(z|x)/q(z)``, the total
    correlation ``E log q(z)/prod_d q(z_d)`` and the dimension-wise KL ``E log prod_d
    q(z_d)/p(z)``, over the data and their draws. Each part is penalised with a weight of its own;
    beta-TCVAE is the ELBO with ``total_correlation = beta - 1``. Chen et al. (2018).

    Attributes:
        total_correlation: Weight of that part.
        mutual_information: Weight of that part.
        dimension_wise: Weight of that part.
        estimator: ``"mss"`` or ``"mws"``, see :func:`aggregated`.
    """

    total_correlation: float = 0.0
    mutual_information: float = 0.0
    dimension_wise: float = 0.0
    estimator: str = "mss"

    def __post_init__(self) -> None:
        if self.estimator not in ("mss", "mws"):
            raise OptionError(f"estimator is 'mss' or 'mws', got {self.estimator!r}: take 'mss'")

    def check_site(self, name: str, site: LatentSite) -> None:
        """The density of every dimension on its own must be known."""
        _need_marginals(self, name, site.posterior)

    def parts(self, site: LatentSite, num_data: float) -> dict[str, Tensor]:
        """Mutual information, total correlation, dimension-wise KL of each draw: ``(K, B)``."""
        joint, each = aggregated(site, num_data, self.estimator)
        return {
            "mutual_information": site.posterior.log_prob(site.value) - joint,
            "total_correlation": joint - each,
            "dimension_wise": each - site.prior.log_prob(site.value),
        }

    def of_site(self, site: LatentSite, beta: Any, num_data: float) -> Tensor:
        """``()``: the weighted parts, mean over draws and data."""
        parts = self.parts(site, num_data)
        weighted = [getattr(self, n) * t.mean() for n, t in parts.items() if getattr(self, n)]
        return torch.stack(weighted).sum() if weighted else site.value.new_zeros(())

    def __repr__(self) -> str:
        return f"total_correlation({self.total_correlation:g})"


@dataclass(frozen=True)
class DensityRatio(Penalty):
    r"""The total correlation by a discriminator that learns beside the pair (FactorVAE).

    A network D tells draws of q(z) from draws whose dimensions are permuted over the batch, each
    by itself; ``log D/(1 - D)`` is then ``log q(z)/prod_d q(z_d)``, whose mean over the batch is
    penalised. D follows the logistic loss on the same draws, held fixed, in the same step and with
    the same optimiser, and is held while the pair moves. Kim & Mnih (2018), Disentangling by
    factorising, take a second batch for the permuted draws.

    One penalty serves one pair at a time: D is built anew whenever a run begins.

    Attributes:
        weight: Of the total correlation.
        hidden: Widths of D's hidden layers.
    """

    weight: float
    hidden: tuple[int, ...] = (256, 256, 256)
    _network: dict[str, MLP] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _not_negative("density_ratio", weight=self.weight)

    def start(self, sites: Mapping[str, LatentSite]) -> None:
        """A new discriminator, of the draws' size and type."""
        value = _flat(next(iter(sites.values())).value)
        network = MLP(value.shape[-1], 1, self.hidden, activation_name="leaky_relu")
        self._network["discriminator"] = network.to(device=value.device, dtype=value.dtype)

    def networks(self) -> dict[str, nn.Module]:
        """The discriminator."""
        return dict(self._network)

    def of_site(self, site: LatentSite, beta: Any, num_data: float) -> Tensor:
        """``()``: what the pair pays, and what the discriminator pays."""
        network, value = self._network["discriminator"], _flat(site.value)
        held = {name: p.detach() for name, p in network.named_parameters()}
        ratio = torch.func.functional_call(network, held, (value,))  # type: ignore[no-untyped-call]
        fixed = value.detach()
        order = torch.rand_like(fixed).argsort(1)
        true, permuted = network(fixed), network(fixed.gather(1, order))
        learning = 0.5 * (softplus(-true).mean() + softplus(permuted).mean())
        total: Tensor = self.weight * ratio.mean() + learning
        return total

    def __repr__(self) -> str:
        return f"density_ratio({self.weight:g})"


# --- moments, discrepancies, dimensions ----------------------------------------------------------


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
        _not_negative("dip", off_diagonal=self.off_diagonal, diagonal=self.diagonal)
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
        means = _flat(posterior.mean)[0]
        centred = means - means.mean(0)
        covariance = centred.T @ centred / len(means)
        if self.kind == "i":
            return covariance
        if _factorises(site.posterior) or not hasattr(site.posterior, "covariance_matrix"):
            return covariance + torch.diag(_flat(posterior.variance)[0].mean(0))
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
    U-statistic over the batch, which is unbiased and so may be negative. With ``C = 2 D scale^2``,
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
        _not_negative("mmd", weight=self.weight)
        if self.kernel not in ("imq", "rbf"):
            raise OptionError(f"kernel is 'imq' or 'rbf', got {self.kernel!r}: take 'imq'")
        if not 0 < self.scale < math.inf:
            raise OptionError(f"mmd takes a scale above 0, got {self.scale}: try 1")

    def of_site(self, site: LatentSite, beta: Any, num_data: float) -> Tensor:
        """``()``: mean over the K particles of the batch's statistic."""
        prior = site.prior.rsample() if site.prior.has_rsample else site.prior.sample()
        value = self.statistic(_flat(site.value), _flat(prior))
        weighted: Tensor = self.weight * value.mean()
        return weighted

    def statistic(self, z: Tensor, y: Tensor) -> Tensor:
        """The U-statistic of two samples ``(K, B, D)``: ``(K,)``."""
        rows = z.shape[1]
        pairs = max(rows * (rows - 1), 1)
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
        _not_negative("free_dimensions", nats=self.nats)

    def check_site(self, name: str, site: LatentSite) -> None:
        """Posterior and prior factorise, and their KL is known."""
        for role, distribution in (("posterior", site.posterior), ("prior", site.prior)):
            if not _factorises(distribution):
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
        return _flat(kl).mean((0, 1))

    def of_site(self, site: LatentSite, beta: Any, num_data: float) -> Tensor:
        """``()``."""
        value: Tensor = beta * (self.nats - self._each(site)).clamp(min=0).sum()
        return value

    def __repr__(self) -> str:
        return f"free_dimensions({self.nats:g})"


# --- by name -------------------------------------------------------------------------------------


def total_correlation(weight: float, estimator: str = "mss") -> Decomposition:
    """``weight`` times the total correlation, from the batch's posteriors (Chen et al. 2018)."""
    return Decomposition(weight, estimator=estimator)


def density_ratio(weight: float) -> DensityRatio:
    """``weight`` times the total correlation, from a discriminator (Kim & Mnih 2018)."""
    return DensityRatio(weight)


def dip(off_diagonal: float = 10.0, diagonal: float = 10.0, kind: str = "ii") -> Moments:
    """The aggregated posterior's covariance held at the identity (Kumar et al. 2018)."""
    return Moments(off_diagonal, diagonal, kind)


def mmd(weight: float = 10.0, kernel: str = "imq", scale: float = 1.0) -> Discrepancy:
    """``weight`` times the MMD between aggregated posterior and prior (Zhao et al. 2019)."""
    return Discrepancy(weight, kernel, scale)


def free_dimensions(nats: float) -> FreeDimensions:
    """Nats below which a latent dimension's KL costs nothing (Kingma et al. 2016)."""
    return FreeDimensions(nats)
