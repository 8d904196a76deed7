"""One training step, rivals side by side in one process: milliseconds and ratios.

    python benchmarks/steps.py [--threads 2] [--rounds 30] [--json steps.json]
    python benchmarks/steps.py --rivals "matrix products" "pvae compiled"

Hand-written torch (eager, and through torch.compile), Pyro's SVI.step, and pvae's engines take
turns, so that a machine's changing speed meets all of them alike; medians and minima are printed.
The floor is the time of the step's matrix products alone. Last, what the loop of `pvae.fit` adds to
a step.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import unittest.mock
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

import pvae
from pvae.engine import Eager, Problem, Staged, build_optimizer
from pvae.guides.gaussian import Gaussian
from pvae.models.vae import VAE
from pvae.particles import parameters

CASES = {
    "64-64-64-8, batch 64, ELBO": (64, (64, 64), 8, 64, 1),
    "784-400-400-20, batch 128, ELBO": (784, (400, 400), 20, 128, 1),
    "784-200-200-50, batch 20, IWAE K=50": (784, (200, 200), 50, 20, 50),
}


class HandWritten(nn.Module):
    """The same network, noise and bound, as one writes it without any toolkit."""

    def __init__(self, x_dim: int, hidden: tuple[int, int], z_dim: int, particles: int) -> None:
        super().__init__()
        first, second = hidden
        self.encoder = nn.Sequential(
            nn.Linear(x_dim, first), nn.Tanh(), nn.Linear(first, second), nn.Tanh(),
            nn.Linear(second, 2 * z_dim),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(z_dim, first), nn.Tanh(), nn.Linear(first, second), nn.Tanh(),
            nn.Linear(second, x_dim),
        )  # fmt: skip
        self.particles = particles

    def forward(self, x: Tensor) -> Tensor:
        """Minus the bound, the mean over the batch."""
        loc, raw = self.encoder(x).chunk(2, -1)
        scale = softplus(raw) + 1e-4
        noise = torch.randn(self.particles, *loc.shape)
        z = loc + scale * noise
        logits = self.decoder(z)
        cross_entropy = binary_cross_entropy_with_logits(
            logits, x.expand_as(logits), reduction="none"
        )
        kl = (-0.5 * noise**2 - scale.log() + 0.5 * z**2).sum(-1)
        log_weights = -cross_entropy.sum(-1) - kl
        return -(torch.logsumexp(log_weights, 0) - torch.tensor(float(self.particles)).log()).mean()


def hand_written(case: tuple[Any, ...], data: Tensor, *, compiled: bool) -> Callable[[], None]:
    x_dim, hidden, z_dim, batch, particles = case
    model = HandWritten(x_dim, hidden, z_dim, particles)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        loss = forward(data[:batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def pyro_step(case: tuple[Any, ...], data: Tensor) -> Callable[[], None]:
    x_dim, hidden, z_dim, batch, particles = case
    model, guide = pair(case)
    if particles == 1:
        loss = pyro.infer.Trace_ELBO()
    else:
        loss = pyro.infer.RenyiELBO(
            alpha=0, num_particles=particles, vectorize_particles=True, max_plate_nesting=1
        )

    def named_model(x: Tensor) -> None:
        pyro.module("model", model)
        model(x)

    def named_guide(x: Tensor) -> None:
        pyro.module("guide", guide)
        guide(x)

    svi = pyro.infer.SVI(named_model, named_guide, pyro.optim.Adam({"lr": 1e-3}), loss=loss)
    return lambda: svi.step(data[:batch])


def pair(case: tuple[Any, ...]) -> tuple[VAE, Gaussian]:
    x_dim, hidden, z_dim, _, _ = case
    torch.manual_seed(0)
    model = VAE(x_dim, z_dim=z_dim, hidden=hidden, activation="tanh")
    return model, Gaussian(x_dim, model.latents, hidden=hidden, activation="tanh")


def pvae_step(
    case: tuple[Any, ...], data: Tensor, engine: str, precision: str = "full"
) -> Callable[[], None]:
    batch, particles = case[3], case[4]
    model, guide = pair(case)
    objective = pvae.vae() if particles == 1 else pvae.iwae(particles)
    layout = objective.prepare(model, guide, data[:batch])
    weights = parameters(model, guide, data[:batch])
    optimizer = build_optimizer("adam", list(weights.values()), lr=1e-3)
    problem = Problem(
        model, guide, objective, optimizer, weights, layout, data, data.device, 0, len(data),
        precision=precision,
    )  # fmt: skip
    index = torch.arange(batch)
    step: Any = Eager(problem)
    if engine != "eager":
        step = Staged(problem, index, compiled=engine == "compiled")
    count = iter(range(10**9))
    return lambda: step(index, next(count), 1.0)


def matrix_products(case: tuple[Any, ...]) -> Callable[[], None]:
    """Forward and backward products of every layer, with nothing between them."""
    x_dim, (first, second), z_dim, batch, particles = case
    rows = batch * particles
    shapes = [(batch, x_dim, first), (batch, first, second), (batch, second, 2 * z_dim)]
    shapes += [(rows, z_dim, first), (rows, first, second), (rows, second, x_dim)]
    blocks = [
        (torch.randn(n, i), torch.randn(i, o), torch.randn(n, o)) for n, i, o in shapes
    ]  # inputs, weights, gradients

    def run() -> None:
        for number, (inputs, weights, gradient) in enumerate(blocks):
            _ = inputs @ weights
            _ = inputs.T @ gradient
            if number:
                _ = gradient @ weights.T

    return run


RIVALS: dict[str, Callable[[tuple[Any, ...], Tensor], Callable[[], None]]] = {
    "matrix products": lambda case, _: matrix_products(case),
    "hand-written": partial(hand_written, compiled=False),
    "hand-written, torch.compile": partial(hand_written, compiled=True),
    "Pyro SVI.step": pyro_step,
    "pvae eager": partial(pvae_step, engine="eager"),
    "pvae staged": partial(pvae_step, engine="staged"),
    "pvae compiled": partial(pvae_step, engine="compiled"),
    "pvae compiled, bfloat16": partial(pvae_step, engine="compiled", precision="bfloat16"),
}
REFERENCES = ("hand-written, torch.compile", "Pyro SVI.step", "matrix products")


class _NoStep:
    """A step that costs nothing, so that what is left is the loop of ``pvae.fit``."""

    name, reason, seconds = "none", "to time the loop alone", 0.0

    def __call__(self, index: Tensor, step: int, beta: float) -> Tensor:
        return torch.ones(4)

    def finish(self) -> None:
        pass


def loop_milliseconds(case: tuple[Any, ...], data: Tensor) -> float:
    """What ``pvae.fit`` does around a step: order, schedules, sums. Median over epochs."""
    model, guide = pair(case)
    with unittest.mock.patch("pvae.loop.stage", return_value=_NoStep()):
        run = pvae.fit(
            model, guide, data.repeat(25, 1), epochs=20, batch_size=case[3], lr_schedule="cosine",
            engine="compiled", progress=False,
        )  # fmt: skip
    return statistics.median(1e3 / row["steps_per_second"] for row in run.history)


def measure(rivals: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Interleaved rounds; each round times a block of steps of each rival, in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for step in rivals.values():
        for _ in range(5):
            step()
    for _ in range(rounds):
        for name, step in rivals.items():
            for _ in range(5):
                started = time.perf_counter()
                step()
                times[name].append(1e3 * (time.perf_counter() - started))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), choices=RIVALS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pyro.enable_validation(False)
    warnings.simplefilter("ignore")
    report: dict[str, Any] = {
        "torch": torch.__version__, "pyro": pyro.__version__, "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(), "threads": options.threads,
    }  # fmt: skip
    for title, case in CASES.items():
        data = (torch.rand(4 * case[3], case[0]) < 0.3).float()
        rivals = {name: RIVALS[name](case, data) for name in options.rivals}
        times = measure(rivals, options.rounds)
        medians = {name: statistics.median(values) for name, values in times.items()}
        print(f"\n{title}")
        references = [name for name in REFERENCES if name in medians]
        heads = "".join(f"   / {name}" for name in references)
        print(f"  {'':28s} median ms    min ms{heads}")
        for name, values in times.items():
            ratios = "".join(
                f"{medians[name] / medians[other]:{len(other) + 5}.2f}" for other in references
            )
            print(f"  {name:28s} {medians[name]:9.3f} {min(values):9.3f}{ratios}")
        loop = loop_milliseconds(case, data)
        said = f"  pvae.fit adds {1e3 * loop:.0f} microseconds a step"
        if "pvae compiled" in medians:
            said += f", {100 * loop / medians['pvae compiled']:.1f} % of it"
        print(said)
        report[title] = {n: {"median_ms": medians[n], "min_ms": min(v)} for n, v in times.items()}
        report[title]["loop of pvae.fit"] = {"median_ms": loop}
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
