r"""Sound and pictures of it: spectrograms, log-mel spectrograms, and the way back.

A clip is real numbers between -1 and 1, a spectrogram ``(*, frames, bins)`` with time first::

    S[t, k] = sum_n window[n] x[t hop + n - size / 2] exp(-2 pi i k n / size)
    L[t, m] = log(max(sum_k M[m, k] |S[t, k]|^2, floor))

``M`` are triangles, evenly spaced on the mel scale ``2595 log10(1 + f / 700)`` (O'Shaughnessy 1987)
and each of unit sum, so that a band's number is a mean of power whatever its width. A log-mel
spectrogram forgets phase and detail; :meth:`LogMel.inverse` gives power back by the pseudo-inverse
of ``M`` and phase by the iteration of Griffin & Lim (1984), with the momentum of Perraudin, Balazs
& Søndergaard (2013).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.errors import DataError, OptionError

__all__ = ["LogMel", "Spectrogram", "fit_length", "griffin_lim", "mel_filterbank", "num_frames"]


def fit_length(clip: Tensor, samples: int) -> tuple[Tensor, int]:
    """A clip ``(n,)`` cut or padded with zeros at its end to ``(samples,)``, and what is left of n.

    Raises:
        DataError: The clip is empty.
    """
    if clip.ndim != 1 or clip.numel() == 0:
        raise DataError(
            f"a clip is samples (n,), at least one, got shape {tuple(clip.shape)}: leave it out"
        )
    kept = min(len(clip), samples)
    return torch.cat([clip[:kept], clip.new_zeros(samples - kept)]), kept


def num_frames(samples: Tensor | int, hop: int) -> Tensor:
    """Frames that hold sound of clips of so many samples: those whose centre lies in the clip."""
    return torch.as_tensor(samples).add(hop - 1).div(hop, rounding_mode="floor")


def mel_filterbank(bands: int, size: int, rate: int) -> Tensor:
    """Triangles ``(bands, size / 2 + 1)`` from 0 to half the rate, each of sum one; float64.

    Args:
        bands: Number of bands.
        size: Samples of a Fourier transform.
        rate: Samples a second.

    Raises:
        OptionError: So many bands that one lies between two bins.
    """
    highest = 2595 * math.log10(1 + rate / 2 / 700)
    mels = torch.linspace(0, highest, bands + 2, dtype=torch.float64)
    edges = 700 * (10 ** (mels / 2595) - 1)
    bins = torch.linspace(0, rate / 2, size // 2 + 1, dtype=torch.float64)
    left, centre, right = (edges[start : start + bands, None] for start in range(3))
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    sums = triangles.sum(1, keepdim=True)
    if bool((sums == 0).any()):
        raise OptionError(
            f"{bands} mel bands are too many for {size // 2 + 1} bins at {rate} samples a second: "
            "take fewer, or a longer transform"
        )
    return triangles / sums


@dataclass(frozen=True)
class Spectrogram:
    """The short-time Fourier transform with a Hann window, centred, and its inverse.

    Attributes:
        size: Samples of a transform.
        hop: Samples from one frame to the next.

    Raises:
        OptionError: Frames that would leave samples out.
    """

    size: int = 384
    hop: int = 128

    def __post_init__(self) -> None:
        if self.size < 2 or self.size % 2 or not 1 <= self.hop <= self.size // 2:
            raise OptionError(
                f"size is an even number and hop at most half of it, got size={self.size} and "
                f"hop={self.hop}: an inverse needs frames that overlap"
            )

    def __call__(self, x: Tensor) -> Tensor:
        """Clips ``(*, n)`` to complex ``(*, n // hop + 1, size / 2 + 1)``.

        Raises:
            DataError: The clips are no longer than half a transform.
        """
        if x.shape[-1] <= self.size // 2:
            raise DataError(
                f"a clip has {x.shape[-1]} samples, expected more than {self.size // 2}, half a "
                "transform: pad it, or take a smaller size"
            )
        flat = torch.stft(
            x.reshape(-1, x.shape[-1]), self.size, self.hop, window=self._window(x),
            return_complex=True, pad_mode="constant",
        )  # fmt: skip
        return flat.mT.reshape(*x.shape[:-1], -1, self.size // 2 + 1)

    def inverse(self, frames: Tensor, samples: int) -> Tensor:
        """Complex ``(*, T, size / 2 + 1)`` to the clips ``(*, samples)`` nearest to it."""
        flat = frames.reshape(-1, *frames.shape[-2:]).mT
        window = self._window(frames.real)
        x = torch.istft(flat, self.size, self.hop, window=window, length=samples)
        return x.reshape(*frames.shape[:-2], samples)

    def _window(self, like: Tensor) -> Tensor:
        return torch.hann_window(self.size, dtype=like.dtype, device=like.device)


def griffin_lim(
    magnitude: Tensor, spectrogram: Spectrogram, samples: int, *, steps: int = 60, seed: int = 0
) -> Tensor:
    """Clips ``(*, samples)`` whose spectrogram has about the ``magnitude`` ``(*, T, bins)``.

    Each step projects on the spectrograms that clips have, then on those of this magnitude, and
    goes 0.99 of the change further.

    Args:
        magnitude: ``|S|``, not negative.
        spectrogram: Its size and hop.
        samples: Length of the clips; T is ``samples // hop + 1``.
        steps: Number of steps.
        seed: Of the random phase at the start.
    """
    generator = torch.Generator(device=magnitude.device).manual_seed(seed)
    phase = torch.rand(
        magnitude.shape, generator=generator, dtype=magnitude.dtype, device=magnitude.device
    )
    angles, before = torch.polar(torch.ones_like(phase), 2 * math.pi * phase), None
    for _ in range(steps):
        rebuilt = spectrogram(spectrogram.inverse(magnitude * angles, samples))
        ahead = rebuilt if before is None else rebuilt + 0.99 * (rebuilt - before)
        angles, before = ahead / ahead.abs().clamp(min=1e-16), rebuilt
    return spectrogram.inverse(magnitude * angles, samples)


class LogMel:
    """Clips ``(*, samples)`` to log-mel spectrograms ``(*, frames, bands)`` and back.

    Args:
        rate: Samples a second.
        samples: Length of a clip.
        bands: Number of mel bands.
        spectrogram: Size and hop of the transform below.
        floor: Smallest power, of samples between -1 and 1; its logarithm is silence.
    """

    def __init__(
        self,
        rate: int,
        samples: int,
        *,
        bands: int = 40,
        spectrogram: Spectrogram | None = None,
        floor: float = 1e-4,
    ) -> None:
        self.rate, self.samples, self.bands, self.floor = rate, samples, bands, floor
        self.spectrogram = spectrogram or Spectrogram()
        self.filters = mel_filterbank(bands, self.spectrogram.size, rate)
        self.inverse_filters = torch.linalg.pinv(self.filters)

    @property
    def frames(self) -> int:
        """Frames of a clip whose centre lies in it."""
        return int(num_frames(self.samples, self.spectrogram.hop))

    @property
    def silence(self) -> float:
        """The number that silence has in every band."""
        return math.log(self.floor)

    def __call__(self, x: Tensor) -> Tensor:
        """Clips ``(*, samples)`` to ``(*, frames, bands)``.

        Raises:
            DataError: The clips have another length.
        """
        if x.shape[-1] != self.samples:
            raise DataError(
                f"a clip has {x.shape[-1]} samples, expected {self.samples}: cut or pad it with "
                "fit_length"
            )
        power = self.spectrogram(x).abs().square()[..., : self.frames, :]
        return (power @ self.filters.to(power).T).clamp(min=self.floor).log()

    def inverse(self, log_mel: Tensor, lengths: Tensor | None = None, *, steps: int = 60) -> Tensor:
        """``(*, frames, bands)`` to clips ``(*, samples)`` that sound alike.

        Args:
            log_mel: Log-mel spectrograms.
            lengths: Frames of each that count, ``(*,)``; what comes after is silent.
            steps: Of :func:`griffin_lim`.
        """
        power = log_mel.exp()
        power = torch.where(log_mel <= self.silence + 1e-3, torch.zeros_like(power), power)
        if lengths is not None:
            counts = torch.arange(power.shape[-2], device=power.device) < lengths[..., None]
            power = power * counts[..., None]
        magnitude = (power @ self.inverse_filters.to(power).T).clamp(min=0).sqrt()
        extra = self.samples // self.spectrogram.hop + 1 - magnitude.shape[-2]
        magnitude = torch.nn.functional.pad(magnitude, (0, 0, 0, extra))
        return griffin_lim(magnitude, self.spectrogram, self.samples, steps=steps)
