"""The total correlation of the aggregated posterior: from the batch, or from a discriminator."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pvae.errors import ObjectiveError, OptionError
from pvae.families import marginals
from pvae.networks import MLP
from pvae.particles import LatentSite
from pvae.penalties.protocol import Penalty, factorises, flat, not_negative

__all__ = ["Decomposition", "DensityRatio", "aggregated"]


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
    whole = pairs.sum(-1) if factorises(site.posterior) else site.posterior.log_prob(points)
    own = torch.eye(rows, dtype=torch.bool, device=pairs.device)[:, None]
    if estimator == "mss":
        others = math.log(max(num_data - 1, 1e-30) / (num_data * max(rows - 1, 1)))
        weights = pairs.new_full(own.shape, others).masked_fill(own, -math.log(num_data))
    else:
        weights = torch.full_like(whole, -math.log(num_data * rows))
    joint = torch.logsumexp(whole + weights, 2)
    each = torch.logsumexp(pairs + weights[..., None], 2).sum(-1)
    return joint.T, each.T


def _need_marginals(penalty: Penalty, name: str, distribution: Any) -> None:
    if marginals(distribution) is None:
        raise ObjectiveError(
            f"{penalty!r} needs the density of each dimension of site {name!r} on its own, which "
            f"{type(distribution).__name__} does not tell: use a Gaussian guide, or "
            "penalty=pvae.penalties.mmd(...), which needs draws alone"
        )


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
        not_negative("density_ratio", weight=self.weight)

    def start(self, sites: Mapping[str, LatentSite]) -> None:
        """A new discriminator, of the draws' size and type."""
        value = flat(next(iter(sites.values())).value)
        network = MLP(value.shape[-1], 1, self.hidden, activation_name="leaky_relu")
        self._network["discriminator"] = network.to(device=value.device, dtype=value.dtype)

    def networks(self) -> dict[str, nn.Module]:
        """The discriminator."""
        return dict(self._network)

    def of_site(self, site: LatentSite, beta: Any, num_data: float) -> Tensor:
        """``()``: what the pair pays, and what the discriminator pays."""
        network, value = self._network["discriminator"], flat(site.value)
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
