"""Scores of data from elsewhere: known areas, known errors, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from programs import IDENTITY, SE, ExactGuide, guide_near_posterior, linear_gaussian

from pvae.errors import DataError, OptionError
from pvae.out_of_distribution import auroc, detect, typicality, waic


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(2)
    model, x = linear_gaussian(1500)
    return model, ExactGuide(model), x


def test_shifted_data_are_told_apart_and_data_of_the_same_kind_are_not(pair):
    model, guide, x = pair
    found = detect(model, guide, x[:500], x[500:1000] + 8, reference=x[1000:], num_particles=2)
    for score in ("evidence", "typicality"):
        assert found[score].auroc.value > 0.99
        same = auroc(found[score].inside[:250], found[score].inside[250:])
        assert abs(same.value - 0.5) < SE * same.stderr
        assert 0.01 < same.stderr < 0.05
    expected = -model.log_evidence(x[:500]).detach()
    torch.testing.assert_close(found["evidence"].inside, expected, atol=1e-8, rtol=0)


def test_data_nearer_the_mode_fool_the_evidence_but_not_typicality(pair):
    """All data at the mode have a higher density than any that the model draws."""
    model, guide, x = pair
    mode = model.offset.detach().expand(200, 5)
    found = detect(model, guide, x[:500], mode, reference=x[1000:], num_particles=2)
    assert found["evidence"].auroc.value == 0
    assert found["typicality"].auroc.value > 0.8


def test_the_area_of_two_normals_is_known():
    torch.manual_seed(0)
    inside, outside = torch.randn(4000), 1 + torch.randn(3000)
    found = auroc(inside, outside)
    exact = 0.5 * (1 + math.erf(1 / 2))  # Phi(1 / sqrt 2)
    assert abs(found.value - exact) < SE * found.stderr
    assert auroc(outside, inside).value == pytest.approx(1 - found.value, abs=1e-12)


def test_ties_count_one_half():
    assert auroc([0.0, 1.0], [1.0, 2.0]).value == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert auroc([1.0, 1.0], [1.0]).value == 0.5


def test_the_bootstrap_error_is_the_spread_over_data_sets():
    torch.manual_seed(0)
    values, errors = [], []
    for seed in range(200):
        found = auroc(torch.randn(80), 0.7 + torch.randn(60), num_bootstrap=50, seed=seed)
        values.append(found.value)
        errors.append(found.stderr)
    spread = float(torch.tensor(values).std())
    # The relative error of a standard deviation of 200 values is 1 / sqrt(400).
    assert abs(sum(errors) / 200 / spread - 1) < SE / math.sqrt(400)


def test_groups_are_told_apart_more_surely_than_data():
    torch.manual_seed(0)
    reference, inside = -3 + torch.randn(5000).double(), -3 + torch.randn(2000).double()
    outside = -3.3 + torch.randn(2000).double()
    one = auroc(typicality(inside, reference), typicality(outside, reference))
    many = auroc(
        typicality(inside, reference, group_size=50), typicality(outside, reference, group_size=50)
    )
    assert many.value > one.value + SE * math.hypot(one.stderr, many.stderr)
    by_hand = (reference.mean() - inside[50:100].mean()).abs()
    found = typicality(inside[:120], reference, group_size=50)
    assert found.shape == (2,)
    torch.testing.assert_close(found[1], by_hand, atol=IDENTITY, rtol=0)


def test_waic_is_mean_less_variance():
    table = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    assert waic(table).tolist() == [2.0 - 2.0, 0.0 - 2.0]


def test_regret_is_what_one_encoder_for_all_costs(pair):
    """The posterior moved by m: its best member is itself, so the regret is the KL, m'Pm / 2."""
    model, _, x = pair
    guide = guide_near_posterior(model, move=0.5, widen=1.0)
    found = detect(model, guide, x[:6], x[6:9], reference=x, scores=["regret"], num_particles=4000)[
        "regret"
    ]
    with torch.no_grad():
        posterior = model.posterior(x[:1])
        moved = 0.5 * posterior.variance[0].sqrt()
        expected = 0.5 * moved @ posterior.precision_matrix[0] @ moved
    # The spread of a log weight is the same root of m'Pm for every datum.
    tolerance = SE * float((2 * expected).sqrt()) / math.sqrt(4000)
    assert float((found.inside - expected).abs().max()) < tolerance
    assert found.outside.shape == (3,)


@pytest.mark.parametrize(
    ("work", "error", "message"),
    [
        (lambda m, g, x: detect(m, g, x, x, reference=x, scores=["odd"]), OptionError, "no score"),
        (lambda m, g, x: detect(m, g, x, x, reference=x, scores=[]), OptionError, "at least one"),
        (lambda m, g, x: auroc([], [1.0]), DataError, "inside must be finite numbers"),
        (lambda m, g, x: auroc([1.0], [math.nan]), DataError, "outside must be .* 1 not finite"),
        (lambda m, g, x: auroc([1.0], [2.0], num_bootstrap=1), OptionError, "num_bootstrap must"),
        (lambda m, g, x: typicality([1.0], [1.0], group_size=2), OptionError, "between 1 and 1"),
        (lambda m, g, x: waic(x[:1]), DataError, "at least two runs"),
    ],
)
def test_wrong_inputs_get_one_sentence(pair, work, error, message):
    with pytest.raises(error, match=message):
        work(*pair)
