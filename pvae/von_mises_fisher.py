"""Distributions on the unit sphere: uniform, and von Mises-Fisher with exact draws and density.

Everything about the concentration follows from one integral over the angle t between a point and
the mean direction, whose density is ``exp(kappa cos t) sin(t)^(d - 2)`` up to a constant. It is
analytic in t, so that Gauss-Legendre quadrature in a fixed number of pieces gives the normaliser,
the distribution function, its inverse and its derivative to machine precision, for every kappa and
d, without a branch or a rejection.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions.kl import register_kl

__all__ = ["HypersphericalUniform", "VonMisesFisher", "log_sphere_area"]

_PIECES = 32
_NODES, _WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(8))
_NEWTON_STEPS = 4
_BELOW, _ABOVE = 9.0, 20.0  # standard deviations from the mode, beyond which lies less than 1e-16


def log_sphere_area(dim: int) -> float:
    """``log(2 pi^(d/2) / Gamma(d/2))``: log surface area of the unit sphere in d dimensions."""
    return math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)


class _Angles:
    """The angle to the mean direction: density ``exp(kappa (cos t - 1)) sin(t)^(d-2) / Z``.

    Args:
        concentration: ``kappa > 0``, ``(*)``; all is computed in double precision.
        dim: d.

    Attributes:
        edges: Ends of the pieces that hold all of the mass, ``(*, 33)``.
        cumulated: Unnormalised distribution function there, differentiable in kappa.
    """

    def __init__(self, concentration: Tensor, dim: int) -> None:
        self.kappa, self.dim = concentration.double(), dim
        self.nodes = _NODES.to(concentration.device)
        self.weights = _WEIGHTS.to(concentration.device)
        self.edges = self._edges()
        start, width = self.edges[..., :-1, None], self.edges.diff()[..., None]
        points = start + width * (self.nodes + 1) / 2
        self.points, self.masses = points, self._density(points) * self.weights * width / 2
        pieces = self.masses.sum(-1)
        self.cumulated = torch.cat([torch.zeros_like(pieces[..., :1]), pieces.cumsum(-1)], -1)
        self.total = self.cumulated[..., -1]

    def _edges(self) -> Tensor:
        kappa, m = self.kappa.detach(), self.dim - 2
        cosine = 2 * kappa / (m + (m**2 + 4 * kappa**2).sqrt())  # of the mode
        sd = (kappa * (cosine + 1 / cosine)).rsqrt()
        mode = torch.acos(cosine.clamp(max=1.0))
        low = (mode - _BELOW * sd).clamp(min=0)
        high = (mode + _ABOVE * sd).clamp(max=math.pi)
        unit = torch.linspace(0, 1, _PIECES + 1, dtype=torch.float64, device=kappa.device)
        return low[..., None] + (high - low)[..., None] * unit

    def _density(self, angle: Tensor) -> Tensor:
        """Unnormalised, at ``(*, pieces, nodes)``; ``cos t - 1`` without cancellation."""
        kappa = self.kappa[..., None, None]
        fall = torch.exp(-2 * kappa * (angle / 2).sin().square())
        return fall if self.dim == 2 else fall * angle.sin() ** (self.dim - 2)

    def mean_cosine(self) -> Tensor:
        """``A_d(kappa) = E[cos t]``, differentiable."""
        lost = (self.masses * 2 * (self.points / 2).sin().square()).sum((-1, -2))
        return 1 - lost / self.total

    def inverse(self, uniform: Tensor) -> Tensor:
        """The angle below which a share ``uniform`` of the mass lies, differentiable in kappa.

        Newton's method on the log of the smaller tail, inside the piece that holds it; the
        derivative is the implicit one,
        ``dt/dkappa = -(dF/dkappa) / f`` (Figurnov et al. 2018).
        """
        share = uniform.double()
        normalised = self.cumulated.detach() / self.total.detach()[..., None]
        piece = (share[..., None] >= normalised[..., 1:-1]).sum(-1, keepdim=True)

        def at(table: Tensor, shift: int = 0) -> Tensor:
            return table.expand(*share.shape, -1).gather(-1, piece + shift).squeeze(-1)

        low, high, below = at(self.edges), at(self.edges, 1), at(self.cumulated)
        target = share * self.total.detach() - below.detach()
        with torch.no_grad():
            heights = self._density(self.edges[..., None]).squeeze(-1)
            rise = _trapezoid(at(heights), at(heights, 1), target / at(self.cumulated.diff()))
            angle = low + (high - low) * rise
            left, right = low, high  # the root stays between them, whatever Newton does
            for _ in range(_NEWTON_STEPS):
                error = (self._mass(low, angle) - target) / self.total
                left = torch.where(error < 0, angle, left)
                right = torch.where(error < 0, right, angle)
                move = _log_newton(error, share) * self.total
                moved = angle - move / self._density_at(angle).clamp(min=1e-300)
                inside = (moved >= left) & (moved <= right)
                angle = torch.where(inside, moved, (left + right) / 2)
        share_below = (below + self._mass(low, angle)) / self.total
        density = (self._density_at(angle) / self.total).detach().clamp(min=1e-300)
        return angle - (share_below - share_below.detach()) / density

    def _density_at(self, angle: Tensor) -> Tensor:
        return self._density(angle[..., None, None]).squeeze((-1, -2))

    def _mass(self, low: Tensor, angle: Tensor) -> Tensor:
        """Unnormalised mass between two angles."""
        width = (angle - low)[..., None]
        points = low[..., None] + width * (self.nodes + 1) / 2
        density = self._density(points[..., None, :]).squeeze(-2)
        return (density * self.weights * width / 2).sum(-1)


def _trapezoid(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """Where a share of the mass lies between 0 and 1, the density being linear from end to end."""
    height = 2 * start / (start + end).clamp(min=1e-300)
    root = (height.square() + 4 * (1 - height) * share).clamp(min=0).sqrt()
    return (2 * share / (height + root).clamp(min=1e-300)).clamp(0, 1)


def _log_newton(error: Tensor, share: Tensor) -> Tensor:
    """``F log(F / u)`` for an error ``F - u`` in the lower half, its mirror in the upper."""
    lower = share < 0.5
    tail, gain = torch.where(lower, share, 1 - share), torch.where(lower, error, -error)
    tail = tail.clamp(min=1e-300)
    reached = (tail + gain).clamp(min=1e-300)
    move = reached * (reached / tail).log()
    return torch.where(lower, move, -move)


class VonMisesFisher(TorchDistribution):  # type: ignore[misc]
    r"""``log p(z) = kappa <mu, z> - log C``, on the unit sphere in d dimensions.

    ``C = (2 pi)^(d/2) I_(d/2-1)(kappa) / kappa^(d/2-1)``. With respect to the surface area, nats.
    A draw is ``cos(t) mu + sin(t) v``: the angle by inversion of its distribution function, v
    uniform among the directions orthogonal to mu; both are differentiable, so no correction by a
    score is needed, as it is after rejection. Davidson et al. (2018), Hyperspherical variational
    auto-encoders; Xu & Durrett (2018), Spherical latent spaces for stable variational autoencoders.

    Args:
        loc: Mean direction mu, of length one, ``(*, d)``, d at least 2.
        concentration: ``kappa > 0``, ``(*)``.
    """

    arg_constraints = {"loc": constraints.sphere, "concentration": constraints.positive}
    support = constraints.sphere
    has_rsample = True

    def __init__(
        self, loc: Tensor, concentration: Tensor, *, validate_args: bool | None = None
    ) -> None:
        batch = (loc[..., 0] + concentration).shape
        self.loc, self.concentration = loc.expand(*batch, -1), concentration.expand(batch)
        self._angles = _Angles(concentration, loc.shape[-1])
        super().__init__(batch, loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> VonMisesFisher:
        """The same distribution with a larger batch shape; the integral is not taken again."""
        new = cast(VonMisesFisher, self._get_checked_instance(VonMisesFisher, _instance))
        batch = torch.Size(batch_shape)
        new.loc = self.loc.expand(batch + self.event_shape)
        new.concentration = self.concentration.expand(batch)
        new._angles = self._angles
        super(VonMisesFisher, new).__init__(batch, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def _dim(self) -> int:
        return int(self.event_shape[0])

    def _log_normaliser(self) -> Tensor:
        """``log C - kappa``."""
        return self._angles.total.log() + log_sphere_area(self._dim - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density with respect to the sphere's area, nats."""
        if self._validate_args:
            self._validate_sample(value)
        # 1 - <mu, z> = |mu - z|^2 / 2, which keeps its digits where the two are close
        distance = (value - self.loc).square().sum(-1) / 2
        log_normaliser = self._log_normaliser().to(value.dtype)
        log_prob: Tensor = -self.concentration * distance - log_normaliser
        return log_prob

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws, differentiable in mu and kappa."""
        shape = self._extended_shape(sample_shape)
        loc = self.loc
        angle = self._angles.inverse(torch.rand(shape[:-1], dtype=torch.float64, device=loc.device))
        noise = torch.randn(shape, dtype=loc.dtype, device=loc.device)
        tangent = noise - (noise * loc).sum(-1, keepdim=True) * loc
        tangent = tangent / tangent.norm(dim=-1, keepdim=True)
        cosine, sine = angle.cos().to(loc.dtype), angle.sin().to(loc.dtype)
        value = cosine[..., None] * loc + sine[..., None] * tangent
        unit: Tensor = value / value.norm(dim=-1, keepdim=True)  # one already, up to rounding
        return unit

    @property
    def mean(self) -> Tensor:
        """``A_d(kappa) mu``, inside the ball."""
        return self._angles.mean_cosine().to(self.loc.dtype)[..., None] * self.loc

    def entropy(self) -> Tensor:
        """``log C - kappa A_d(kappa)``, nats, with respect to the sphere's area."""
        lost = self.concentration.double() * (1 - self._angles.mean_cosine())
        entropy = (lost + self._log_normaliser()).to(self.loc.dtype)
        return entropy.expand(self.batch_shape)


class HypersphericalUniform(TorchDistribution):  # type: ignore[misc]
    """``log p(z) = -log area``: every point of the unit sphere in d dimensions alike.

    Args:
        origin: Zeros of shape ``(*, d)``, which say shape, type and device.
    """

    arg_constraints = {"origin": constraints.real_vector}
    support = constraints.sphere
    has_rsample = True

    def __init__(self, origin: Tensor, *, validate_args: bool | None = None) -> None:
        self.origin = origin
        super().__init__(origin.shape[:-1], origin.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> HypersphericalUniform:
        """The same distribution with a larger batch shape."""
        shape = torch.Size(batch_shape) + self.event_shape
        return HypersphericalUniform(self.origin.expand(shape), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Minus the log of the sphere's area, nats."""
        if self._validate_args:
            self._validate_sample(value)
        like = value[..., 0] + self.origin[..., 0]
        return torch.full_like(like, -log_sphere_area(int(self.event_shape[0])))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Directions of standard normal vectors."""
        shape = self._extended_shape(sample_shape)
        noise = torch.randn(shape, dtype=self.origin.dtype, device=self.origin.device)
        direction: Tensor = noise / noise.norm(dim=-1, keepdim=True)
        return direction

    @property
    def mean(self) -> Tensor:
        """The origin."""
        return torch.zeros_like(self.origin)


@register_kl(VonMisesFisher, HypersphericalUniform)  # type: ignore[untyped-decorator, no-untyped-call]
def _kl(q: VonMisesFisher, p: HypersphericalUniform) -> Tensor:
    return log_sphere_area(int(p.event_shape[0])) - q.entropy()
