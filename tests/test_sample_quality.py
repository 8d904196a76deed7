"""Measures of samples, on equal, shifted and collapsed samples with known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pvae import sample_quality as quality
from pvae.errors import DataError
from pvae.image_features import train_classifier


def normal(size, seed, *, shift=0.0, scale=1.0, dims=4):
    generator = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(size, dims, generator=generator, dtype=torch.float64)


def collapsed(size, seed):
    """One of five points, again and again."""
    points = normal(5, seed)
    return points[torch.arange(size) % 5] + 1e-4 * normal(size, seed + 1)


# --- neighbours ----------------------------------------------------------------------------------


def test_equal_distributions_have_density_one_and_the_expected_coverage():
    n, k = 400, 5
    rounds = [
        quality.density_coverage(normal(n, 2 * r), normal(n, 2 * r + 1), k=k) for r in range(12)
    ]
    expected = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    assert abs(expected - 0.97) < 0.005
    for column, truth in ((0, 1.0), (1, expected)):
        values = np.array([each[column] for each in rounds])
        assert abs(values.mean() - truth) < 4.5 * values.std(ddof=1) / math.sqrt(12)


def test_a_ball_that_counts_its_own_centre_as_a_neighbour_is_caught(monkeypatch):
    monkeypatch.setattr(quality, "_radii", lambda x, k: torch.cdist(x, x).kthvalue(k, dim=1).values)
    values = [
        quality.density_coverage(normal(400, 2 * r), normal(400, 2 * r + 1)).density
        for r in range(12)
    ]
    assert abs(np.mean(values) - 1) > 4.5 * np.std(values, ddof=1) / math.sqrt(12)


def test_precision_and_recall_tell_fidelity_from_diversity():
    real = normal(500, 0)
    same = quality.precision_recall(real, normal(500, 1))
    assert min(same) > 0.8
    far = quality.precision_recall(real, normal(500, 1, shift=20.0))
    assert far == (0.0, 0.0)
    few = quality.precision_recall(real, collapsed(500, 2))
    assert few.precision > 0.5
    assert few.recall < 0.05
    wide = quality.precision_recall(real, normal(500, 3, scale=4.0))
    assert wide.precision < 0.5
    assert wide.recall > 0.9


def test_neighbours_by_hand_on_a_line():
    real, samples = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.5], [9.0], [9.5]])
    # Balls of the first neighbour: [-1, 1], [0, 2], [1, 5] around data.
    found = quality.density_coverage(real, samples, k=1)
    assert found.density == pytest.approx(2 / 3)
    assert found.coverage == pytest.approx(2 / 3)
    both = quality.precision_recall(real, samples, k=1)
    assert both.precision == pytest.approx(1 / 3)
    assert both.recall == pytest.approx(1.0)  # 0.5 reaches 8.5 either way


def test_coverage_sees_a_lost_mode_that_density_does_not():
    two = torch.cat([normal(300, 0), normal(300, 1, shift=30.0)])
    found = quality.density_coverage(two, normal(600, 2))
    assert found.density > 0.8
    assert found.coverage < 0.6


# --- kernels and classifiers ---------------------------------------------------------------------


def test_mmd2_is_unbiased_and_may_be_negative():
    values = np.array([
        quality.mmd2(normal(60, 2 * r), normal(60, 2 * r + 1), bandwidth=2.0) for r in range(60)
    ])  # fmt: skip
    assert abs(values.mean()) < 4.5 * values.std(ddof=1) / math.sqrt(60)
    assert values.min() < 0


def test_mmd2_has_its_known_value_for_two_normals():
    """``E k(x, y) = (h^2 / (h^2 + 2))^(D/2) exp(-|m|^2 / (2 (h^2 + 2)))`` for unit normals."""
    h, shift, dims = 1.5, 0.7, 3
    factor = (h**2 / (h**2 + 2)) ** (dims / 2)
    truth = 2 * factor * (1 - math.exp(-dims * shift**2 / (2 * (h**2 + 2))))
    values = np.array([
        quality.mmd2(
            normal(15, 2 * r, dims=dims),
            normal(12, 2 * r + 1, shift=shift, dims=dims),
            bandwidth=h,
        )
        for r in range(300)
    ])  # fmt: skip
    error = values.std(ddof=1) / math.sqrt(300)
    assert abs(values.mean() - truth) < 4.5 * error
    biased = truth + (1 / 15 + 1 / 12) * (1 - factor)  # the V-statistic would be off by this
    assert abs(values.mean() - biased) > 4.5 * error


def test_permutation_p_values_are_uniform_under_equality_and_small_otherwise():
    pairs = [(normal(40, 2 * r), normal(40, 2 * r + 1)) for r in range(80)]
    p = np.array([quality.kernel_test(*each, permutations=99).p_value for each in pairs])
    assert abs((p <= 0.2).mean() - 0.2) < 4.5 * math.sqrt(0.16 / 80)
    assert quality.kernel_test(normal(60, 0), normal(60, 1, shift=1.0)).p_value < 0.01


def test_the_classifier_cannot_tell_equal_sets_and_tells_others():
    same = [
        quality.classifier_two_sample_test(normal(300, r), normal(300, 9 + r)) for r in range(3)
    ]
    assert abs(sum(each.accuracy for each in same) / 3 - 0.5) < 4.5 * 0.5 / math.sqrt(900)
    assert all(each.low < each.accuracy < each.high for each in same)
    other = quality.classifier_two_sample_test(normal(400, 0), normal(400, 1, scale=3.0))
    assert other.low > 0.6
    assert other.p_value < 1e-6
    assert quality.classifier_two_sample_test(normal(400, 0), collapsed(400, 3)).accuracy > 0.75


def test_frechet_distance_has_its_closed_form():
    x = normal(2000, 0, dims=2)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    root = torch.tensor([[2.0, 0.0], [0.6, 0.5]]).double()
    mean = torch.tensor([1.0, -2.0]).double()
    y = x @ root.T + mean
    covariance = root @ root.T
    truth = 5.0 + 2.0 + covariance.trace() - 2 * torch.linalg.eigvalsh(covariance).sqrt().sum()
    assert quality.frechet_distance(x, y) == pytest.approx(float(truth), rel=1e-8)
    assert quality.frechet_distance(x, x) == pytest.approx(0.0, abs=1e-8)


# --- images --------------------------------------------------------------------------------------


def test_gradient_energy_by_hand_and_of_a_mean_of_images():
    board = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).reshape(1, 4)
    assert float(quality.gradient_energy(board)[0]) == pytest.approx(2.0)
    assert float(quality.gradient_energy(torch.ones(1, 4))[0]) == 0.0
    noise = torch.rand(64, 100, generator=torch.Generator().manual_seed(0))
    blurred = noise.reshape(16, 4, 100).mean(1)
    share = quality.gradient_energy(blurred).mean() / quality.gradient_energy(noise).mean()
    assert float(share) == pytest.approx(0.25, rel=0.1)
    assert quality.gradient_energy(torch.rand(2, 60), (4, 5, 3)).shape == (2,)


def test_a_small_classifier_learns_and_gives_features():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (600,), generator=generator)
    x = 0.2 * torch.randn(600, 8, 8, generator=generator)
    x[labels == 1, :, :4] += 1.0
    state = torch.get_rng_state()
    classifier = train_classifier(x.flatten(1), labels, num_features=6, epochs=3)
    assert torch.equal(state, torch.get_rng_state())
    assert classifier.accuracy(x.flatten(1), labels) > 0.95
    assert classifier.features(x.flatten(1)).shape == (600, 6)
    with pytest.raises(DataError, match="as many labels"):
        train_classifier(x.flatten(1), labels[:3])


@pytest.mark.parametrize(
    ("real", "samples", "words"),
    [(normal(9, 0), normal(9, 0, dims=3), "4 features but samples 3"),
     (normal(3, 0), normal(9, 0), "too few"), (normal(9, 0), normal(9, 0) * math.nan, "finite")],
)  # fmt: skip
def test_unfit_arrays_are_refused(real, samples, words):
    with pytest.raises(DataError, match=words):
        quality.precision_recall(real, samples)
