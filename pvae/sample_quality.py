"""How good samples are, judged offline: pure functions of two arrays of features.

No number here is a likelihood, and none is a training signal. ``real`` and ``samples`` are rows of
features ``(N, F)`` and ``(M, F)``: pixels, or the hidden layer of a classifier
(:mod:`pvae.image_features`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pvae.convolutions import image_shape_of
from pvae.errors import DataError

__all__ = [
    "DensityCoverage",
    "KernelTest",
    "PrecisionRecall",
    "TwoSampleTest",
    "classifier_two_sample_test",
    "density_coverage",
    "frechet_distance",
    "gradient_energy",
    "kernel_test",
    "mmd2",
    "precision_recall",
]


class PrecisionRecall(NamedTuple):
    """Share of samples near data, and share of data near samples."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """How many data's neighbourhoods a sample lies in, over k; share of data with a sample near."""

    density: float
    coverage: float


class KernelTest(NamedTuple):
    """The squared distance of two kernel means, and how often chance alone exceeds it."""

    mmd2: float
    p_value: float


class TwoSampleTest(NamedTuple):
    """A classifier's held-out accuracy with its interval, and the p-value of guessing."""

    accuracy: float
    low: float
    high: float
    p_value: float


def precision_recall(real: Any, samples: Any, *, k: int = 3) -> PrecisionRecall:
    """Whether each point lies within the k-th-neighbour ball of some point of the other set.

    Precision is the share of samples inside the data's manifold so drawn, recall the share of data
    inside the samples'. Kynkaanniemi et al. (2019), Improved precision and recall metric.

    Args:
        real: ``(N, F)``, N > k.
        samples: ``(M, F)``, M > k.
        k: Which neighbour sets the radius of a ball.
    """
    x, y = _two(real, samples, k)
    distances = torch.cdist(x, y)
    inside_real = (distances <= _radii(x, k)[:, None]).any(0)
    inside_samples = (distances <= _radii(y, k)[None, :]).any(1)
    return PrecisionRecall(
        float(inside_real.double().mean()), float(inside_samples.double().mean())
    )


def density_coverage(real: Any, samples: Any, *, k: int = 5) -> DensityCoverage:
    """Precision and recall that one outlier does not spoil, about the data's balls alone.

    ``density = sum_ij 1[y_j in ball_k(x_i)] / (k M)`` and ``coverage`` is the share of balls that
    hold a sample. For samples of the data's own distribution E[density] = 1 and, with N = M,
    ``E[coverage] = 1 - prod_(i <= k) (N - i) / (2 N - i)``, about 0.97 at k = 5. Naeem et al.
    (2020), Reliable fidelity and diversity metrics.

    Args:
        real: ``(N, F)``, N > k.
        samples: ``(M, F)``.
        k: Which neighbour sets the radius of a ball.
    """
    x, y = _two(real, samples, k)
    inside = torch.cdist(x, y) < _radii(x, k)[:, None]
    density = float(inside.double().sum()) / (k * len(y))
    return DensityCoverage(density, float(inside.any(1).double().mean()))


def mmd2(real: Any, samples: Any, *, bandwidth: float | None = None) -> float:
    """The unbiased squared maximum mean discrepancy; zero in expectation for equal distributions.

    The kernel is ``exp(-|x - y|^2 / (2 h^2))``. Gretton et al. (2012), A kernel two-sample test.

    Args:
        real: ``(N, F)``.
        samples: ``(M, F)``.
        bandwidth: h; the median distance within the two sets together if left out.
    """
    x, y = _two(real, samples, 1)
    kernel = _kernel(torch.cat([x, y]), bandwidth)
    return float(_mmd2(kernel, torch.arange(len(x) + len(y))[None] < len(x)))


def kernel_test(
    real: Any,
    samples: Any,
    *,
    bandwidth: float | None = None,
    permutations: int = 500,
    seed: int = 0,
) -> KernelTest:
    """:func:`mmd2` with the p-value of a permutation test, ``(1 + exceeded) / (1 + permutations)``.

    Args:
        real: ``(N, F)``.
        samples: ``(M, F)``.
        bandwidth: As for :func:`mmd2`.
        permutations: How often the two sets are mixed.
        seed: Seed of the mixing.
    """
    x, y = _two(real, samples, 1)
    kernel = _kernel(torch.cat([x, y]), bandwidth)
    is_real = torch.arange(len(x) + len(y)) < len(x)
    generator = torch.Generator().manual_seed(seed)
    mixed = [
        is_real[torch.randperm(len(is_real), generator=generator)] for _ in range(permutations)
    ]
    values = _mmd2(kernel, torch.stack([is_real, *mixed]))
    exceeded = int((values[1:] >= values[0]).sum())
    return KernelTest(float(values[0]), (1 + exceeded) / (1 + permutations))


def classifier_two_sample_test(real: Any, samples: Any, *, seed: int = 0) -> TwoSampleTest:
    """How well a small neural network tells held-out samples from data; 1/2 is as good as equal.

    Half of both sets trains a network of one hidden layer of 32, on standardised features; the
    other half judges it. The interval is Clopper and Pearson's, 95 %. Lopez-Paz & Oquab (2017),
    Revisiting classifier two-sample tests.

    Args:
        real: ``(N, F)``.
        samples: ``(M, F)``; the larger set is cut to the size of the smaller.
        seed: Seed of the split and of the network.
    """
    from scipy.stats import binomtest
    from sklearn.neural_network import MLPClassifier

    x, y = _two(real, samples, 4)
    size = min(len(x), len(y))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.cat([x[:size], y[:size]])
    labels = torch.arange(2 * size) < size
    order = torch.cat(
        [half + torch.randperm(size, generator=generator) for half in (0, size)]
    ).reshape(2, size)
    train, test = (part.reshape(-1) for part in (order[:, : size // 2], order[:, size // 2 :]))
    scale = rows[train].std(0)
    rows = (rows - rows[train].mean(0)) / scale.where(scale > 0, torch.ones(()).double())
    network = MLPClassifier((32,), alpha=1e-2, max_iter=60, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it need not converge to be a fair test
        network.fit(rows[train].numpy(), labels[train].numpy())
    right = int((network.predict(rows[test].numpy()) == labels[test].numpy()).sum())
    result = binomtest(right, len(test), 0.5, alternative="greater")
    interval = binomtest(right, len(test)).proportion_ci(0.95, "exact")
    return TwoSampleTest(
        right / len(test), float(interval.low), float(interval.high), float(result.pvalue)
    )


def frechet_distance(real: Any, samples: Any) -> float:
    """``|m - n|^2 + tr(S + T - 2 (S T)^(1/2))``, with means and covariances of the features.

    The squared Frechet distance of two Gaussians. On features of a classifier of one's own it is
    not the number that papers call FID, whose features are Inception's.

    Args:
        real: ``(N, F)``.
        samples: ``(M, F)``.
    """
    x, y = _two(real, samples, 1)
    first, second = (torch.cov(z.T).reshape(z.shape[1], z.shape[1]) for z in (x, y))
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    shift = (x.mean(0) - y.mean(0)).square().sum()
    return float(shift + first.trace() + second.trace() - 2 * cross)


def gradient_energy(images: Any, image_shape: Sequence[int] | None = None) -> Tensor:
    """Sharpness of each image: the mean squared difference of neighbouring pixels, ``(N,)``.

    A mean of many possible images, which is what a VAE draws, has less of it than each of them.

    Args:
        images: Rows ``(N, x_dim)``.
        image_shape: ``(H, W)``, ``(C, H, W)`` or ``(H, W, C)``; a square if left out.
    """
    rows = torch.as_tensor(images).double()
    pictures = image_shape_of(rows.shape[1], image_shape).to_images(rows)
    across = pictures.diff(dim=-1).square().flatten(1).mean(1)
    down = pictures.diff(dim=-2).square().flatten(1).mean(1)
    return across + down


# --- parts ---------------------------------------------------------------------------------------


def _two(real: Any, samples: Any, k: int) -> tuple[Tensor, Tensor]:
    x, y = (torch.as_tensor(np.asarray(a)).double().flatten(1) for a in (real, samples))
    if x.shape[1] != y.shape[1]:
        raise DataError(f"data have {x.shape[1]} features but samples {y.shape[1]}")
    if min(len(x), len(y)) <= k:
        raise DataError(f"{len(x)} data and {len(y)} samples are too few: give more than {k} each")
    for name, z in (("data", x), ("samples", y)):
        if not bool(torch.isfinite(z).all()):
            raise DataError(f"the features of the {name} are not all finite: leave those rows out")
    return x, y


def _radii(points: Tensor, k: int) -> Tensor:
    """Distance of each point to its k-th neighbour, itself not counted."""
    return torch.cdist(points, points).kthvalue(k + 1, dim=1).values


def _kernel(points: Tensor, bandwidth: float | None) -> Tensor:
    squared = torch.cdist(points, points).square()
    if bandwidth is None:
        above = squared[tuple(torch.triu_indices(len(points), len(points), 1))]
        bandwidth = math.sqrt(float(above.median())) or 1.0
    return torch.exp(-squared / (2 * bandwidth**2))


def _mmd2(kernel: Tensor, is_real: Tensor) -> Tensor:
    """For each row of ``is_real`` ``(P, N + M)``: which points are data, which samples."""
    first, second = is_real.double(), (~is_real).double()
    to_first, to_second = first @ kernel, second @ kernel
    n, m = first.sum(1), second.sum(1)
    within_first = (to_first * first).sum(1) - n  # the diagonal is one everywhere
    within_second = (to_second * second).sum(1) - m
    between = (to_first * second).sum(1)
    return within_first / (n * (n - 1)) + within_second / (m * (m - 1)) - 2 * between / (n * m)
