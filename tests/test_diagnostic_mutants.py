"""Wrong diagnostics that must fail the checks that the right ones pass."""

from __future__ import annotations

import math

import pytest
import torch
from programs import SE
from scipy import stats

from pvae import log_weights as algebra
from pvae.evidence.calibration import Calibration, ranks_of, uniformity

# --- ranks ---------------------------------------------------------------------------------------


def check_ranks(ranks):
    """Exact posteriors of a coin and of a normal: ranks are uniform, ties or not."""
    torch.manual_seed(0)
    for draw in (lambda *s: torch.randn(*s), lambda *s: (torch.rand(*s) < 0.3).double()):
        found = ranks(draw(4000), draw(19, 4000))
        assert int(found.min()) >= 0
        assert int(found.max()) <= 19
        counts = torch.bincount(found, minlength=20).double()
        assert stats.chisquare(counts.numpy()).pvalue > 5e-4
    assert ranks(torch.ones(2), torch.zeros(19, 2)).tolist() == [19, 19]


WRONG_RANKS = {
    "ties count as below": lambda truth, draws: (draws <= truth).sum(0),
    "ties count as above": lambda truth, draws: (draws < truth).sum(0),
    "half of the ties": lambda truth, draws: (draws < truth).sum(0) + (draws == truth).sum(0) // 2,
    "off by one": lambda truth, draws: (ranks_of(truth, draws) + 1).clamp(max=19),
    "upside down": lambda truth, draws: 19 - ranks_of(truth, draws),
    "coin for all ties or none": lambda truth, draws: (
        (draws < truth).sum(0) + (draws == truth).sum(0) * (torch.rand(truth.shape) < 0.5)
    ),
}


def test_right_ranks_pass():
    check_ranks(ranks_of)


@pytest.mark.parametrize("name", WRONG_RANKS)
def test_wrong_ranks_fail(name):
    with pytest.raises(AssertionError):
        check_ranks(WRONG_RANKS[name])


# --- coverage ------------------------------------------------------------------------------------


def narrow_ranks(widen, shift=0.0, number=4000, draws=99):
    torch.manual_seed(1)
    truth, draw = torch.randn(number), shift + widen * torch.randn(draws, number)
    return Calibration(("z",), ranks_of(truth, draw)[:, None], draws)


def check_coverage(coverage):
    """Central intervals of N(shift, w): ``P(|Z - shift| < w q)``, by the normal distribution."""
    for widen, shift in ((1.0, 0.0), (0.7, 0.0), (1.0, 0.8)):
        for level in (0.5, 0.8, 0.95):
            quantile = widen * stats.norm.ppf((1 + level) / 2)
            truth = stats.norm.cdf(shift + quantile) - stats.norm.cdf(shift - quantile)
            found = coverage(narrow_ranks(widen, shift), level)
            assert abs(found - truth) < SE * math.sqrt(truth * (1 - truth) / 4000) + 0.006


def position(found):
    return (found.ranks[:, 0] + 0.5) / (found.num_draws + 1)


WRONG_COVERAGE = {
    "lower tail alone": lambda found, c: float((position(found) < c).double().mean()),
    "upper tail alone": lambda found, c: float((position(found) > 1 - c).double().mean()),
    "outside": lambda found, c: 1 - float(found.coverage([c])[0, 0]),
    "half-width": lambda found, c: float(((position(found) - 0.5).abs() < c).double().mean()),
    "nominal": lambda found, c: c,
}


def test_right_coverage_passes():
    check_coverage(lambda found, level: float(found.coverage([level])[0, 0]))


@pytest.mark.parametrize("name", WRONG_COVERAGE)
def test_wrong_coverage_fails(name):
    with pytest.raises(AssertionError):
        check_coverage(WRONG_COVERAGE[name])


# --- p-values ------------------------------------------------------------------------------------


def check_p_values(p_values):
    """Uniform under uniform ranks; tiny for ranks of a posterior 20 % too narrow."""
    torch.manual_seed(2)
    uniform = p_values(torch.randint(0, 100, (2000, 500)))
    for rate in (0.05, 0.5):
        error = SE * math.sqrt(rate * (1 - rate) / 500) + 0.01
        assert abs(float((uniform < rate).double().mean()) - rate) < error
    narrow = torch.cat([narrow_ranks(0.8, number=2000).ranks for _ in range(3)], 1)
    assert float(p_values(narrow).max()) < 5e-4


def chi_square(ranks, degrees=19, bins=20):
    counts = torch.stack([(ranks * bins // 100 == k).sum(0) for k in range(bins)]).double()
    expected = len(ranks) / bins
    statistic = ((counts - expected) ** 2 / expected).sum(0)
    return torch.special.gammaincc(torch.full_like(statistic, degrees / 2), statistic / 2)


WRONG_P_VALUES = {
    "other tail": lambda ranks: 1 - uniformity(ranks, 99)[0],
    "degrees of freedom doubled": lambda ranks: chi_square(ranks, 38),
    "degrees of freedom halved": lambda ranks: chi_square(ranks, 9.5),
    "no root of N": lambda ranks: uniformity(ranks[:20], 99)[1],
    "one rank too many": lambda ranks: uniformity(ranks + (ranks > 49).long() * 5, 104, 21)[0],
}


def test_right_p_values_pass():
    check_p_values(lambda ranks: uniformity(ranks, 99)[0])
    check_p_values(lambda ranks: uniformity(ranks, 99)[1])


@pytest.mark.parametrize("name", WRONG_P_VALUES)
def test_wrong_p_values_fail(name):
    with pytest.raises(AssertionError):
        check_p_values(WRONG_P_VALUES[name])


# --- tails and errors ----------------------------------------------------------------------------


def check_tail(khat):
    torch.manual_seed(3)
    for shape in (0.2, 0.7):
        log_weights = -shape * torch.rand(10_000, 60, dtype=torch.float64).log()
        assert abs(float(khat(log_weights).mean()) - shape) < 0.04


WRONG_TAILS = {
    "weights negated": lambda w: algebra.pareto_k(-w),
    "weights for logs": lambda w: algebra.pareto_k(w.exp()),
    "joint over the data": lambda w: algebra.pareto_k(w.sum(1, keepdim=True)),
    "half the log": lambda w: algebra.pareto_k(0.5 * w),
}


def test_right_tail_passes():
    check_tail(algebra.pareto_k)


@pytest.mark.parametrize("name", WRONG_TAILS)
def test_wrong_tails_fail(name):
    with pytest.raises(AssertionError):
        check_tail(WRONG_TAILS[name])


def check_paired_error(error):
    """SE of the mean of ``best - encoder`` at the same noise is its spread over repetitions."""
    torch.manual_seed(4)
    common = 3 * torch.randn(200, 2000, dtype=torch.float64)
    own = 0.3 * torch.randn(200, 2000, dtype=torch.float64)
    best, encoder = common, common + own
    spread = float((best - encoder).mean(0).std())
    assert float(error(best, encoder).mean()) == pytest.approx(spread, rel=0.1)


WRONG_ERRORS = {
    "unpaired": lambda a, b: torch.hypot(a.std(0), b.std(0)) / math.sqrt(200),
    "variance for sd": lambda a, b: (a - b).var(0) / math.sqrt(200),
    "sd, not of the mean": lambda a, b: (a - b).std(0),
    "K for its root": lambda a, b: (a - b).std(0) / 200,
}


def test_right_error_passes():
    check_paired_error(lambda a, b: (a - b).std(0) / math.sqrt(200))


@pytest.mark.parametrize("name", WRONG_ERRORS)
def test_wrong_errors_fail(name):
    with pytest.raises(AssertionError):
        check_paired_error(WRONG_ERRORS[name])


# --- information ---------------------------------------------------------------------------------


def check_information(split):
    """q(z|x) = N(x, 0.49) with x ~ N(0, 2): all three terms are known."""
    torch.manual_seed(5)
    x = math.sqrt(2) * torch.randn(2000, dtype=torch.float64)
    z = x + 0.7 * torch.randn(2000, dtype=torch.float64)
    normal = torch.distributions.Normal
    log_q = normal(x, 0.7).log_prob(z)
    pairs = normal(x[None], 0.7).log_prob(z[:, None])
    log_p = normal(0.0, 1.0).log_prob(z)
    mutual, marginal = split(log_q, pairs, log_p)
    variance = 2.49
    assert abs(mutual - 0.5 * math.log(variance / 0.49)) < 0.1
    assert abs(marginal - 0.5 * (variance - 1 - math.log(variance))) < 0.15


def right_split(log_q, pairs, log_p):
    aggregate = pairs.logsumexp(1) - math.log(pairs.shape[1])
    return float((log_q - aggregate).mean()), float((aggregate - log_p).mean())


WRONG_SPLITS = {
    "sign of the information": lambda q, pairs, p: (
        -right_split(q, pairs, p)[0],
        right_split(q, pairs, p)[1],
    ),
    "no -log N": lambda q, pairs, p: (
        float((q - pairs.logsumexp(1)).mean()),
        float((pairs.logsumexp(1) - p).mean()),
    ),
    "mean of logs": lambda q, pairs, p: (
        float((q - pairs.mean(1)).mean()),
        float((pairs.mean(1) - p).mean()),
    ),
    "mixture over the draws": lambda q, pairs, p: right_split(
        q, pairs.T.sort(1).values.cumsum(1), p
    ),
    "whole KL as information": lambda q, pairs, p: (float((q - p).mean()), 0.0),
}


def test_right_split_passes():
    check_information(right_split)


@pytest.mark.parametrize("name", WRONG_SPLITS)
def test_wrong_splits_fail(name):
    with pytest.raises(AssertionError):
        check_information(WRONG_SPLITS[name])
