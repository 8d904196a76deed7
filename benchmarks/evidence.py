"""Importance-sampled evidence beside the floor of its matrix products.

    python benchmarks/evidence.py [--threads 2] [--images 26] [--num-particles 5000]

The pair is static MNIST's usual one: 784-200-200-50 and back, tanh, Bernoulli pixels, on random
bits (the cost does not depend on the values). Seconds are scaled to 10,000 images.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

import pvae
from pvae.guides.gaussian import Gaussian
from pvae.models.vae import VAE

HIDDEN, X_DIM, Z_DIM = (200, 200), 784, 50
CAPS = (2**9, 2**10, 2**11, 2**12, 2**13, 2**15)


def floor_seconds(pairs: int, rounds: int) -> float:
    """Seconds per particle-datum pair of the decoder's products, the best of some rounds."""
    shapes = ((Z_DIM, HIDDEN[0]), HIDDEN, (HIDDEN[1], X_DIM))
    first, second, last = (torch.randn(*shape) for shape in shapes)
    z = torch.randn(pairs, Z_DIM)
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        _ = ((z @ first) @ second) @ last
        times.append(time.perf_counter() - started)
    return min(times) / pairs


def main() -> None:
    """Print seconds for 10,000 images at several caps on the pairs held at once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=26)
    parser.add_argument("--num-particles", type=int, default=5000)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = VAE(X_DIM, z_dim=Z_DIM, hidden=HIDDEN, activation="tanh")
    guide = Gaussian(X_DIM, model.latents, hidden=HIDDEN, activation="tanh")
    x = (torch.rand(options.images, X_DIM) < 0.13).float()
    wanted = 10_000 * options.num_particles
    floor = wanted * floor_seconds(2**12, 30)
    print(f"matrix products alone: {floor:.0f} s for 10,000 images, K = {options.num_particles}")
    for cap in CAPS:
        started = time.perf_counter()
        pvae.evidence.importance(model, guide, x, options.num_particles, max_pairs=cap)
        seconds = (time.perf_counter() - started) / len(x) * 10_000
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"max_pairs {cap:6d}: {seconds:5.0f} s, {seconds / floor:.2f} of the floor, "
              f"peak {peak:.0f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
