"""Importance-sampled evidence beside the floor of its matrix products.

    python benchmarks/evidence.py [--threads 2] [--blocks 6] [--num-particles 5000]

The pair is static MNIST's usual one: 784-200-200-50 and back, tanh, Bernoulli pixels, on random
bits (the cost does not depend on the values). Blocks of images by the eager and the compiled
programs and the matrix products take turns; seconds are medians, scaled to 10,000 images. Getting
ready is shown apart.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time

import torch

from pvae.evidence.importance import evaluation
from pvae.evidence.sweep import Sweep
from pvae.guides.gaussian import Gaussian
from pvae.models.vae import VAE
from pvae.particles import inspect

HIDDEN, X_DIM, Z_DIM = (200, 200), 784, 50
CAPS = (2**9, 2**10, 2**11, 2**12)
WANTED = 10_000


def products(pairs: int, total: int) -> float:
    """Seconds of the decoder's matrix products for ``total`` pairs, ``pairs`` at a time."""
    shapes = ((Z_DIM, HIDDEN[0]), HIDDEN, (HIDDEN[1], X_DIM))
    first, second, last = (torch.randn(*shape) for shape in shapes)
    z = torch.randn(pairs, Z_DIM)
    started = time.perf_counter()
    for _ in range(total // pairs):
        _ = ((z @ first) @ second) @ last
    return (time.perf_counter() - started) / (total // pairs * pairs)


def main() -> None:
    """Print seconds for 10,000 images at several caps on the pairs held at once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--num-particles", type=int, default=5000)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = VAE(X_DIM, z_dim=Z_DIM, hidden=HIDDEN, activation="tanh")
    guide = Gaussian(X_DIM, model.latents, hidden=HIDDEN, activation="tanh")
    size, particles = 2**17 // options.num_particles, options.num_particles
    x = (torch.rand(size, X_DIM) < 0.13).float()
    with evaluation(model, guide, seed=0, device=torch.device("cpu")):
        layout = inspect(model, guide, x)
        rivals = {}
        for engine, caps in (("eager", CAPS[2:3]), ("compiled", CAPS)):
            for cap in caps:
                sweep = Sweep(model, guide, layout, particles, cap, WANTED, engine)
                started = time.perf_counter()
                sweep(x)
                ready = time.perf_counter() - started
                print(f"{engine}, max_pairs {cap}: first block after {ready:.1f} s")
                rivals[engine, cap] = sweep
        times: dict[object, list[float]] = {name: [] for name in (*rivals, "products")}
        for _ in range(options.blocks):
            times["products"].append(products(2**11, size * particles) * particles)
            for name, sweep in rivals.items():
                started = time.perf_counter()
                sweep(x)
                times[name].append((time.perf_counter() - started) / size)
    floor = statistics.median(times.pop("products"))
    print(f"matrix products alone: {WANTED * floor:.0f} s for {WANTED} images, K = {particles}")
    for (engine, cap), found in times.items():  # type: ignore[misc]
        median = statistics.median(found)
        print(
            f"{engine:9s} max_pairs {cap:5d}: {WANTED * median:5.0f} s, {median / floor:.2f} of it"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory {peak:.0f} MB")


if __name__ == "__main__":
    main()
