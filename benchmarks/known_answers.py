"""Estimators of the log evidence where the truth is known: factor analysis, in two settings.

    python benchmarks/known_answers.py [--threads 2] [--temperatures 1000] [--crowd]

First, fifty latents and a guide that is a poor one: importance sampling, annealing, SMC and the
sandwich beside the truth. Second, the bounds from below and above at growing K, in the setting of
ten features and two latents. With ``--crowd`` instead: the memory of 1,000 chains for each of 100
data through 500 temperatures.
"""

from __future__ import annotations

import argparse
import math
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pvae.evidence import annealed, importance, importance_upper, sandwich, simulate, smc
from pvae.models.factor_analysis import FactorAnalysis


def poor_guide(model: FactorAnalysis) -> Callable[[Tensor], None]:
    """Diagonal: means half a posterior sd off, sds 1.3 times the marginal ones."""

    def guide(x: Tensor) -> None:
        exact = model.posterior(x)["z"]
        sd = exact.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(exact.mean + 0.5 * sd, 1.3 * sd).to_event(1))

    return guide


def shifted_guide(model: FactorAnalysis) -> Callable[[Tensor], None]:
    """The posterior, its means moved by 0.3 marginal sd and its covariance times 1.3 squared."""

    def guide(x: Tensor) -> None:
        exact = model.posterior(x)["z"]
        sd = exact.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
        with pyro.plate("data", len(x)):
            tril = 1.3 * exact.scale_tril
            pyro.sample("z", dist.MultivariateNormal(exact.mean + 0.3 * sd, scale_tril=tril))

    return guide


def row(name: str, estimate: Callable[[], Any], truth: Tensor) -> None:
    """One estimator's errors against the truth, and the error that it states itself."""
    started = time.perf_counter()
    found = estimate()
    error = found.log_evidence - truth
    print(
        f"{name:<34}{float(error.mean()):>9.3f}{float(error.square().mean().sqrt()):>9.3f}"
        f"{float(found.stderr.square().mean().sqrt()):>9.3f}"
        f"{float(found.pareto_k.median()):>9.2f}{time.perf_counter() - started:>9.0f}",
        flush=True,
    )


def fifty_latents(temperatures: int) -> None:
    """A table of estimators, and the sandwich."""
    torch.manual_seed(0)
    model = FactorAnalysis(100, z_dim=50).double()
    guide = poor_guide(model)
    drawn = simulate(model, guide, 20, seed=1)
    truth = model.log_evidence(drawn.x).detach()
    print(f"{'fifty latents, 20 data':<34}{'error':>9}{'RMS':>9}{'own SE':>9}{'k-hat':>9}{'s':>9}")
    for size in (5000, 50_000):
        name, estimate = f"importance, K = {size}", partial(importance, num_particles=size)
        row(name, partial(estimate, model, guide, drawn.x), truth)
    row(
        f"annealed, 32 chains, T = {temperatures}",
        lambda: annealed(model, guide, drawn.x, num_temperatures=temperatures),
        truth,
    )
    row(
        f"smc, 16 groups of 16, T = {temperatures // 10}",
        lambda: smc(model, guide, drawn.x, num_temperatures=max(2, temperatures // 10)),
        truth,
    )
    started = time.perf_counter()
    both = sandwich(model, guide, simulated=drawn, num_chains=16, num_temperatures=temperatures)
    lower, upper = both
    for name, error in (
        ("lower, below the truth", truth - lower.log_evidence),
        ("upper, above the truth", upper.log_evidence - truth),
    ):
        print(f"sandwich {name}: {float(error.mean()):.3f} ± {standard_error(error):.3f}")
    print(
        f"sandwich gap: {both.mean_gap:.3f} ± {both.mean_gap_stderr:.3f} nats, "
        f"{time.perf_counter() - started:.0f} s"
    )


def standard_error(values: Tensor) -> float:
    """Of the mean, over the data."""
    return float(values.std()) / math.sqrt(len(values))


def both_sides(num_data: int) -> None:
    """Distance of the lower and the upper bound of K weights to the truth."""
    torch.manual_seed(0)
    model = FactorAnalysis(10, z_dim=2).double()
    with torch.no_grad():
        model.log_noise.fill_(0.5 * math.log(0.5))
    guide = shifted_guide(model)
    drawn = simulate(model, guide, num_data, seed=1)
    truth = model.log_evidence(drawn.x).detach()
    print(f"\n{'K':>5}{'below':>20}{'above':>20}   {num_data} data")
    for size in (1, 4, 16, 64, 256):
        below = truth - importance(model, guide, drawn.x, size, max_pairs=2**18).log_evidence
        above = importance_upper(model, guide, drawn, size, max_pairs=2**18).log_evidence - truth
        cells = [f"{float(e.mean()):.4f} ± {standard_error(e):.4f}" for e in (below, above)]
        print(f"{size:>5}{cells[0]:>20}{cells[1]:>20}", flush=True)


def crowd() -> None:
    """1,000 chains, 100 data, 500 temperatures: seconds and peak memory of the process."""
    torch.manual_seed(0)
    model = FactorAnalysis(20, z_dim=10)
    guide = poor_guide(model)
    drawn = simulate(model, guide, 100, seed=1)
    started = time.perf_counter()
    found = annealed(model, guide, drawn.x, num_chains=1000, num_temperatures=500, num_leapfrog=1)
    error = found.log_evidence - model.log_evidence(drawn.x).detach()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"1,000 chains x 100 data x 500 temperatures: {time.perf_counter() - started:.0f} s, peak "
        f"{peak:.2f} GiB, error {float(error.mean()):.4f} ± {standard_error(error):.4f} nats"
    )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--temperatures", type=int, default=1000)
    parser.add_argument("--data", type=int, default=20_000)
    parser.add_argument("--crowd", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.crowd:
        crowd()
        return
    fifty_latents(options.temperatures)
    both_sides(options.data)


if __name__ == "__main__":
    main()
