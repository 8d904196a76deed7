"""What differentiating few of K particles costs and saves: time, noise, likelihood.

    OMP_NUM_THREADS=1 python benchmarks/resampling.py
    OMP_NUM_THREADS=1 python benchmarks/resampling.py --seeds 3 --epochs 100

``time``: processor time of a compiled step (784-200-200-50, batches of 100) over that of IWAE-K,
median of interleaved rounds. ``variance``: of the guide's gradient in a fixed, briefly trained pair
on scikit-learn's digits, over IWAE-K's. ``log p``: held-out digits after equally many steps, by
importance sampling with K = 1000, the mean +- its standard error over seeds.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pvae
from pvae.allocation import keep_large_blocks
from pvae.engine.optimizers import build_optimizer
from pvae.engine.problem import Problem
from pvae.engine.staged import Staged
from pvae.guides.gaussian import Gaussian
from pvae.models.vae import VAE
from pvae.particles import parameters
from pvae.recipes import resampled_iwae


def objectives(num_particles: int) -> dict[str, pvae.Objective]:
    """The estimators, IWAE first."""
    few = {"num_particles": num_particles}
    return {
        f"iwae, K = {num_particles}": pvae.iwae(**few),
        f"dreg, K = {num_particles}": pvae.dreg(**few),
        "resampled, 1 kept": resampled_iwae(1, **few),
        "resampled, 5 kept": resampled_iwae(5, **few),
        "the same, doubly=False": resampled_iwae(1, doubly=False, **few),
        "iwae, K = 5": pvae.iwae(5),
    }


def pair(x_dim: int, z_dim: int, width: int, seed: int = 0) -> tuple[VAE, Gaussian]:
    torch.manual_seed(seed)
    model = VAE(x_dim, z_dim=z_dim, hidden=(width, width), likelihood="bernoulli")
    return model, Gaussian(x_dim, model.latents, hidden=(width, width))


def seconds(goals: dict[str, pvae.Objective], rounds: int) -> dict[str, float]:
    """Processor time of a step, the median of interleaved rounds."""
    x = (torch.rand(2000, 784) < 0.13).float()
    steps: dict[str, Any] = {}
    for name, goal in goals.items():
        model, guide = pair(784, 50, 200)
        layout, weights = goal.prepare(model, guide, x[:100]), parameters(model, guide, x[:100])
        optimizer = build_optimizer("adam", list(weights.values()), lr=1e-3, options=None)
        problem = Problem(
            model, guide, goal, optimizer, weights, layout, x, torch.device("cpu"), 0, len(x)
        )
        steps[name] = Staged(problem, torch.arange(100), compiled=True)
    taken: dict[str, list[float]] = {name: [] for name in goals}
    for number in range(rounds + 1):
        for name, step in steps.items():
            started = time.process_time()
            for k in range(5):
                step(torch.arange(100) + 100 * k, 5 * number + k, 1.0)
            step.finish()
            taken[name].append((time.process_time() - started) / 5)
    return {name: float(np.median(each[1:])) for name, each in taken.items()}


def variances(goals: dict[str, pvae.Objective], x: Tensor, draws: int) -> dict[str, float]:
    """Of the guide's gradient on one batch, summed over its parameters."""
    model, guide = pair(x.shape[1], 8, 64)
    pvae.fit(model, guide, x, objective=pvae.iwae(5), epochs=20, batch_size=100, progress=False)
    found = {}
    for name, goal in goals.items():
        layout, samples = goal.prepare(model, guide, x[:100]), []
        for _ in range(draws):
            guide.zero_grad()
            goal.evaluate(model, guide, x[:100], layout=layout).loss.backward()
            samples.append(torch.cat([p.grad.flatten() for p in guide.parameters()]))
        found[name] = float(torch.stack(samples).var(0).sum())
    return found


def likelihoods(
    goals: dict[str, pvae.Objective], dataset: Any, seeds: int, epochs: int
) -> dict[str, list[float]]:
    """Mean held-out log p of each seed."""
    found: dict[str, list[float]] = {name: [] for name in goals}
    for seed in range(seeds):
        for name, goal in goals.items():
            model, guide = pair(dataset.x_dim, 16, 100, seed)
            pvae.fit(
                model, guide, dataset.train.x, valid=dataset.valid.x, objective=goal,
                epochs=epochs, batch_size=64, lr=2e-3, lr_schedule="cosine", patience=None,
                engine="staged", seed=seed, progress=False,
            )  # fmt: skip
            found[name].append(pvae.evidence.importance(model, guide, dataset.test.x, 1000).mean)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-particles", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=100)
    options = parser.parse_args()
    keep_large_blocks()
    goals = objectives(options.num_particles)
    dataset = pvae.data.load("digits", binarize="fixed")
    first = next(iter(goals))
    times, noise = seconds(goals, options.rounds), variances(goals, dataset.train.x, options.draws)
    scores = likelihoods(goals, dataset, options.seeds, options.epochs)
    print(f"{'':28} {'time':>6} {'variance':>9}  log p")
    for name in goals:
        mean, spread = np.mean(scores[name]), np.std(scores[name], ddof=min(1, options.seeds - 1))
        print(
            f"{name:28} {times[name] / times[first]:6.2f} {noise[name] / noise[first]:9.2f}  "
            f"{mean:.2f} +- {spread / options.seeds**0.5:.2f}"
        )


if __name__ == "__main__":
    main()
