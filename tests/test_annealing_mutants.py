"""Wrong annealed estimators that must fail the very checks that the right ones pass.

The checks rest on what is exact in expectation whatever the number of temperatures: a forward
weight has the mean ``p(x)``, a reverse weight ``1 / p(x)``, and ``p(x)`` over the mean of weights
with one posterior draw among them has the mean one.
"""

from __future__ import annotations

import dataclasses
import math
import sys

import pytest
import torch
from exact_pairs import factor_analysis, gamma_poisson
from programs import SE, z_score

import pvae.evidence
from pvae import log_weights as algebra
from pvae import particles as waist
from pvae.evidence import annealing, hamiltonian, importance_upper, simulate
from pvae.evidence.hamiltonian import move as right_move
from pvae.evidence.importance import evaluation
from pvae.evidence.paths import Path, Point
from pvae.particles import unconstrained

bounds = sys.modules["pvae.evidence.sandwich"]  # the package's names of these are functions
resampling = sys.modules["pvae.evidence.smc"]

FEW = {"num_leapfrog": 2, "max_pairs": 10**6}


def off(log_ratio):
    """Standard errors over the data by which the mean of ``exp(log_ratio)`` is off one."""
    return float(z_score(log_ratio.exp(), 1.0))


def check_estimate(found, truth):
    """Unbiased over the data, and within the errors that it gives itself."""
    error = found.log_evidence - truth
    assert off(error) < SE
    assert float(error.sum().abs() / found.stderr.square().sum().sqrt()) < SE


def check_forward():
    """Few temperatures from the guide, where each counts; more of them from the prior."""
    pair = gamma_poisson()
    x = pair.data(1200)
    found = pvae.evidence.annealed(
        pair.model, pair.guide, x, num_chains=16, num_temperatures=3, **FEW
    )
    assert off(found.log_evidence - pair.log_evidence(x)) < SE
    x = pair.data(200)
    found = pvae.evidence.annealed(
        pair.model, None, x, num_chains=32, num_temperatures=16, start="prior",
        target_acceptance=0.5, **{**FEW, "max_pairs": 16 * 200},
    )  # fmt: skip
    check_estimate(found, pair.log_evidence(x))


def check_smc():
    pair = gamma_poisson()
    x = pair.data(300)
    found = pvae.evidence.smc(
        pair.model, None, x, num_particles=128, num_groups=32, num_temperatures=16, start="prior",
        ess_threshold=1.0, **FEW,
    )  # fmt: skip
    check_estimate(found, pair.log_evidence(x))
    error = (found.log_evidence - pair.log_evidence(x)) / found.stderr
    assert 0.8 < float(error.std()) < 1.2


def check_reverse():
    pair = factor_analysis(2, move=0.4, widen=1.15)
    lower, upper = found = pvae.evidence.sandwich(
        pair.model, pair.guide, 1000, num_chains=16, num_temperatures=4, **FEW
    )
    truth = pair.log_evidence(found.simulated.x)
    assert off(lower.log_evidence - truth) < SE
    assert off(truth - upper.log_evidence) < SE
    above = upper.log_evidence - truth
    assert float(above.mean()) > -SE * float(above.std()) / math.sqrt(len(above))


def check_upper():
    pair = factor_analysis(2, move=0.4, widen=1.15)
    simulated = simulate(pair.model, pair.guide, 4000)
    found = importance_upper(pair.model, pair.guide, simulated, 8, max_pairs=10**6)
    assert off(pair.log_evidence(simulated.x) - found.log_evidence) < SE
    above = found.log_evidence - pair.log_evidence(simulated.x)
    assert float(above.mean()) > -SE * float(above.std()) / math.sqrt(len(above))


def check_move(move):
    """Exact posterior draws, moved six times, still have the posterior's moments."""
    pair = gamma_poisson()
    x = torch.tensor([[2.0, 0.0, 3.0]]).double()
    torch.manual_seed(1)
    posterior = torch.distributions.Gamma(2 + x.sum(), torch.tensor(3.5).double())
    layout = waist.inspect(pair.model, pair.guide, x)
    beta, step = torch.ones(1).double(), torch.tensor([[0.55]]).double()
    with evaluation(pair.model, pair.guide, seed=2, device=x.device):
        evaluate = Path(pair.model, pair.guide, layout).on(x)
        point = evaluate(posterior.sample((40_000, 1, 1)).log())
        for _ in range(6):
            point, acceptance = move(evaluate, point, beta, step, 3)
    assert 0.3 < float(acceptance.mean()) < 0.95
    z = point.flat[:, 0, 0].exp()
    log_mean = torch.digamma(posterior.concentration) - posterior.rate.log()
    assert float(z_score(z, posterior.mean)) < SE
    assert float(z_score(z.log(), log_mean)) < SE
    assert float(z_score(z**2, posterior.mean**2 + posterior.variance)) < SE


@pytest.mark.parametrize("check", [check_forward, check_smc, check_reverse, check_upper])
def test_right_estimators_pass(check):
    check()


# --- moves --------------------------------------------------------------------------------------


def mutated_move(
    *, accept=True, kinetic=0.5, sign=1.0, last=0.5, refresh=True, drift=None, kept_densities=True
):
    """The Hamiltonian move with something left out of it."""
    kept = {}

    def move(evaluate, start, beta, step, num_leapfrog):
        momentum = torch.randn_like(start.flat)
        if not refresh:
            momentum = kept.get(momentum.shape, momentum)
        if drift is not None:
            step = step * drift(start)
        half = momentum + 0.5 * step * start.gradient(beta)
        end = start
        for index in range(num_leapfrog):
            end = evaluate(end.flat + step * half)
            share = last if index == num_leapfrog - 1 else 1.0
            half = half + share * step * end.gradient(beta)
        kept[momentum.shape] = half
        gain = end.log_density(beta) - start.log_density(beta)
        gain = sign * (gain + kinetic * (momentum**2 - half**2).sum(-1))
        taken = torch.rand_like(gain).log() < gain
        if not accept:
            taken = torch.ones_like(taken)
        parts = [
            torch.where(taken if new.dim() == 2 else taken[..., None], new, old)
            for new, old in zip(end, start, strict=True)
        ]
        after = Point(*parts)
        if not kept_densities:
            after = Point(after.flat, *end[1:])
        return after, gain.exp().clamp(max=1)

    return move


MOVES = {
    "Metropolis step left out": {"accept": False},
    "kinetic energy left out": {"kinetic": 0.0},
    "kinetic energy twice": {"kinetic": 1.0},
    "acceptance upside down": {"sign": -1.0},
    "last half step whole": {"last": 1.0},
    "momentum neither drawn anew nor negated": {"refresh": False},
    "densities of what was refused": {"kept_densities": False},
    "step size from where the chain stands": {"drift": lambda p: 0.3 + p.flat.sigmoid() ** 2},
}


def test_right_moves_pass():
    check_move(right_move)
    check_move(mutated_move())


@pytest.mark.parametrize("name", MOVES)
def test_wrong_moves_fail(name):
    with pytest.raises(AssertionError):
        check_move(mutated_move(**MOVES[name]))


# --- the path -----------------------------------------------------------------------------------


def jacobian(factor):
    right = unconstrained._Unconstrained._pyro_sample

    def place(self, msg):
        right(self, msg)
        if msg["name"] == "z":
            self.log_jacobian["z"] = factor * self.log_jacobian["z"]

    return place


@pytest.mark.parametrize("factor", [0.0, -1.0], ids=["left out", "sign"])
def test_wrong_jacobians_fail(factor, monkeypatch):
    monkeypatch.setattr(unconstrained._Unconstrained, "_pyro_sample", jacobian(factor))
    with pytest.raises(AssertionError):
        check_move(right_move)


def weighed(difference, *, after=False, shift=0):
    """The walk along the path, with other differences or at another place in it."""

    def run(evaluate, point, betas, steps, num_leapfrog, resample=None):
        log_weights, last = torch.zeros_like(point.log_f0, dtype=torch.float64), len(betas) - 1
        for index in range(1, last + 1):
            gain = difference(betas, index)
            before = point
            if index < last:
                at = betas[index - shift].to(point.flat.dtype)
                point, _ = hamiltonian.move(
                    evaluate, point, at, steps.at(betas[index]), num_leapfrog
                )
            log_weights = log_weights + gain * (point if after else before).log_ratio
        return log_weights

    return run


def right_difference(betas, index):
    return betas[index] - betas[index - 1]


WALKS = {
    "differences one temperature late": weighed(
        lambda betas, t: betas[min(t + 1, len(betas) - 1)] - betas[t]
    ),
    "equal differences": weighed(lambda betas, t: torch.ones_like(betas[0]) / (len(betas) - 1)),
    "last difference forgotten": weighed(
        lambda betas, t: right_difference(betas, t) * (t < len(betas) - 1)
    ),
    "weighed after the move": weighed(right_difference, after=True),
}


def test_a_walk_written_out_passes(monkeypatch):
    monkeypatch.setattr(annealing, "run", weighed(right_difference))
    check_forward()


@pytest.mark.parametrize("name", WALKS)
def test_wrong_walks_fail(name, monkeypatch):
    monkeypatch.setattr(annealing, "run", WALKS[name])
    with pytest.raises(AssertionError):
        check_forward()


def test_moves_at_the_next_temperature_fail(monkeypatch):
    """Invariant under the density that is to come, not under the one just weighed."""
    monkeypatch.setattr(annealing, "run", weighed(right_difference, shift=-1))
    with pytest.raises(AssertionError):
        check_forward()


def test_chains_that_start_off_the_start_fail(monkeypatch):
    right = annealing.Annealer.draws
    monkeypatch.setattr(annealing.Annealer, "draws", lambda *args: 1.1 * right(*args))
    with pytest.raises(AssertionError):
        check_forward()


def test_choosing_on_the_same_draws_fails(monkeypatch):
    """Several step sizes tried and the largest estimate kept: adaptation on the weights' draws."""
    right = annealing.run

    def best(evaluate, point, betas, steps, *rest):
        scaled = [dataclasses.replace(steps, size=f * steps.size) for f in (0.5, 1.0, 1.5)]
        tries = [right(evaluate, point, betas, one, *rest) for one in scaled]
        return torch.stack(tries).max(0).values

    monkeypatch.setattr(annealing, "run", best)
    with pytest.raises(AssertionError):
        check_forward()


# --- reductions ---------------------------------------------------------------------------------

REDUCTIONS = {
    "no -log K": lambda w: w.logsumexp(0),
    "-log (K - 1)": lambda w: w.logsumexp(0) - math.log(len(w) - 1),
    "mean of logs": lambda w: w.mean(0),
    "sign": lambda w: -algebra.log_mean_exp(w),
    "largest weight": lambda w: w.max(0).values,
    "weights squared": lambda w: 0.5 * algebra.log_mean_exp(2 * w),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_wrong_reductions_fail(name, monkeypatch):
    def reduced(log_weights, method):
        found = right(log_weights, method)
        return dataclasses.replace(found, log_evidence=REDUCTIONS[name](log_weights))

    right = annealing.evidence_of
    monkeypatch.setattr(bounds, "evidence_of", reduced)
    with pytest.raises(AssertionError):
        check_upper()


# --- resampling ---------------------------------------------------------------------------------


def resampled(*, weights):
    """Systematic resampling with other weights afterwards."""
    right = resampling.systematic

    def systematic(log_weights, point, size, ess_threshold):
        after, moved = right(log_weights, point, size, ess_threshold)
        return weights(log_weights, after, size), moved

    return systematic


def zeroed(before, after, size):
    return torch.where(after == before, before, 0.0)


def grouped_sum(before, after, size):
    return torch.where(after == before, before, after + math.log(size))


def reversed_groups(before, after, size):
    return after.flip(0)


RESAMPLINGS = {
    "weights not reset": lambda before, after, size: before,
    "reset to one": zeroed,
    "mean without -log M": grouped_sum,
    "means handed to other groups": reversed_groups,
}


@pytest.mark.parametrize("name", RESAMPLINGS)
def test_wrong_resampling_fails(name, monkeypatch):
    monkeypatch.setattr(resampling, "systematic", resampled(weights=RESAMPLINGS[name]))
    with pytest.raises(AssertionError):
        check_smc()


def test_resampling_that_keeps_the_best_fails(monkeypatch):
    def greedy(log_weights, point, size, ess_threshold):
        after, _ = right(log_weights, point, size, ess_threshold)
        groups = log_weights.reshape(-1, size, log_weights.shape[1])
        best = groups.argmax(1, keepdim=True).expand_as(groups)
        first = torch.arange(0, len(log_weights), size)[:, None, None]
        index = (first + best).reshape(log_weights.shape)
        moved = [
            part.gather(0, index if part.dim() == 2 else index[..., None].expand_as(part))
            for part in point
        ]
        return after, Point(*moved)

    right = resampling.systematic
    monkeypatch.setattr(resampling, "systematic", greedy)
    with pytest.raises(AssertionError):
        check_smc()


def test_an_error_from_single_particles_fails(monkeypatch):
    monkeypatch.setattr(
        resampling, "grouped", lambda w, size: annealing.evidence_of(w, "particles")
    )
    with pytest.raises(AssertionError):
        check_smc()


# --- the other side -----------------------------------------------------------------------------


def test_reverse_chains_that_start_off_the_posterior_fail(monkeypatch):
    right = annealing.Annealer.reverse

    def from_the_guide(self, rows, ladder, flat, num_chains):
        return right(self, rows, ladder, self.draws(rows, 1), num_chains)

    monkeypatch.setattr(annealing.Annealer, "reverse", from_the_guide)
    with pytest.raises(AssertionError):
        check_reverse()


def test_reverse_chains_from_another_datums_draw_fail(monkeypatch):
    right = annealing.Annealer.reverse

    def rolled(self, rows, ladder, flat, num_chains):
        return right(self, rows, ladder, flat.roll(1, 1), num_chains)

    monkeypatch.setattr(annealing.Annealer, "reverse", rolled)
    with pytest.raises(AssertionError):
        check_reverse()


def test_reverse_chains_on_a_rising_schedule_fail(monkeypatch):
    right = annealing.Annealer.reverse

    def rising(self, rows, ladder, flat, num_chains):
        up = dataclasses.replace(ladder, betas=ladder.betas.flip(0))
        return right(self, rows, up, flat, num_chains)

    monkeypatch.setattr(annealing.Annealer, "reverse", rising)
    with pytest.raises(AssertionError):
        check_reverse()


UPPERS = {
    "mean of the inverse weights' inverses": lambda w: algebra.log_mean_exp(-w),
    "sign": lambda w: algebra.log_mean_exp(w),
    "no -log K": lambda w: -w.logsumexp(0),
}


@pytest.mark.parametrize("name", UPPERS)
def test_wrong_upper_reductions_fail(name, monkeypatch):
    right = bounds._above
    monkeypatch.setattr(
        bounds, "_above",
        lambda w: dataclasses.replace(right(w), log_evidence=UPPERS[name](w)),
    )  # fmt: skip
    with pytest.raises(AssertionError):
        check_reverse()


def test_an_upper_bound_without_the_posterior_draw_fails(monkeypatch):
    def from_the_guide(model, guide, rows, values, layout):
        values, log_q = waist.sample_guide(guide, rows, 1, layout)
        return waist.log_joint(model, rows, values, 1, layout) - log_q

    monkeypatch.setattr(bounds, "_log_weights", from_the_guide)
    with pytest.raises(AssertionError):
        check_upper()
