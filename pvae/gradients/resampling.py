"""Importance-weighted gradients at a few particles, drawn from all of them by their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pvae import particles as waist
from pvae.bounds import iw_elbo
from pvae.errors import ObjectiveError, OptionError
from pvae.gradients.paths import Path
from pvae.gradients.protocol import Beta, Bound, Terms
from pvae.particles import Gate, Layout, Particles

__all__ = ["Resampled", "resampled"]


@dataclass(frozen=True)
class Resampled(Path):
    r"""The IW-ELBO's gradient at n of its K particles, drawn by their weights.

    With the normalised weights ``v_k`` of all K particles, which are run without gradients, and
    ``i_1 ... i_n`` drawn from them, the gradient ``sum_k v_k dlog w_k`` of the IW-ELBO becomes::

        (1/n) sum_j dlog w_{i_j}

    unbiased, at the price of K forward passes of the model and n backward ones (Burda, Grosse &
    Salakhutdinov 2016, section 3). With ``doubly`` the guide has the doubly reparameterised
    gradient instead, in the same way: ``(1/n) sum_j v_{i_j} dz/dphi . d/dz log w`` (Tucker et al.
    2019), which is far less noisy. The n are drawn systematically: a particle is kept ``n v_k``
    times, up to one.

    Attributes:
        kept: n.
        doubly: Whether the guide's gradient is the doubly reparameterised one.
    """

    kept: int = 1
    doubly: bool = True
    has_path: ClassVar[bool] = False  # that of the particles left out is cut
    tempers: ClassVar[bool] = False
    reruns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.kept < 1:
            raise OptionError(f"resampled keeps at least 1 particle, got kept={self.kept}")

    @property
    def rescores(self) -> bool:  # type: ignore[override]
        """Whether the guide is weighed a second time: where it is doubly reparameterised."""
        return self.doubly

    def check(self, bound: Bound, num_particles: int) -> None:
        """For the IW-ELBO, of more particles than are kept."""
        if bound != iw_elbo:
            raise ObjectiveError(
                f"{self!r} draws particles by the weights of bound=iw_elbo, got {bound!r}: use "
                "gradient=pathwise"
            )
        if self.kept >= num_particles:
            raise ObjectiveError(
                f"{self!r} keeps fewer particles than it draws, got num_particles={num_particles}: "
                "use gradient=pathwise"
            )

    def check_pair(self, layout: Layout) -> None:
        """Every guide site must be reparameterised, and all particles be run at once."""
        super().check_pair(layout)
        if not layout.vectorize:
            raise ObjectiveError(
                f"{self!r} compares particles that are run at once, got vectorize=False: use "
                "gradient=pathwise"
            )

    def draw(
        self, model: Any, guide: Any, batch: Any, num_particles: int, **options: Any
    ) -> Particles:
        """All particles without gradients, those kept with theirs."""
        gate = Gate() if self.doubly else None
        return waist.draw(
            model, guide, batch, num_particles, choose=self._choose, score=self.doubly, gate=gate,
            **options,
        )  # fmt: skip

    def _choose(self, log_weights: Tensor) -> Tensor:
        """Numbers of the particles kept, ``(K, B) -> (n, B)``: one uniform number a datum."""
        above = log_weights.softmax(0).cumsum(0)
        start = torch.rand_like(log_weights[:1])
        steps = torch.arange(self.kept, device=start.device)[:, None]
        at = (start + steps) / self.kept * above[-1:]
        below = above[None] <= at[:, None]  # (n, K, B)
        return below.sum(1).clamp(max=len(log_weights) - 1)

    def surrogate(self, bound: Bound, terms: Terms, beta: Beta, gate: Gate | None) -> Tensor:
        """The mean log weight of the particles kept."""
        if gate is None:
            return (terms.log_joint - terms.log_q).mean(0)
        assert terms.held is not None  # noqa: S101  (draw() asked for both)
        assert terms.weight is not None  # noqa: S101
        gate.open(terms.weight)
        return (terms.log_joint - terms.weight * terms.held).mean(0)

    def __repr__(self) -> str:
        return f"resampled({self.kept}{'' if self.doubly else ', doubly=False'})"


def resampled(kept: int = 1, *, doubly: bool = True) -> Resampled:
    """The IW-ELBO's gradient at ``kept`` particles that its weights choose."""
    return Resampled(kept, doubly)
