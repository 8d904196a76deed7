"""Scores of synthetic codes whose disentanglement is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pvae.disentanglement import dci, disentanglement, factor_vae, mig, sap
from pvae.errors import DataError, OptionError

SIZES = (4, 5, 6)


@pytest.fixture(scope="module")
def factors():
    """A full factorial design, 20 times over."""
    grid = np.stack(np.meshgrid(*map(np.arange, SIZES), indexing="ij"), -1).reshape(-1, 3)
    return np.tile(grid, (20, 1))


def noisy(codes, amount=0.02, seed=0):
    return codes + amount * np.random.default_rng(seed).normal(size=codes.shape)


def reflection():
    """Each dimension is -2/3 of two factors and 1/3 of the third: two know as much of a factor."""
    return np.eye(3) - 2 / 3


def standard(factors):
    return (factors - factors.mean(0)) / factors.std(0)


def test_codes_that_are_the_factors_score_one(factors):
    codes = noisy(standard(factors))[:, [2, 0, 1]]
    extra = np.random.default_rng(1).normal(size=(len(codes), 1))
    found = disentanglement(np.hstack([codes, extra]), factors)
    # The plug-in information of a dimension of noise is about (bins - 1)(C - 1) / 2N.
    assert found.mig == pytest.approx(1, abs=0.03)
    assert found.dci.disentanglement > 0.98
    assert found.dci.completeness > 0.98
    assert found.dci.informativeness > 0.98
    assert found.sap > 0.95
    assert found.factor_vae == 1
    assert found.dci.importance.argmax(1)[:3].tolist() == [2, 0, 1]
    assert "MIG" in found.report()


def test_rotated_codes_score_low_though_they_know_all(factors):
    codes = noisy(standard(factors)) @ reflection()
    found = disentanglement(codes, factors)
    assert found.mig < 0.1
    assert found.sap < 0.1
    assert found.dci.disentanglement < 0.5
    assert found.dci.completeness < 0.5
    assert found.dci.informativeness > 0.8
    assert found.factor_vae < 0.9


def test_one_factor_in_two_dimensions_is_disentangled_but_not_complete(factors):
    """The two share its importance: completeness of that factor is ``1 - log 2 / log 4``."""
    codes = noisy(standard(factors))
    doubled = np.hstack([codes, noisy(standard(factors)[:, :1], seed=5)])
    found = dci(doubled, factors)
    assert found.disentanglement > 0.98
    assert found.completeness == pytest.approx((2 + 1 - math.log(2) / math.log(4)) / 3, abs=0.05)
    assert mig(doubled, factors) == pytest.approx(2 / 3, abs=0.03)
    assert sap(doubled, factors) == pytest.approx(2 / 3, abs=0.03)


def test_two_factors_in_one_dimension_are_complete_but_not_disentangled():
    grid = np.stack(np.meshgrid(np.arange(2), np.arange(2), indexing="ij"), -1).reshape(-1, 2)
    factors = np.tile(grid, (300, 1))
    code = noisy((2 * factors[:, 0] + factors[:, 1])[:, None].astype(float))
    codes = np.hstack([code, np.zeros_like(code)])
    found = dci(codes, factors)
    assert found.completeness > 0.99
    assert found.disentanglement < 0.05  # one bit of each
    assert found.informativeness > 0.99


def test_the_gap_of_information_is_known():
    """One dimension is the factor, another a quarter wrong: ``1 - I / log 2`` of that channel."""
    rng = np.random.default_rng(0)
    factor = rng.integers(0, 2, 40_000)
    wrong = rng.random(40_000) < 0.25
    codes = np.stack([factor, factor ^ wrong], 1).astype(float)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    expected = 1 - (math.log(2) - entropy) / math.log(2)
    assert mig(codes, factor) == pytest.approx(expected, abs=0.02)
    assert sap(codes, factor) == pytest.approx(1 - 0.5, abs=0.02)


def test_permuted_labels_score_nothing(factors):
    rng = np.random.default_rng(3)
    shuffled = np.stack([rng.permutation(v) for v in factors.T], 1)
    found = disentanglement(noisy(standard(factors)), shuffled)
    assert found.mig < 0.03
    assert found.sap < 0.06
    assert abs(found.dci.informativeness) < 0.06
    # Chance is 1/K; a majority of lucky votes adds a little.
    assert found.factor_vae < 1 / 3 + 0.12


def test_a_constant_code_is_no_error_and_scores_nothing(factors):
    constant = np.full((len(factors), 2), 0.1)
    found = disentanglement(constant, factors)
    assert (found.mig, found.sap, found.factor_vae) == (0, 0, 0)
    assert found.dci.disentanglement == found.dci.completeness == 0
    assert found.dci.informativeness == pytest.approx(0, abs=0.05)
    beside = np.hstack([noisy(standard(factors)), constant])
    assert disentanglement(beside, factors).factor_vae == 1
    assert mig(beside, factors) > 0.97


def test_scores_depend_on_the_seed_alone(factors):
    codes = torch.from_numpy(noisy(standard(factors), 3))
    first = disentanglement(codes, torch.from_numpy(factors), seed=1)
    again = disentanglement(codes.numpy(), factors, seed=1)
    assert first.rows() == again.rows()
    assert factor_vae(codes, factors, seed=2) != factor_vae(codes, factors, seed=1)


@pytest.mark.parametrize(
    ("codes", "factors", "message"),
    [
        (np.zeros((9, 2)), np.zeros((8, 2), dtype=int), "equally many rows"),
        (np.zeros(9), np.zeros(9, dtype=int), "equally many rows"),
        (np.full((9, 2), np.nan), np.arange(9) % 2, "must be finite, got 18"),
        (np.zeros((9, 2)), np.zeros(9), "whole numbers, got float64"),
        (np.zeros((9, 2)), np.zeros(9, dtype=int), "factor 0 has one value"),
        (np.zeros((9, 2)), np.arange(9) % 3, "9 rows are too few for factors of 3 values"),
    ],
)
def test_wrong_data_get_one_sentence(codes, factors, message):
    with pytest.raises(DataError, match=message):
        disentanglement(codes, factors)


def test_wrong_options_get_one_sentence(factors):
    with pytest.raises(OptionError, match="bins must be at least 2"):
        mig(factors, factors, bins=1)
    with pytest.raises(OptionError, match="num_votes must be at least 1"):
        factor_vae(factors, factors, num_votes=0)
