"""Mixtures of discretised logistics over the channels of a pixel."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid, softplus

__all__ = ["DiscretizedLogisticMixture", "mixture_size", "pixel_mixture"]


class DiscretizedLogisticMixture(TorchDistribution):  # type: ignore[misc]
    r"""Images of integer levels; each pixel a mixture, its channels dependent within a component.

    With levels rescaled to ``s = 2 x / (num_levels - 1) - 1``, a pixel of C channels has
    ``p(x) = sum_m pi_m prod_c P(x_c | loc_mc + sum_(d < c) coefficient_mcd s_d, scale_mc)``, where
    ``P`` is the probability of the bin of width ``2 / (num_levels - 1)`` around ``s_c`` under a
    logistic distribution; the outermost bins take the tails, so that all ``num_levels ** C``
    probabilities sum to one. Pixels are independent. Salimans, Karpathy, Chen & Kingma (2017),
    PixelCNN++. Events are rows ``(P C,)`` of P pixels.

    Args:
        logits: Of the components, ``(*, P, M)``.
        loc: Locations, ``(*, P, C, M)``, in units of ``s``.
        scale: Positive scales, ``(*, P, C, M)``, in units of ``s``.
        coefficients: How a channel's location moves with the earlier channels of the pixel,
            ``(*, P, C (C - 1) / 2, M)``: red on green, red on blue, green on blue; ``None`` for
            channels that are independent within a component.
        num_levels: Number of levels, 256 for bytes.
        channels_last: Whether a row runs through ``(P, C)`` rather than ``(C, P)``.
    """

    arg_constraints = {
        "logits": constraints.real,
        "loc": constraints.real,
        "scale": constraints.positive,
    }

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        scale: Tensor,
        coefficients: Tensor | None = None,
        num_levels: int = 256,
        *,
        channels_last: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        self.logits, self.loc, self.scale, self.coefficients = logits, loc, scale, coefficients
        self.num_levels, self.channels_last = num_levels, channels_last
        self.pixels, self.channels = loc.shape[-3], loc.shape[-2]
        super().__init__(
            loc.shape[:-3], (self.pixels * self.channels,), validate_args=validate_args
        )

    @property
    def support(self) -> Any:
        """The integers ``0 .. num_levels - 1``."""
        levels = constraints.integer_interval(0, self.num_levels - 1)  # type: ignore[no-untyped-call]
        return constraints.independent(levels, 1)  # type: ignore[no-untyped-call]

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiscretizedLogisticMixture:
        """The same distribution with a larger batch shape."""
        logits, loc, scale = (
            part.expand(*batch_shape, *part.shape[-dims:])
            for part, dims in ((self.logits, 2), (self.loc, 3), (self.scale, 3))
        )
        coefficients = self.coefficients
        if coefficients is not None:
            coefficients = coefficients.expand(*batch_shape, *coefficients.shape[-3:])
        return DiscretizedLogisticMixture(
            logits,
            loc,
            scale,
            coefficients,
            self.num_levels,
            channels_last=self.channels_last,
            validate_args=False,
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of rows of integer levels ``(*, P C)``, nats."""
        if self._validate_args:
            self._validate_sample(value)
        levels = self._by_pixel(value)[..., None]
        s = self._rescaled(levels)
        half = 1 / (self.num_levels - 1)
        centred = s - self._locations(s)
        upper, lower = (centred + half) / self.scale, (centred - half) / self.scale
        # log(F(b) - F(a)) = log F(b) + log(1 - F(a)) + log(1 - exp(a - b)), exact and stable.
        inner = (
            logsigmoid(upper) - softplus(lower) + torch.log(-torch.expm1(-2 * half / self.scale))
        )
        first, last = levels <= 0, levels >= self.num_levels - 1
        log_bins = torch.where(first, logsigmoid(upper), torch.where(last, -softplus(lower), inner))
        mixed = torch.logsumexp(log_bins.sum(-2) + self.logits.log_softmax(-1), -1)
        return mixed.sum(-1)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Rows of integer levels: a component for each pixel, then channel after channel."""
        shape = torch.Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            logits = self.logits.expand(*shape, *self.logits.shape[-2:])
            chosen = torch.distributions.Categorical(logits=logits, validate_args=False).sample()  # type: ignore[no-untyped-call]
            loc, scale = (self._component(part, chosen, shape) for part in (self.loc, self.scale))
            slopes = None
            if self.coefficients is not None:
                slopes = self._component(self.coefficients, chosen, shape)
            levels: list[Tensor] = []
            for channel in range(self.channels):
                centre = loc[..., channel]
                for earlier, drawn in enumerate(levels if slopes is not None else []):
                    slope = slopes[..., _pair(earlier, channel)]  # type: ignore[index]
                    centre = centre + slope * self._rescaled(drawn)
                uniform = torch.rand_like(centre).clamp(1e-6, 1 - 1e-6)
                s = centre + scale[..., channel] * torch.logit(uniform)
                level = (s + 1) / 2 * (self.num_levels - 1)
                levels.append(level.round().clamp(0, self.num_levels - 1))
            return self._as_rows(torch.stack(levels, -1))

    @property
    def mean(self) -> Tensor:
        """Each channel's mean location, kept within the levels: a picture, not the exact mean."""
        weights = self.logits.softmax(-1)[..., None, :]
        means: list[Tensor] = []
        for channel in range(self.channels):
            centre = self.loc[..., channel, :]
            for earlier in range(channel if self.coefficients is not None else 0):
                slope = self.coefficients[..., _pair(earlier, channel), :]  # type: ignore[index]
                centre = centre + slope * means[earlier]
            means.append(centre)
        s = (weights * torch.stack(means, -2)).sum(-1).clamp(-1, 1)
        return self._as_rows((s + 1) / 2 * (self.num_levels - 1))

    def _locations(self, s: Tensor) -> Tensor:
        """``(*, P, C, M)`` for rescaled levels ``(*, P, C, 1)``."""
        if self.coefficients is None:
            return self.loc
        columns = []
        for channel in range(self.channels):
            centre = self.loc[..., channel, :]
            for earlier in range(channel):
                slope = self.coefficients[..., _pair(earlier, channel), :]
                centre = centre + slope * s[..., earlier, :]
            columns.append(centre)
        return torch.stack(torch.broadcast_tensors(*columns), -2)  # type: ignore[no-untyped-call]

    def _rescaled(self, levels: Tensor) -> Tensor:
        return 2 * levels / (self.num_levels - 1) - 1

    def _component(self, part: Tensor, chosen: Tensor, shape: torch.Size) -> Tensor:
        """Of ``(*, P, n, M)`` the entries of each pixel's component: ``(*, P, n)``."""
        part = part.expand(*shape, *part.shape[-3:])
        index = chosen[..., None, None].expand(*part.shape[:-1], 1)
        return part.gather(-1, index).squeeze(-1)

    def _by_pixel(self, rows: Tensor) -> Tensor:
        """Rows ``(*, P C)`` as ``(*, P, C)``."""
        if self.channels_last:
            return rows.reshape(*rows.shape[:-1], self.pixels, self.channels)
        return rows.reshape(*rows.shape[:-1], self.channels, self.pixels).movedim(-2, -1)

    def _as_rows(self, values: Tensor) -> Tensor:
        """``(*, P, C)`` as rows ``(*, P C)``."""
        values = values if self.channels_last else values.movedim(-1, -2)
        return values.flatten(-2)


def _pair(earlier: int, later: int) -> int:
    """Place of a pair of channels among the coefficients: (0, 1), (0, 2), (1, 2), ..."""
    return later * (later - 1) // 2 + earlier


# --- from the output of a network -----------------------------------------------------------------


def mixture_size(channels: int, num_components: int) -> int:
    """Numbers for each pixel that :func:`pixel_mixture` takes: ``M (1 + 2 C + C (C - 1) / 2)``."""
    return num_components * (1 + 2 * channels + channels * (channels - 1) // 2)


def pixel_mixture(
    images: Tensor, channels: int, num_components: int, num_levels: int, *, channels_last: bool
) -> DiscretizedLogisticMixture:
    """The mixture whose unconstrained parameters are the output of a network.

    Args:
        images: ``(*, n, H, W)`` with the n of :func:`mixture_size`.
        channels: C.
        num_components: M.
        num_levels: Number of levels.
        channels_last: Whether a row of data runs through ``(P, C)``.
    """
    free = images.flatten(-2).movedim(-2, -1)  # (*, P, n)
    count = channels * num_components
    sizes = [num_components, count, count, free.shape[-1] - num_components - 2 * count]
    logits, loc, raw, slopes = torch.split(free, sizes, -1)
    by_channel = (*free.shape[:-1], -1, num_components)
    return DiscretizedLogisticMixture(
        logits,
        loc.reshape(by_channel),
        softplus(raw.reshape(by_channel) - 1) + 1e-3,
        torch.tanh(slopes.reshape(by_channel)) if channels > 1 else None,
        num_levels,
        channels_last=channels_last,
    )
